"""`ggml`: one of llama.cpp's block types for every linear layer, bit for bit as its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from pytest_qlab.errors import MethodError
from pytest_qlab.finite import is_finite
from pytest_qlab.methods.base import Method, QuantizedLayer, Statistic
from pytest_qlab.methods.inputs import check_statistics, check_weight
from pytest_qlab.methods.mixes import fitting_type

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics

GgmlTypeName = Literal[
    "Q2_K",
    "Q3_K",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "F16",
    "BF16",
    "F32",
]
_PLAIN = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def in_capitals(value: object) -> object:
    """Type names are accepted in lower case, too."""
    return value.upper() if isinstance(value, str) else value


class Ggml(Method):
    """One GGML type for all linear layers of the decoder; the embeddings stay as they are.

    What `llama-quantize --pure` makes of these layers. A layer whose rows do not fit the type's
    blocks gets the type that llama.cpp takes instead.

    Options:
        type: of the blocks: Q4_0 and the like round to the nearest point of a grid for every 32
            weights, K types (Q4_K) search scales in blocks of 256, IQ4 types have a grid that is
            finer near zero, MXFP4 is the microscaling float; F16, BF16, F32 store the weights.
        imatrix: weigh each column's errors by the mean square of its inputs.
    """

    name: ClassVar[str] = "ggml"
    summary: ClassVar[str] = "one llama.cpp block type for all linear layers"
    reference: ClassVar[str] = "ggml-org/llama.cpp, ggml-quants.c"
    cost: ClassVar[float] = 2.0
    positional: ClassVar[str | None] = "type"

    type: Annotated[GgmlTypeName, BeforeValidator(in_capitals)] = "Q4_K"
    imatrix: bool = False

    @property
    def wanted_statistics(self) -> frozenset[Statistic]:
        """The inputs' squares, for the importance matrix only."""
        return frozenset({"channels"}) if self.imatrix else frozenset()

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Quantize the weight's rows; see `Method.quantize`.

        An expert that no calibration token has reached gets columns of equal importance, as from
        llama.cpp's imatrix tool.

        Raises:
            MethodError: a weight, or a scale that it needs, is beyond what float16 holds.
        """
        import torch

        from pytest_qlab.formats.ggml import GgmlBlocks
        from pytest_qlab.formats.plain import PlainWeight
        from pytest_qlab.solvers.ggml import quantize_ggml

        check_weight(weight, name)
        rows, columns = weight.shape
        importance = None
        if self.imatrix:
            known = check_statistics(statistics, weight, name, self.name, gram=False)
            importance = torch.ones(columns, device=weight.device)
            if known.tokens:
                importance = known.square_sum / known.tokens
        type = fitting_type(self.type, columns)
        if type in _PLAIN:
            plain = weight.to(getattr(torch, _PLAIN[type]))
            if not is_finite(plain):
                raise MethodError(
                    f"{name or 'A layer'} holds weights of magnitude "
                    f"{float(weight.abs().max()):.3g}, which {type} cannot store. Take BF16 or F32."
                )
            return QuantizedLayer(PlainWeight(plain))
        try:
            data = quantize_ggml(weight, type, importance)
        except MethodError as error:
            raise MethodError(f"{name or 'A layer'} cannot be quantized: {error}") from error
        return QuantizedLayer(GgmlBlocks(type, data, (rows, columns)))
