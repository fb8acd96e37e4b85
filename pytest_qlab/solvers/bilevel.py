"""Grids of SpQR: fitted to small groups, with real zero points, themselves rounded over rows.

The rules are those of the reference code (Vahe1994/SpQR, quant_groups.py and spqr_engine.py), for
groups that are given as columns: (g, m), one group of g weights for each of m rows.

One point differs. The reference gives a group of equal weights the range -1 to 1, and one whose
range is narrow and far from 0 a zero point as large as it takes, which then spoils the zero points
of the rows it is rounded with. Here the range of both is widened to contain 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.formats.bilevel import decode_statistics


class RealGrid(NamedTuple):
    """`scale * (code - zero)` for each row, (m,) both; zero points are real numbers."""

    scale: Tensor
    zero: Tensor


def fit_range(low: Tensor, high: Tensor, bits: int) -> RealGrid:
    """The grid whose first point is `low` and whose last is `high`, for each row.

    A range whose zero point is more than 2**(bits + 3) steps away is widened to contain 0; that of
    zeros only has the scale 0.
    """
    top = 2**bits - 1
    scale = (high - low) / top
    near = low.abs() <= 2 ** (bits + 3) * scale
    low = torch.where(near, low, low.clamp(max=0))
    high = torch.where(near, high, high.clamp(min=0))
    scale = (high - low) / top
    return RealGrid(scale, torch.where(scale > 0, -low / scale, 0))


def real_codes(values: Tensor, grid: RealGrid, bits: int) -> Tensor:
    """Codes nearest to values (..., m), whole numbers of the same type.

    The sum with the zero point is what is rounded, as in the reference.
    """
    smallest = torch.finfo(values.dtype).tiny
    return (values / grid.scale.clamp(min=smallest)).add_(grid.zero).round_().clamp_(0, 2**bits - 1)


def real_points(values: Tensor, grid: RealGrid, bits: int) -> Tensor:
    """The grid points nearest to values (..., m)."""
    return real_codes(values, grid, bits).sub_(grid.zero).mul_(grid.scale)


def leave_one_out(group: Tensor, importance: Tensor, bits: int) -> Tensor:
    """By how much a row's error falls if one weight is taken out of its group, (g, m).

    The error is the sum of (importance * (w - q))^2 over the group on a grid that is fitted to it;
    the weight that is taken out has none, and the grid is fitted to the others. Only taking out the
    least or the greatest weight changes the grid: three grids serve all.

    Args:
        group: (g, m).
        importance: (g,).
        bits: width of a code.
    """

    def errors(grid: RealGrid) -> Tensor:
        return (importance[:, None] * (real_points(group, grid, bits) - group)).square_()

    low, high = group.amin(0), group.amax(0)
    whole = errors(fit_range(low, high, bits))
    total = whole.sum(0)
    if len(group) == 1:
        return whole
    gain = whole.clone()
    for largest in (False, True):
        extremes, at = group.topk(2, 0, largest=largest)
        ends = (low, extremes[1]) if largest else (extremes[1], high)
        others = errors(fit_range(*ends, bits)).scatter_(0, at[:1], 0)
        gain.scatter_(0, at[:1], (total - others.sum(0))[None])
    return gain


@dataclass(frozen=True)
class Rounded:
    """Scales or zero points of one group of columns after rounding.

    Attributes:
        codes: (m,), whole numbers.
        ranges: (2, C), least and step of each group of rows, in the type they are stored in.
        values: (m,), what the codes stand for.
    """

    codes: Tensor
    ranges: Tensor
    values: Tensor


def round_over_rows(
    values: Tensor, bits: int, group_size: int, dtype: torch.dtype, unit: float = 1.0
) -> Rounded:
    """Round the scales or zero points (m,) of `group_size` consecutive rows on a common grid.

    The last rows may be fewer. The grid goes from the least to the greatest; its ends are rounded
    to `dtype`, after they were multiplied by `unit`, before codes are chosen.
    """
    rows = len(values)
    shared = min(group_size, rows)
    filled = pad(values[None], (0, -rows % shared), mode="replicate").view(-1, shared)
    low, high = filled.amin(1), filled.amax(1)
    edge = torch.finfo(dtype).max
    ends = torch.stack([low, (high - low) / (2**bits - 1)]).mul_(unit)
    ranges = ends.clamp_(-edge, edge).to(dtype)
    least, step = ranges.to(values.dtype) / unit
    smallest = torch.finfo(values.dtype).tiny
    codes = ((filled - least[:, None]) / step[:, None].clamp(min=smallest)).round_()
    codes = codes.clamp_(0, 2**bits - 1).flatten()[:rows]
    decoded = decode_statistics(codes[:, None], ranges[..., None], group_size, values.dtype)
    return Rounded(codes, ranges, decoded.squeeze(1) / unit)
