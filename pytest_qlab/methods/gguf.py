"""`gguf`: the types and bits that llama.cpp's quantizer gives to all matrices of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator

from pytest_qlab.methods.base import Method, Statistic
from pytest_qlab.methods.ggml import Ggml, in_capitals
from pytest_qlab.methods.mixes import Mix, tensor_types

if TYPE_CHECKING:
    from torch import nn


class Gguf(Method):
    """A mix of GGML types: the decoder's linear layers, the input embedding and the output head.

    Each matrix gets the type that `llama-quantize` gives it; everything else is stored in float32,
    as in GGUF files. The bits are llama.cpp's own.

    Options:
        type: the mix, named as the files are: Q4_K_M, Q3_K_S, IQ4_XS. MXFP4 stores every matrix in
            that type.
        imatrix: weigh each column's errors by the mean square of its inputs, in the decoder's
            linear layers; llama.cpp's importance matrix covers no embeddings, either.
    """

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "llama.cpp's mixes: a GGML type for every matrix, embeddings included"
    reference: ClassVar[str] = "ggml-org/llama.cpp, src/llama-quant.cpp"
    cost: ClassVar[float] = 2.0
    positional: ClassVar[str | None] = "type"
    stored_dtype: ClassVar[str | None] = "float32"

    type: Annotated[Mix, BeforeValidator(in_capitals)] = "Q4_K_M"
    imatrix: bool = False

    @property
    def wanted_statistics(self) -> frozenset[Statistic]:
        """The inputs' squares, for the importance matrix only."""
        return frozenset({"channels"}) if self.imatrix else frozenset()

    def assign(self, model: nn.Module) -> dict[str, Method]:
        """A `Ggml` for every matrix of the model, by the dotted name of its module."""
        from pytest_qlab.models.matrices import counts_of, matrices_of

        matrices, counts = matrices_of(model), counts_of(model)
        types = tensor_types(
            self.type,
            matrices,
            gqa=counts.gqa,
            experts=counts.experts,
            imatrix=self.imatrix,
            layers=counts.layers,
            architecture=counts.architecture,
        )
        return {
            each.name: Ggml.model_validate(
                {"type": types[each.name], "imatrix": self.imatrix and each.block is not None}
            )
            for each in matrices
        }
