"""What the fields of a block stand for, with the roundings of llama.cpp and of the gguf package.

Every product and every difference is rounded to float32 on its own, in the order written in the
`dequantize_row_*` functions of llama.cpp's `ggml-quants.c`; nothing here may be fused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from pytest_qlab.formats.ggml.layouts import unpack_blocks
from pytest_qlab.formats.ggml.types import find_type

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL and IQ4_XS stand for, before scaling."""

MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what the codes of MXFP4 stand for; the scale is halved instead. -0 is stored as 0."""

# Weights at a time. On a CPU the intermediate results of a chunk should stay in its caches, and on
# other devices the kernels should be few.
_CHUNK_CPU, _CHUNK_DEVICE = 2**19, 2**24

Fields: TypeAlias = Mapping[str, Tensor]


def dequantize_blocks(type: str, blocks: Tensor) -> Tensor:
    """The weights of blocks of a quantized type, given as uint8 (B, block_bytes).

    Returns:
        float32 (B, block_size) on the same device, bit for bit as llama.cpp has them.

    Raises:
        SpecError: there is no type of that name.
        ValueError: the type is not a quantized one, or `blocks` has another shape or dtype.
    """
    found = find_type(type)
    shape = (len(blocks), found.block_size)
    weights = torch.empty(shape, dtype=torch.float32, device=blocks.device)
    chunk = (_CHUNK_CPU if blocks.device.type == "cpu" else _CHUNK_DEVICE) // found.block_size
    # An empty chunk is still one, so that wrong arguments are refused whatever their length.
    for part, target in zip(torch.split(blocks, chunk), torch.split(weights, chunk), strict=True):
        fields = unpack_blocks(found.name, part)
        _formulas[found.name](fields, target)
    return weights


def _symmetric(fields: Fields, out: Tensor, *, zero: int) -> None:
    """(code - zero) * d."""
    codes = fields["codes"].view(torch.int8).sub_(zero)
    torch.mul(codes, _column(fields["d"]), out=out)


def _affine(fields: Fields, out: Tensor) -> None:
    """code * d + m."""
    torch.mul(fields["codes"], _column(fields["d"]), out=out)
    out.add_(_column(fields["m"]))


def _affine_groups(fields: Fields, out: Tensor) -> None:
    """(d * scale) * code - dmin * min."""
    scales = _column(fields["d"]) * fields["scales"]
    mins = _column(fields["dmin"]) * fields["mins"]
    groups = _groups(out, scales.shape[1])
    torch.mul(fields["codes"].view_as(groups), scales.unsqueeze(2), out=groups)
    groups.sub_(mins.unsqueeze(2))


def _symmetric_groups(fields: Fields, out: Tensor, *, zero: int, scale_zero: int) -> None:
    """(d * (scale - scale_zero)) * (code - zero)."""
    scales = _column(fields["d"]) * fields["scales"].view(torch.int8).sub_(scale_zero)
    groups = _groups(out, scales.shape[1])
    codes = fields["codes"].view(torch.int8).sub_(zero)
    torch.mul(codes.view_as(groups), scales.unsqueeze(2), out=groups)


def _looked_up(fields: Fields, out: Tensor) -> None:
    """d * value[code]."""
    _look_up(_iq4_values, fields["codes"], out)
    out.mul_(_column(fields["d"]))


def _looked_up_groups(fields: Fields, out: Tensor) -> None:
    """(d * (scale - 32)) * value[code]."""
    scales = _column(fields["d"]) * fields["scales"].view(torch.int8).sub_(32)
    _look_up(_iq4_values, fields["codes"], out)
    _groups(out, scales.shape[1]).mul_(scales.unsqueeze(2))


def _microscaled(fields: Fields, out: Tensor) -> None:
    """value[code] * 2**(e - 128)."""
    _look_up(_mxfp4_values, fields["codes"], out)
    powers = _powers.to(out.device).index_select(0, fields["e"].to(torch.int32))
    out.mul_(powers.unsqueeze(1))


def _look_up(table: Tensor, codes: Tensor, out: Tensor) -> None:
    index = codes.view(-1).to(torch.int32)
    torch.index_select(table.to(out.device), 0, index, out=out.view(-1))


def _groups(weights: Tensor, count: int) -> Tensor:
    """A view (B, count, n / count) of weights (B, n)."""
    return weights.view(len(weights), count, weights.shape[1] // count)


def _column(halves: Tensor) -> Tensor:
    """Numbers (B,) of float16 as float32 (B, 1)."""
    return halves.to(torch.float32).unsqueeze(1)


_iq4_values = torch.tensor(IQ4_VALUES, dtype=torch.float32)
_mxfp4_values = torch.tensor(MXFP4_VALUES, dtype=torch.float32)
# The two smallest are subnormal, and exact.
_powers = torch.tensor([2.0 ** (exponent - 128) for exponent in range(256)], dtype=torch.float32)

_formulas: dict[str, Callable[[Fields, Tensor], None]] = {
    "Q4_0": partial(_symmetric, zero=8),
    "Q4_1": _affine,
    "Q5_0": partial(_symmetric, zero=16),
    "Q5_1": _affine,
    "Q8_0": partial(_symmetric, zero=0),
    "Q2_K": _affine_groups,
    "Q3_K": partial(_symmetric_groups, zero=4, scale_zero=32),
    "Q4_K": _affine_groups,
    "Q5_K": _affine_groups,
    "Q6_K": partial(_symmetric_groups, zero=32, scale_zero=0),
    "IQ4_NL": _looked_up,
    "IQ4_XS": _looked_up_groups,
    "MXFP4": _microscaled,
}
