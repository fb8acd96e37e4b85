"""A GGUF file as a quantized model: the same bits under the names of the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_qlab.engines.gguf.hyperparameters import (
    ROPE_FACTORS,
    check_hyperparameters,
    rope_factors,
)
from pytest_qlab.engines.gguf.names import Naming, Place, gguf_names
from pytest_qlab.engines.gguf.vocabulary import check_vocabulary
from pytest_qlab.errors import ModelError
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.methods.base import QuantizedLayer
from pytest_qlab.methods.pipeline import QuantizedModel

if TYPE_CHECKING:
    from pytest_qlab.engines.gguf.reader import GgufFile, GgufTensor
    from pytest_qlab.models.load import LoadedModel

_OUTPUT = "output.weight"


def read_model(file: GgufFile, loaded: LoadedModel) -> QuantizedModel:
    """Read all tensors of a file that was made from a base model.

    Whatever its tensors' values, the file is of the model if its architecture, hyperparameters,
    vocabulary, and the names and shapes of its tensors are.

    Returns:
        The decoder's linear layers; the input embedding and the output head as `embeddings`; and
        every other parameter, in float32, as `changed`.

    Raises:
        ModelError: the file is of another model, or the model's architecture is not supported.
        DataError: a tensor has a type that is not decoded, or cannot be read.
    """
    naming = gguf_names(loaded.model)
    check_hyperparameters(file.metadata, loaded.model)
    check_vocabulary(file, loaded.tokenizer)
    _check_tensors(file.tensors, naming)
    _check_rope_factors(file.tensors.get(ROPE_FACTORS), rope_factors(loaded.model))
    if naming.tied and _OUTPUT in file.tensors:
        _check_tied(file.tensors[_OUTPUT], file.tensors["token_embd.weight"])
    result = QuantizedModel(layers={}, stored_dtype=torch.float32)
    for name, place in naming.places.items():
        tensor = file.tensors[place.tensor]
        if not place.packable:
            result.changed[name] = _others(tensor, place)
            continue
        kind = result.layers if place.tensor.startswith("blk.") else result.embeddings
        kind[place.module] = QuantizedLayer(_matrix(tensor, place))
    return result


def _matrix(tensor: GgufTensor, place: Place) -> PackedWeight:
    packed, index = tensor.packed(), place.model_rows()
    return packed if index is None else packed.take_rows(index)


def _others(tensor: GgufTensor, place: Place) -> Tensor:
    matrix = len(place.shape) == 2
    value = tensor.packed().dequantize() if matrix else tensor.tensor().float()
    index = place.model_rows()
    return value if index is None else value.index_select(0, index)


def _check_tensors(tensors: Mapping[str, GgufTensor], naming: Naming) -> None:
    for place in naming.places.values():
        tensor = tensors.get(place.tensor)
        if tensor is None:
            what = f"it has no tensor {place.tensor}, which {place.parameter} would be"
            fused = re.sub(r"attn_[qkv]\.", "attn_qkv.", place.tensor)
            if fused in tensors:
                raise _unfit(
                    what, f" It has {fused} instead: convert the model without --fuse-qkv."
                )
            raise _unfit(what)
        if tensor.shape != place.shape:
            raise _unfit(
                f"its tensor {tensor.name} has the shape {tensor.shape}, but {place.parameter} of "
                f"the model {place.shape}"
            )
    known = {place.tensor for place in naming.places.values()} | {ROPE_FACTORS}
    if naming.tied:
        known.add(_OUTPUT)
    unknown = next((name for name in tensors if name not in known), None)
    if unknown is not None:
        raise _unfit(f"it has the tensor {unknown}, which the model has no parameter for")


def _check_rope_factors(found: GgufTensor | None, expected: Tensor | None) -> None:
    if found is None and expected is None:
        return
    if found is None:
        raise _unfit(
            f"it has no tensor {ROPE_FACTORS}, but the model scales its rotary positions",
            " Convert the model again with a current llama.cpp.",
        )
    factors = found.tensor().float()
    if expected is None:
        expected = torch.ones_like(factors)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4, atol=0):
        raise _unfit(
            f"its tensor {ROPE_FACTORS} scales rotary positions otherwise than the model's "
            "configuration says"
        )


def _check_tied(output: GgufTensor, embedding: GgufTensor) -> None:
    """A head that the model ties to the input embedding may be there twice, but not differ."""
    same = output.type == embedding.type and output.shape == embedding.shape
    if not same or not torch.equal(output.data(), embedding.data()):
        raise _unfit(
            f"it has an output head ({output.type}) other than its input embedding "
            f"({embedding.type}), but the model's are one and the same",
            " If it was quantized with an output tensor type of its own, quantize it without.",
        )


def _unfit(what: str, remedy: str = "") -> ModelError:
    return ModelError(
        f"The GGUF file does not fit the base model: {what}. Give the model that the file was made "
        f"from as --qlab-model.{remedy}"
    )
