"""Codebooks for tests of solvers that take any: affine grids of rows, and lists of points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats import PackedWeight, PlainWeight


@dataclass(frozen=True)
class AffinePoints:
    """`scale * (code - zero)`, scales and zero points (m,)."""

    scale: Tensor
    zero: Tensor
    bits: int

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        codes = torch.round(values / self.scale[:, None]) + self.zero[:, None]
        return codes.clamp(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        return self.scale[:, None] * (codes - self.zero[:, None])

    def pack(self, codes: Tensor) -> PackedWeight:
        return PlainWeight(self.decode(codes, torch.arange(codes.shape[1])))


@dataclass(frozen=True)
class ListedPoints:
    """Any points (k,), times a scale of each column (n,)."""

    points: Tensor
    scales: Tensor

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        units = values / self.scales[columns]
        return (units[..., None] - self.points).abs().argmin(-1)

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        return self.points[codes] * self.scales[columns]

    def pack(self, codes: Tensor) -> PackedWeight:
        return PlainWeight(self.decode(codes, torch.arange(codes.shape[1])))
