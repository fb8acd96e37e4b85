"""HQQ: real zero points by half-quadratic splitting, from the weights alone.

Badri, Shaji: Half-Quadratic Quantization of Large Machine Learning Models (2023), and the code
mobiusml/hqq (`core/optimize.py`, `optimize_weights_proximal_legacy`, which is its default).
Minimizes the sum of |W - scale * (code - zero)|^p over the zero points: an auxiliary W_e takes the
outliers of the error, by the proximal operator of the l_p norm; the zero point is then the mean of
what is left. The scale is that of the group's range and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pytest_qlab.formats.affine import AffineGroups, group_count, group_length, scale_storage_dtype
from pytest_qlab.solvers.grid import grouped

FINEST = 2.0**10
"""The largest weight in steps of a group's scale. Zero points beyond it are whole numbers in
float16, so that their rounding costs as much as that of codes: finer steps would gain nothing."""


class RealGrid(NamedTuple):
    """Grids `(code - zero) / inverse` of groups, (m, G) each, in the type that is computed in."""

    inverse: Tensor
    zero: Tensor


@dataclass(frozen=True)
class HqqRule:
    """How HQQ fits its grids.

    Args:
        bits: width of a code.
        group_size: columns of a group, or -1 for the whole row.
        optimize: move the zero points; otherwise they are those of the range.
        iterations: the most steps.
        lp_norm: p.
        beta: weight of the constraint that W_e is the error.
    """

    bits: int
    group_size: int
    optimize: bool = True
    iterations: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0

    def solve(self, weight: Tensor) -> RealGrid:
        """The grids of a weight (m, n), before they are rounded to what is stored."""
        groups, inside, counts = _with_counts(weight, self.group_size)
        inverse, zero = self._range(groups, inside)
        if not self.optimize:
            return RealGrid(inverse, zero)
        least = torch.full((), torch.inf, device=weight.device)
        s = inverse.unsqueeze(-1)
        for _ in range(self.iterations):
            z = zero.unsqueeze(-1)
            codes = self._codes(groups, s, z)
            error = (groups - (codes - z) / s).mul_(inside)
            outliers = _shrink(error, self.beta, self.lp_norm)
            zero = (codes - (groups - outliers) * s).mul_(inside).sum(-1) / counts
            # One criterion for the whole matrix; the step that no longer helps is kept, too.
            mean = error.abs_().sum() / weight.numel()
            if not bool(mean < least):
                break
            least = mean
        return RealGrid(inverse, zero)

    def pack(self, weight: Tensor, grid: RealGrid) -> AffineGroups:
        """Round grids to what is stored, then choose the nearest codes."""
        scale = 1 / grid.inverse
        dtype = scale_storage_dtype(scale)
        stored, zeros = scale.to(dtype), grid.zero.to(torch.float16)
        groups = grouped(weight, self.group_size)
        s, z = (each.to(groups.dtype).unsqueeze(-1) for each in (stored, zeros))
        codes = (groups / s + z).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return AffineGroups.pack(
            codes.flatten(1)[:, : weight.shape[1]],
            stored,
            zeros,
            bits=self.bits,
            group_size=self.group_size,
            real_zeros=True,
        )

    def _codes(self, groups: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
        return (groups * inverse + zero).round_().clamp_(0, 2**self.bits - 1)

    def _range(self, groups: Tensor, inside: Tensor) -> RealGrid:
        """From the least weight of each group to its greatest."""
        low = groups.masked_fill(~inside, torch.inf).amin(-1)
        high = groups.masked_fill(~inside, -torch.inf).amax(-1)
        top = 2**self.bits - 1
        # Halves, whose difference cannot overflow.
        inverse = (top / 2) / (high / 2 - low / 2)
        finest = FINEST / torch.maximum(high, -low)
        # The reciprocal is to be a number, too.
        largest = 1 / torch.finfo(torch.float32).tiny
        inverse = torch.minimum(inverse, finest).clamp(max=largest)
        inverse = inverse.masked_fill((low == 0) & (high == 0), 1)
        zero = -low * inverse
        # As the reference does, for 4 bits only.
        return RealGrid(inverse, zero.round() if self.bits == 4 else zero)


def _with_counts(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups (m, G, g), which columns of them are there, bool (G, g), and how many, (G,)."""
    columns = weight.shape[1]
    groups = grouped(weight, group_size)
    length, count = group_length(columns, group_size), group_count(columns, group_size)
    inside = (torch.arange(count * length, device=weight.device) < columns).view(count, length)
    return groups, inside, inside.sum(-1)


def _shrink(error: Tensor, beta: float, lp_norm: float) -> Tensor:
    """The generalized soft threshold: sign(e) max(|e| - |e|^(p - 1) / beta, 0)."""
    size = error.abs()
    # Where the error is 0, the power is infinite, and the difference below 0.
    return error.sign().mul_((size - size.pow(lp_norm - 1) / beta).relu_())
