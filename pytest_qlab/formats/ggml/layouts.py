"""Where the bits of each field lie in a block of each type, and both directions of moving them.

A block is a few scales and many codes, all of them scattered: the codes of neighbouring weights lie
in neighbouring bytes, those of weights further on in higher bits of the same bytes, and the fifth
and sixth bits somewhere else. `LAYOUTS` says so as data, and one loop packs or unpacks all types.
Every bit of a block belongs to exactly one field, so packing and unpacking are exact inverses.
Source: `ggml-common.h` and the `dequantize_row_*` functions of llama.cpp's `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pytest_qlab.formats.ggml.types import find_type


@dataclass(frozen=True)
class Bits:
    """The same bits of a stretch of bytes, and the elements of a field that they are a part of.

    The bytes are `runs` runs of `width`; run r holds the elements `first` to `first + width - 1` of
    the r-th of `runs` equal parts of the field.

    Args:
        offset: first byte in the block.
        runs: runs of consecutive bytes.
        width: bytes of a run.
        low: lowest of the bits in a byte.
        bits: how many there are.
        first: the element that a run's first byte belongs to, counted in the run's part.
        shift: which bit of the element the lowest of the bits is.
    """

    offset: int
    runs: int
    width: int
    low: int
    bits: int
    first: int = 0
    shift: int = 0


@dataclass(frozen=True)
class Half:
    """One float16 for the block, at a byte offset."""

    offset: int


@dataclass(frozen=True)
class Codes:
    """`count` whole numbers of the block, put together from bits."""

    count: int
    parts: tuple[Bits, ...]
    dtype: torch.dtype = torch.uint8

    @property
    def largest(self) -> int:
        """The largest unsigned number that the bits can hold."""
        return int(2 ** max(part.shift + part.bits for part in self.parts)) - 1


Layout: TypeAlias = dict[str, Half | Codes]


def _planes(offset: int, size: int, bits: int, width: int, shift: int = 0) -> tuple[Bits, ...]:
    """All bits of `size` bytes: in each run of `width`, first the lowest of all, then the next."""
    return tuple(
        Bits(offset, size // width, width, bits * plane, bits, width * plane, shift)
        for plane in range(8 // bits)
    )


def _whole(offset: int, count: int, dtype: torch.dtype = torch.uint8) -> Codes:
    """One byte for each number."""
    return Codes(count, _planes(offset, count, 8, count), dtype)


def _six_bit_pairs(offset: int) -> Layout:
    """The 8 scales and 8 mins of Q4_K and Q5_K, 6 bits each, in 12 bytes.

    The first four of each have the low bits of a byte of their own; the last four share the nibbles
    of the last four bytes, and have their two high bits on top of the first four.
    """

    def six_bits(own: int, nibble: int) -> Codes:
        return Codes(
            8,
            (
                Bits(own, 1, 4, 0, 6),
                Bits(offset + 8, 1, 4, nibble, 4, first=4),
                Bits(own, 1, 4, 6, 2, first=4, shift=4),
            ),
        )

    return {"scales": six_bits(offset, 0), "mins": six_bits(offset + 4, 4)}


# A legacy block is two halves of 16: low nibbles, then high nibbles. The fifth bits are a
# little-endian number of 32 bits, one for each weight in order.
LAYOUTS: dict[str, Layout] = {
    "Q4_0": {"d": Half(0), "codes": Codes(32, _planes(2, 16, 4, 16))},
    "Q4_1": {"d": Half(0), "m": Half(2), "codes": Codes(32, _planes(4, 16, 4, 16))},
    "Q5_0": {
        "d": Half(0),
        "codes": Codes(32, _planes(6, 16, 4, 16) + _planes(2, 4, 1, 1, shift=4)),
    },
    "Q5_1": {
        "d": Half(0),
        "m": Half(2),
        "codes": Codes(32, _planes(8, 16, 4, 16) + _planes(4, 4, 1, 1, shift=4)),
    },
    "Q8_0": {"d": Half(0), "codes": _whole(2, 32, torch.int8)},
    "Q2_K": {
        "d": Half(80),
        "dmin": Half(82),
        "scales": Codes(16, (Bits(0, 1, 16, 0, 4),)),
        "mins": Codes(16, (Bits(0, 1, 16, 4, 4),)),
        "codes": Codes(256, _planes(16, 64, 2, 32)),
    },
    "Q3_K": {
        "d": Half(108),
        "scales": Codes(16, _planes(96, 8, 4, 8) + _planes(104, 4, 2, 4, shift=4)),
        "codes": Codes(256, _planes(32, 64, 2, 32) + _planes(0, 32, 1, 32, shift=2)),
    },
    "Q4_K": {
        "d": Half(0),
        "dmin": Half(2),
        **_six_bit_pairs(4),
        "codes": Codes(256, _planes(16, 128, 4, 32)),
    },
    "Q5_K": {
        "d": Half(0),
        "dmin": Half(2),
        **_six_bit_pairs(4),
        "codes": Codes(256, _planes(48, 128, 4, 32) + _planes(16, 32, 1, 32, shift=4)),
    },
    "Q6_K": {
        "d": Half(208),
        "scales": _whole(192, 16, torch.int8),
        "codes": Codes(256, _planes(0, 128, 4, 64) + _planes(128, 64, 2, 32, shift=4)),
    },
    "IQ4_NL": {"d": Half(0), "codes": Codes(32, _planes(2, 16, 4, 16))},
    "IQ4_XS": {
        "d": Half(0),
        "scales": Codes(8, _planes(4, 4, 4, 1) + _planes(2, 2, 2, 1, shift=4)),
        "codes": Codes(256, _planes(8, 128, 4, 16)),
    },
    "MXFP4": {"e": _whole(0, 1), "codes": Codes(32, _planes(1, 16, 4, 16))},
}


def unpack_blocks(type: str, blocks: Tensor) -> dict[str, Tensor]:
    """The fields of blocks of a quantized type, given as uint8 (B, block_bytes).

    Returns:
        By name: `d`, `dmin`, `m` float16 (B,); `e` uint8 (B,); `scales`, `mins` uint8 (B, groups),
        int8 for Q6_K; `codes` uint8 (B, block_size), int8 for Q8_0. All are as stored: no offset is
        taken off.

    Raises:
        SpecError: there is no type of that name.
        ValueError: the type is not a quantized one, or `blocks` has another shape or dtype.
    """
    layout, size = _layout(type), find_type(type).block_bytes
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] != size:
        raise ValueError(
            f"blocks of {type} are torch.uint8 (B, {size}), not {blocks.dtype} "
            f"{tuple(blocks.shape)}"
        )
    return {name: _unpack_field(field, blocks) for name, field in layout.items()}


def pack_blocks(type: str, fields: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `unpack_blocks`: uint8 (B, block_bytes).

    Raises:
        SpecError: there is no type of that name.
        ValueError: the type is not a quantized one, a field is missing or unknown, has another
            shape or dtype than `unpack_blocks` returns, or holds a number that does not fit.
    """
    layout = _layout(type)
    if fields.keys() != layout.keys():
        raise ValueError(
            f"blocks of {type} have the fields {', '.join(layout)}; given were {', '.join(fields)}"
        )
    count = len(fields["codes"])
    blocks = torch.zeros(
        count, find_type(type).block_bytes, dtype=torch.uint8, device=fields["codes"].device
    )
    for name, field in layout.items():
        _check_field(type, name, field, fields[name], count)
        _pack_field(field, fields[name], blocks)
    return blocks


def _unpack_field(field: Half | Codes, blocks: Tensor) -> Tensor:
    if isinstance(field, Half):
        # A copy, because the bytes need not be aligned for float16.
        stored = blocks[:, field.offset : field.offset + 2].clone(
            memory_format=torch.contiguous_format
        )
        return stored.view(torch.float16).view(-1)
    numbers = torch.empty(len(blocks), field.count, dtype=torch.uint8, device=blocks.device)
    covered = 0
    for part in field.parts:
        source, target = _bytes(part, blocks), _elements(part, numbers)
        # The parts with the lowest bits come first and cover all elements, so they may overwrite.
        if covered < field.count:
            _moved(source, part.bits, part.low, part.shift, out=target)
        else:
            target.bitwise_or_(_moved(source, part.bits, part.low, part.shift))
        covered += part.runs * part.width
    return (numbers.view(-1) if field.count == 1 else numbers).view(field.dtype)


def _pack_field(field: Half | Codes, values: Tensor, blocks: Tensor) -> None:
    """Put one field into blocks whose bits of that field are zero."""
    if isinstance(field, Half):
        stored = values.contiguous().view(torch.uint8).view(-1, 2)
        blocks[:, field.offset : field.offset + 2] = stored
        return
    numbers = values.contiguous().view(torch.uint8).view(-1, field.count)
    for part in field.parts:
        moved = _moved(_elements(part, numbers), part.bits, part.shift, part.low)
        _bytes(part, blocks).bitwise_or_(moved)


def _moved(numbers: Tensor, bits: int, start: int, end: int, out: Tensor | None = None) -> Tensor:
    """uint8 numbers of which only `bits` bits are left, moved from bit `start` to bit `end`."""
    mask, step = (2**bits - 1) << start, end - start
    if step == 0:
        return torch.bitwise_and(numbers, mask, out=out)
    # Moving the highest bits all the way down drops the others without a mask.
    masked = numbers if start + bits == 8 and end == 0 else numbers & mask
    if step > 0:
        return torch.bitwise_left_shift(masked, step, out=out)
    return torch.bitwise_right_shift(masked, -step, out=out)


def _bytes(part: Bits, blocks: Tensor) -> Tensor:
    """A view of the bytes that a part lies in: (B, runs, width)."""
    stretch = blocks[:, part.offset : part.offset + part.runs * part.width]
    return stretch.view(len(blocks), part.runs, part.width)


def _elements(part: Bits, numbers: Tensor) -> Tensor:
    """A view of the elements that a part belongs to: (B, runs, width)."""
    parts = numbers.view(len(numbers), part.runs, numbers.shape[1] // part.runs)
    return parts[:, :, part.first : part.first + part.width]


def _layout(type: str) -> Layout:
    name = find_type(type).name
    if name not in LAYOUTS:
        raise ValueError(f"{name} is not a quantized type, so it has no blocks")
    return LAYOUTS[name]


def _check_field(type: str, name: str, field: Half | Codes, values: Tensor, count: int) -> None:
    dtype, shape = torch.float16, torch.Size([count])
    if isinstance(field, Codes):
        dtype = field.dtype
        shape = shape if field.count == 1 else torch.Size([count, field.count])
    if values.dtype != dtype or values.shape != shape:
        raise ValueError(
            f"the field {name!r} of {count} blocks of {type} is {dtype} {tuple(shape)}, not "
            f"{values.dtype} {tuple(values.shape)}"
        )
    if isinstance(field, Codes) and values.numel() and field.largest < 255:
        largest = int(values.max())
        if largest > field.largest:
            raise ValueError(
                f"the field {name!r} of {type} holds numbers up to {field.largest}, not {largest}"
            )
