"""8-bit weights with one scale a row, and floating-point inputs: torch's packed int8 matmul."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from pytest_qlab.formats.affine import AffineGroups
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import CrossedLinear, has_operator

TILE_ELEMENTS = 2**20
MIDDLE = 128


def multiply(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The kernel: bfloat16 rows (k, n), int8 codes (m, n), bfloat16 scales (m,)."""
    product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, codes, scales)
    return product


def signed_codes(weight: AffineGroups) -> Tensor:
    """Codes of a symmetric 8-bit grid as int8 (m, n), around 0."""
    return (weight.codes() ^ MIDDLE).view(torch.int8)


def row_grid_refusal(weight: AffineGroups, kernel: str) -> str:
    """Why a kernel that knows one scale a row and no zero points cannot take a weight; or empty."""
    if weight.scales.shape[1] != 1:
        return f"{kernel} takes one scale for each row only"
    if not weight.symmetric:
        return f"{kernel} takes no zero points"
    return ""


class Int8Linear(CrossedLinear):
    """`_weight_int8pack_mm` for few rows; tiles of its codes in the inputs' type for more."""

    kernel: ClassVar[str] = "int8pack"

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = source.packed
        assert isinstance(weight, AffineGroups)
        self.codes: Tensor
        self.register_buffer("codes", signed_codes(weight))
        self.scales: Tensor
        self.register_buffer("scales", weight.scales.flatten().to(torch.bfloat16))

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        described = source.metadata
        return (
            described["format"] == AffineGroups.format
            and described["bits"] == 8
            and source.activation is None
            and source.device.type == "cpu"
            and has_operator("aten", "_weight_int8pack_mm")
        )

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        weight = source.packed
        assert isinstance(weight, AffineGroups)
        if source.in_features % 32:  # it reads beyond the end of other rows, and may crash
            return f"{cls.kernel} takes multiples of 32 inputs only"
        return row_grid_refusal(weight, cls.kernel)

    def packed_multiply(self, rows: Tensor) -> Tensor:
        return multiply(rows.to(torch.bfloat16).contiguous(), self.codes, self.scales)

    def dense_multiply(self, rows: Tensor) -> Tensor:
        # Whole numbers up to 128 are exact in bfloat16 and float16; scales come after.
        product = rows.new_empty(len(rows), self.out_features)
        step = max(16, TILE_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, step):
            tile = self.codes[start : start + step].to(rows.dtype)
            product[:, start : start + step] = linear(rows, tile)
        return product.mul_(self.scales)

    def dequantized(self) -> Tensor:
        return self.codes.to(torch.float32) * self.scales.to(torch.float32).unsqueeze(1)
