"""What the tests of the GGML methods share: sizes of the types, short constructors, comparison."""

from __future__ import annotations

import torch

from pytest_qlab.formats import PlainWeight
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.ggml import GgmlBlocks
from pytest_qlab.methods.ggml import Ggml
from pytest_qlab.methods.gguf import Gguf

# Bytes of 256 weights, from the layouts in ggml-common.h.
BYTES = {
    "Q2_K": 84,
    "Q3_K": 110,
    "IQ4_XS": 136,
    "MXFP4": 8 * 17,
    "Q4_K": 144,
    "Q4_0": 8 * 18,
    "IQ4_NL": 8 * 18,
    "Q4_1": 8 * 20,
    "Q5_K": 176,
    "Q5_0": 8 * 22,
    "Q5_1": 8 * 24,
    "Q6_K": 210,
    "Q8_0": 8 * 34,
    "F16": 512,
    "BF16": 512,
    "F32": 1024,
}


def ggml(type: str, *, imatrix: bool = False) -> Ggml:
    """`ggml:TYPE`, perhaps with importance."""
    return Ggml.model_validate({"type": type, "imatrix": imatrix})


def gguf(type: str, *, imatrix: bool = False) -> Gguf:
    """`gguf:TYPE`, perhaps with importance."""
    return Gguf.model_validate({"type": type, "imatrix": imatrix})


def type_of(packed: PackedWeight) -> str:
    """The name of the type that a matrix is stored in."""
    if isinstance(packed, GgmlBlocks):
        return packed.type
    assert isinstance(packed, PlainWeight)
    return {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[
        str(packed.weight.dtype).removeprefix("torch.")
    ]


def same(one: PackedWeight, other: PackedWeight) -> bool:
    """Whether two matrices are stored in the same type and bits."""
    return one.metadata() == other.metadata() and all(
        torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items()
    )
