"""Rows of small unsigned codes packed into bytes, little end first.

Code `i` of a row occupies the bits `i * bits` to `(i + 1) * bits - 1` of the row, counted from the
lowest bit of its first byte; each row is padded with zero bits to a whole byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of shape (rows, count), each in 0 .. 2**bits - 1.

    Returns:
        uint8 of shape (rows, packed_width(count, bits)).

    Raises:
        ValueError: `bits` is not one of `WIDTHS`, or a code does not fit.
    """
    unit = _unit_bytes(bits)
    rows, count = codes.shape
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"a code outside of 0 .. {2**bits - 1} cannot be packed into {bits} bits")
    per_unit = 8 * unit // bits
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -count % per_unit))
    words = (padded.view(rows, -1, per_unit) << _steps(per_unit, bits, codes)).sum(
        -1, dtype=torch.int32
    )
    unpadded: Tensor = (words.unsqueeze(-1) >> _steps(unit, 8, codes)) & 255
    return unpadded.to(torch.uint8).view(rows, -1)[:, : packed_width(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 of shape (rows, count)."""
    unit = _unit_bytes(bits)
    rows, width = packed.shape
    if unit == 1:
        words = packed.unsqueeze(-1)
    else:
        padded = torch.nn.functional.pad(packed, (0, -width % unit)).to(torch.int32)
        steps = _steps(unit, 8, packed)
        words = (padded.view(rows, -1, unit) << steps).sum(-1, keepdim=True, dtype=torch.int32)
    codes: Tensor = (words >> _steps(8 * unit // bits, bits, packed).to(words.dtype)) & (
        2**bits - 1
    )
    return codes.to(torch.uint8).view(rows, -1)[:, :count]


def _unit_bytes(bits: int) -> int:
    """Bytes in the shortest run that holds a whole number of codes."""
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits cannot be packed; expected one of {WIDTHS}")
    return 3 if bits == 3 else 1


def _steps(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=torch.int32, device=like.device)
