"""E4M3 numbers under one scale for each row, as a codebook; codes are the 8 bits themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats.float8 import E4M3, ScaledFloat8, row_scales, to_e4m3


@dataclass(frozen=True)
class Float8Points:
    """The points of a matrix (m, n) whose scales are settled.

    Args:
        scales: float32 (m, 1).
    """

    scales: Tensor

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes uint8 (m, k); see `Points.nearest`."""
        return to_e4m3(values / self.scales).view(torch.uint8)

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """See `Points.decode`."""
        return codes.view(E4M3).to(torch.float32) * self.scales

    def pack(self, codes: Tensor) -> ScaledFloat8:
        """See `Points.pack`."""
        return ScaledFloat8(codes.contiguous().view(E4M3), self.scales)


@dataclass(frozen=True)
class Float8:
    """Rows of E4M3 numbers: the largest magnitude of a row becomes 448."""

    def fit(self, weight: Tensor) -> Float8Points:
        """See `Codebook.fit`."""
        return Float8Points(row_scales(weight))
