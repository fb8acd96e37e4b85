"""4-bit group-affine weights through torch's packed int4 matmuls, in bfloat16.

The operators multiply by `(code - 8) * scale + shift` with scale and shift in bfloat16. From
`(code - zero) * scale` the shift is `(8 - zero) * scale`, of the scale as it was rounded, so that
weights near zero stay near zero. Nothing but these two roundings is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytest_qlab.formats.affine import AffineGroups, group_length
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import CrossedLinear, has_operator

GROUPS = (32, 64, 128, 256)
MIDDLE = 8
PIECE_ELEMENTS = 2**19
"""Weights that are packed at a time."""
TILE_ROWS, TILE_ELEMENTS = 512, 2**21
"""Rows that are dequantized at a time: so many, or all that have so many weights, if more.

Fewer make the product slow, and small layers wait for operations to start. Codes, bytes and
bfloat16 take 3.5 bytes for each weight.
"""
LAYOUTS = ((64, False), (32, False), (64, True), (32, True))
"""Rows in a block, and whether a byte holds neighbouring rows, not those half a block apart.

Which one the operator uses depends on the processor, so it is found by trying."""


def pack_cpu(codes: Tensor) -> Tensor:
    """int32 codes (m, n) in the order that the CPU kernel reads: uint8 (m, n / 2)."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def multiply_cpu(rows: Tensor, packed: Tensor, group: int, scales_and_shifts: Tensor) -> Tensor:
    """The kernel on bfloat16 rows; 30 times slower in any other type, so never call it in one."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, packed, group, scales_and_shifts
    )
    return product


def pack_cuda(pairs: Tensor, inner_tiles: int) -> Tensor:
    """uint8 (m, n / 2), the first of two codes in the high half, in the CUDA kernel's order."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles)
    return packed


def multiply_cuda(rows: Tensor, packed: Tensor, group: int, scales_and_shifts: Tensor) -> Tensor:
    """The kernel on bfloat16 rows."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm(rows, packed, group, scales_and_shifts)
    return product


class Int4Linear(CrossedLinear):
    """What both devices share: scales and shifts, and the order of the columns.

    Groups of scattered columns (act-order) are taken by sorting the columns by their group, and
    the inputs with them.
    """

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = _affine(source)
        self.group = group_length(self.in_features, weight.group_size)
        scales = weight.scales.to(torch.bfloat16)
        shifts = ((MIDDLE - weight.zeros().to(torch.float32)) * scales).to(torch.bfloat16)
        self.scales_and_shifts: Tensor
        self.register_buffer(
            "scales_and_shifts", torch.stack([scales.t(), shifts.t()], dim=-1).contiguous()
        )
        self.columns: Tensor | None
        self.register_buffer("columns", None)
        if weight.column_groups is not None:
            self.columns = weight.column_groups.sort(stable=True).indices

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        return _is_affine(source, 4) and source.activation is None

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        weight = _affine(source)
        columns = source.in_features
        length = group_length(columns, weight.group_size)
        if length not in GROUPS or columns % length:
            return f"{cls.kernel} takes whole groups of {', '.join(map(str, GROUPS))} columns only"
        if weight.column_groups is not None:
            counts = torch.bincount(weight.column_groups, minlength=weight.scales.shape[1])
            if bool((counts != length).any()):
                return f"{cls.kernel} takes groups of equal size only"
        return ""

    @property
    def crossover_key(self) -> tuple[object, ...]:
        return (*super().crossover_key, self.group, self.columns is None)

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self.columns is None else rows.index_select(1, self.columns)


class Int4CpuLinear(Int4Linear):
    """`_weight_int4pack_mm_for_cpu` for few rows; tiles of its own bits for more."""

    kernel: ClassVar[str] = "int4pack"

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        self.packed: Tensor
        self.register_buffer(
            "packed", torch.empty(self.out_features, self.in_features // 2, dtype=torch.uint8)
        )
        layouts = list(LAYOUTS)
        for start, stop in self._pieces():
            codes = self._sorted(_affine(source).take_rows(torch.arange(start, stop)).codes())
            self.packed[start:stop] = pack_cpu(codes.to(torch.int32))
            layouts = [
                each for each in layouts if torch.equal(self._codes(start, stop, *each), codes)
            ]
        if not layouts:
            raise RuntimeError("the order of its packed codes is not known for this processor")
        self.block, self.neighbours = layouts[0]

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        known = has_operator("aten", "_weight_int4pack_mm_for_cpu")
        return super().applies(source) and _device(source) == "cpu" and known

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        if source.out_features % 16:
            return f"{cls.kernel} takes multiples of 16 outputs only"
        return super().refusal(source)

    def packed_multiply(self, rows: Tensor) -> Tensor:
        rows = self._sorted(rows).to(torch.bfloat16).contiguous()
        return multiply_cpu(rows, self.packed, self.group, self.scales_and_shifts)

    def dense_multiply(self, rows: Tensor) -> Tensor:
        rows = self._sorted(rows)
        product = rows.new_empty(len(rows), self.out_features)
        for part, weights in self._parts(product, rows.dtype):
            part.copy_((rows @ weights).view(part.shape))
        return product

    def dequantized(self) -> Tensor:
        weight = torch.empty(
            self.out_features, self.in_features, device=self.packed.device, dtype=torch.float32
        )
        for part, weights in self._parts(weight.t(), torch.float32):
            part.copy_(weights.view(part.shape))
        if self.columns is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.columns, weight)
        return weight

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """First row and end of what is packed at a time: whole blocks, and not much memory."""
        block = max(rows for rows, _ in LAYOUTS)
        step = max(1, PIECE_ELEMENTS // (block * self.in_features)) * block
        for start in range(0, self.out_features, step):
            yield start, min(start + step, self.out_features)

    @property
    def _tile_rows(self) -> int:
        """Rows of a tile: whole blocks."""
        block = max(rows for rows, _ in LAYOUTS)
        return max(TILE_ROWS, TILE_ELEMENTS // self.in_features // block * block)

    def _tiles(self) -> Iterator[tuple[int, int, int, bool]]:
        """First row, end, rows of a block, and whether its bytes hold neighbours."""
        whole = self.out_features // self.block * self.block
        for start in range(0, whole, self._tile_rows):
            yield start, min(start + self._tile_rows, whole), self.block, self.neighbours
        if whole < self.out_features:  # a shorter block is always in pairs
            yield whole, self.out_features, self.out_features - whole, True

    def _bytes(self, start: int, stop: int, block: int) -> Tensor:
        """uint8 (n, blocks, block / 2)."""
        return self.packed[start:stop].view(-1, self.in_features, block // 2).transpose(0, 1)

    def _codes(self, start: int, stop: int, block: int, neighbours: bool) -> Tensor:
        """uint8 (stop - start, n), columns sorted, if that is the layout."""
        codes = torch.empty(stop - start, self.in_features, dtype=torch.uint8)
        whole = stop // block * block
        for first, last, rows, pairs in (
            (start, whole, block, neighbours),
            (whole, stop, stop - whole, True),
        ):
            if first < last:
                packed = self._bytes(first, last, rows)
                ordered = _halves(codes[first - start : last - start].t(), rows, pairs)
                ordered.copy_(torch.stack([packed & 15, packed >> 4], 1))
        return codes

    def _parts(self, whole: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of whole (k, m), each with the weights (n, columns) that belong to it, transposed.

        They are a tile's, and the next ones overwrite them. With its top bit flipped, a code in the
        upper half of a signed byte is 16 * (code - 8).
        """
        most = min(self._tile_rows, self.out_features)
        space = torch.empty(self.in_features * most, dtype=dtype)
        for start, stop, block, neighbours in self._tiles():
            rows = stop - start
            signed = self._bytes(start, stop, block).reshape(self.in_features, -1) ^ 0x88
            weights = space[: self.in_features * rows].view(self.in_features, 2, -1)
            weights[:, 0] = (signed << 4).view(torch.int8)
            weights[:, 1] = (signed & 0xF0).view(torch.int8)
            scale, shift = (
                _halves(each, block, neighbours).reshape(len(each), 1, rows).to(dtype)
                for each in self.scales_and_shifts[:, start:stop].unbind(-1)
            )
            grouped = weights.view(-1, self.group, rows)
            torch.addcmul(shift, grouped, scale / 16, out=grouped)
            yield _halves(whole[:, start:stop], block, neighbours), weights.flatten(1)


class Int4CudaLinear(Int4Linear):
    """`_weight_int4pack_mm` for few rows.

    For more, the format's own bits are dequantized; they are kept beside the kernel's, and counted,
    since the kernel's order is not documented.
    """

    kernel: ClassVar[str] = "int4pack-cuda"
    inner_tiles: ClassVar[int] = 8

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        codes = _affine(source).codes()
        if self.columns is not None:
            codes = codes.index_select(1, self.columns)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        self.packed: Tensor
        self.register_buffer("packed", pack_cuda(pairs, self.inner_tiles))
        self.source = source

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        return super().applies(source) and _device(source) == "cuda"

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        if source.out_features % 8 or source.in_features % (16 * cls.inner_tiles):
            return f"{cls.kernel} takes multiples of 8 outputs and {16 * cls.inner_tiles} inputs"
        return super().refusal(source)

    def packed_multiply(self, rows: Tensor) -> Tensor:
        rows = self._sorted(rows).to(torch.bfloat16).contiguous()
        return multiply_cuda(rows, self.packed, self.group, self.scales_and_shifts)

    def dense_multiply(self, rows: Tensor) -> Tensor:
        return rows @ self.source.weight.t()

    def dequantized(self) -> Tensor:
        codes = _affine(self.source).codes().to(torch.float32) - MIDDLE
        scales, shifts = self.scales_and_shifts.to(torch.float32).unbind(-1)
        groups = _affine(self.source).column_groups
        if groups is None:
            groups = torch.arange(self.in_features, device=codes.device) // self.group
        return codes * scales.t()[:, groups] + shifts.t()[:, groups]


def _affine(source: PackedLinear) -> AffineGroups:
    weight = source.packed
    assert isinstance(weight, AffineGroups)
    return weight


def _is_affine(source: PackedLinear, bits: int) -> bool:
    described: dict[str, Any] = source.metadata
    return bool(described["format"] == AffineGroups.format and described["bits"] == bits)


def _device(source: PackedLinear) -> str:
    return source.device.type


def _halves(tile: Tensor, block: int, neighbours: bool) -> Tensor:
    """A view of (k, rows) as (k, 2, blocks, block / 2): rows in low halves of bytes, then high."""
    if neighbours:
        return torch.unflatten(tile, 1, (-1, block // 2, 2)).permute(0, 3, 1, 2)
    return torch.unflatten(tile, 1, (-1, 2, block // 2)).transpose(1, 2)
