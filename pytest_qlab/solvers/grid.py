"""Affine grids by minimum and maximum, and round-to-nearest on them.

The rule is that of the GPTQ reference (IST-DASLab/gptq, quant.py): the range of a group always
contains 0, so that zero weights stay zero, and a group of zeros gets the range -1 .. 1. Two points
differ on purpose. A symmetric grid always spans -max|w| .. max|w|; the reference leaves a group
without negative weights the range 0 .. max|w| around a zero point in the middle, which saturates
all of its upper half. And scales are rounded to the type they are stored in before any code is
chosen, so that codes fit the bits that are packed; the reference rounds them afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.formats.affine import AffineGroups, group_length, scale_storage_dtype

SHRINK_STEPS = 80
SHRINK_STEP = 0.01
SHRINK_NORM = 2.4


class Grid(NamedTuple):
    """Grids `scale * (code - zero)`, one for each group."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class GridRule:
    """How grids are fitted to groups of weights.

    Args:
        bits: width of a code.
        symmetric: zero point 2**(bits - 1) for all groups, instead of one for each.
        mse: shrink each range by the percentage, up to 79, with the least sum of |error|**2.4.
        scale_dtype: the type scales are rounded to; None for the one they will be stored in, which
            is chosen anew for each call of `fit`.
    """

    bits: int
    symmetric: bool = False
    mse: bool = False
    scale_dtype: torch.dtype | None = None

    def fit(self, groups: Tensor) -> Grid:
        """Fit one grid to each group.

        Args:
            groups: (..., g), a group along the last axis. Padding it with zeros changes nothing.

        Returns:
            scales (...) in the type they are stored in; zero points (...), whole numbers.
        """
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        dtype = self.scale_dtype or scale_storage_dtype((high - low) / (2**self.bits - 1))
        best = self._grid(low, high, dtype)
        if not self.mse:
            return best
        least = torch.full_like(low, torch.inf)
        for step in range(SHRINK_STEPS):
            share = 1 - step * SHRINK_STEP
            trial = self._grid(share * low, share * high, dtype)
            scale, zero = (edge.to(groups.dtype).unsqueeze(-1) for edge in trial)
            error = rounded(groups, scale, zero, self.bits).sub_(groups).abs_().pow_(SHRINK_NORM)
            total = error.sum(-1)
            better = total < least
            least = torch.where(better, total, least)
            best = Grid(
                *(torch.where(better, new, old) for new, old in zip(trial, best, strict=True))
            )
        return best

    def resolved(self, weight: Tensor, group_size: int) -> GridRule:
        """The same rule with the scales' type settled by the groups of `weight` (m, n)."""
        if self.scale_dtype is not None:
            return self
        scale = replace(self, mse=False).fit(grouped(weight, group_size)).scale
        return replace(self, scale_dtype=scale.dtype)

    def _grid(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid:
        top = 2**self.bits - 1
        # Kept where the type can represent it: a scale of 0 or infinity would lose the group.
        edges = torch.finfo(dtype)
        tiny = edges.smallest_normal if dtype != torch.float16 else 2.0**-24
        scale = ((high - low) / top).clamp(tiny, edges.max).to(dtype)
        if self.symmetric:
            return Grid(scale, torch.full_like(low, 2 ** (self.bits - 1)))
        return Grid(scale, (-low / scale.to(low.dtype)).round_().clamp_(0, top))


def nearest_codes(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of the grid points nearest to `values`, as whole numbers of the same type."""
    return (values / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def rounded(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The grid points nearest to `values`."""
    return nearest_codes(values, scale, zero, bits).sub_(zero).mul_(scale)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """View (m, n) as (m, G, g); where g does not divide n, the last group is padded with zeros."""
    rows, columns = weight.shape
    length = group_length(columns, group_size)
    return pad(weight, (0, -columns % length)).view(rows, -1, length)


@dataclass(frozen=True)
class AffineCodes:
    """Codes (m, n) with their grids (m, G); `column_groups` (n,) where groups are scattered."""

    codes: Tensor
    grid: Grid
    rule: GridRule
    group_size: int
    column_groups: Tensor | None = None

    def pack(self) -> AffineGroups:
        """Lay out the bits."""
        return AffineGroups.pack(
            self.codes,
            self.grid.scale,
            None if self.rule.symmetric else self.grid.zero,
            bits=self.rule.bits,
            group_size=self.group_size,
            column_groups=self.column_groups,
        )


def round_to_nearest(weight: Tensor, rule: GridRule, group_size: int) -> AffineCodes:
    """Quantize each weight of (m, n) to the nearest point of its group's grid."""
    groups = grouped(weight, group_size)
    grid = rule.fit(groups)
    scale, zero = (edge.to(groups.dtype).unsqueeze(-1) for edge in grid)
    codes = nearest_codes(groups, scale, zero, rule.bits).to(torch.uint8)
    return AffineCodes(codes.flatten(1)[:, : weight.shape[1]], grid, rule, group_size)


def fake_quantize(weight: Tensor, rule: GridRule, group_size: int) -> Tensor:
    """What `round_to_nearest` packs, dequantized, without packing it."""
    groups = grouped(weight, group_size)
    scale, zero = (edge.to(groups.dtype).unsqueeze(-1) for edge in rule.fit(groups))
    return rounded(groups, scale, zero, rule.bits).flatten(1)[:, : weight.shape[1]]
