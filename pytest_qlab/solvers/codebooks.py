"""The codebooks that there are, for solvers that work with any: see `solvers/codebook.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats.affine import AffineGroups, group_length
from pytest_qlab.solvers.blockwise import Float4, NormalFloat4
from pytest_qlab.solvers.float4 import Mxfp4, Nvfp4
from pytest_qlab.solvers.float8 import Float8
from pytest_qlab.solvers.grid import AffineCodes, Grid, GridRule, grouped, nearest_codes

__all__ = [
    "Float4",
    "Float8",
    "Mxfp4",
    "NormalFloat4",
    "Nvfp4",
    "UniformGroups",
    "UniformPoints",
]


@dataclass(frozen=True)
class UniformPoints:
    """Affine grids that are settled, one for each row and group of neighbouring columns.

    Args:
        grid: scales and zero points (m, G).
        rule: how they were fitted.
        group_size: columns of a group, or -1 for the whole row.
        length: columns of a full group.
    """

    grid: Grid
    rule: GridRule
    group_size: int
    length: int

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes uint8 (m, k); see `Points.nearest`."""
        return nearest_codes(values, *self._of(columns), self.rule.bits).to(torch.uint8)

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """See `Points.decode`."""
        scale, zero = self._of(columns)
        return (codes.to(torch.float32) - zero) * scale

    def pack(self, codes: Tensor) -> AffineGroups:
        """See `Points.pack`."""
        return AffineCodes(codes, self.grid, self.rule, self.group_size).pack()

    def _of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        groups = columns // self.length
        scale, zero = (each.to(torch.float32).index_select(1, groups) for each in self.grid)
        return scale, zero


@dataclass(frozen=True)
class UniformGroups:
    """The affine grids of `rtn`: evenly spaced points between a group's least and greatest weight.

    Args:
        rule: how a grid is fitted.
        group_size: columns of a group, or -1 for the whole row.
    """

    rule: GridRule
    group_size: int

    def fit(self, weight: Tensor) -> UniformPoints:
        """See `Codebook.fit`."""
        grid = self.rule.fit(grouped(weight, self.group_size))
        length = group_length(weight.shape[1], self.group_size)
        return UniformPoints(grid, self.rule, self.group_size, length)
