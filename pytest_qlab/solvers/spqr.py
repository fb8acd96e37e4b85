"""SpQR: GPTQ on groups so small that their scales are quantized too, and with outliers left out.

Dettmers et al.: SpQR, ICLR 2024 (arXiv 2306.03078), as the reference code Vahe1994/SpQR has it.
Columns are rounded one after the other as with GPTQ. When a group of columns is reached, each of
its weights is left out in turn; those without which the rest of the group would be rounded much
better are likely outliers, and the grid is fitted to the others. A weight whose own error is then
still too large is kept as it is.

H = R R^T is factored as in `solvers/gptq.py`; the paper's U, U^T U = H^-1, is the inverse of R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats.affine import SMALLEST_FLOAT16_SCALE, group_length
from pytest_qlab.formats.bilevel import BilevelAffine
from pytest_qlab.formats.outliers import WithOutliers
from pytest_qlab.solvers.bilevel import (
    RealGrid,
    Rounded,
    fit_range,
    leave_one_out,
    real_codes,
    round_over_rows,
)
from pytest_qlab.solvers.gptq import factor, inverse
from pytest_qlab.solvers.graphs import Graphed

LARGEST_FLOAT16_WEIGHT = 2.0**12  # 16 times less than float16 holds, as updates may enlarge it
UNUSED = 2.0**-10  # the square root of what an unused column counts, the most used being about 1


@dataclass(frozen=True)
class SpqrRule:
    """How a layer is quantized.

    Args:
        bits: width of a weight's code.
        group_size: columns of a group, or -1 for the whole row.
        statistic_bits: width of the code of a scale or zero point.
        statistic_group_size: rows whose scales, and zero points, share a range.
        outlier_threshold: share of the mean squared size of a weight, in terms of the layer's
            output, beyond which an error makes an outlier; infinite for none.
        leave_one_out: fit grids without likely outliers.
        dtype: of ranges of scales and of outliers; None for float16 where it holds them, else
            float32. With float64, nothing is rounded to be stored, ranges of zero points neither.
    """

    bits: int = 3
    group_size: int = 16
    statistic_bits: int = 3
    statistic_group_size: int = 16
    outlier_threshold: float = 0.2
    leave_one_out: bool = True
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class SpqrSolution:
    """What a weight became, columns in their own order.

    Attributes:
        codes: uint8 (m, n), also where an outlier stands in its place.
        scales, zeros: codes (m, G).
        scale_ranges, zero_ranges: (2, C, G), least and step, as they are stored.
        column_groups: int64 (n,), the group of each column, or None if they are consecutive.
        outliers: bool (m, n).
        weight: (m, n), what all of it stands for.
        loss: tr((W - Q) H (W - Q)^T) with the damped H; dead columns of W count as zero.
        damp_percent: the damping with which H could be factored.
    """

    rule: SpqrRule
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scale_ranges: Tensor
    zero_ranges: Tensor
    column_groups: Tensor | None
    outliers: Tensor
    weight: Tensor
    loss: float
    damp_percent: float

    def pack(self) -> WithOutliers:
        """Lay out the bits."""
        dense = BilevelAffine.pack(
            self.codes,
            self.scales,
            self.zeros,
            self.scale_ranges,
            self.zero_ranges,
            bits=self.rule.bits,
            group_size=self.rule.group_size,
            statistic_bits=self.rule.statistic_bits,
            statistic_group_size=self.rule.statistic_group_size,
            column_groups=self.column_groups,
        )
        packed = WithOutliers.pack(dense, self.weight, self.outliers)
        if self.scale_ranges.dtype == torch.float32:
            packed.values = self.weight[self.outliers].to(torch.float32)
        return packed


def spqr_solve(
    weight: Tensor,
    gram: Tensor | None,
    rule: SpqrRule,
    *,
    desc_act: bool = True,
    damp_percent: float = 1.0,
) -> SpqrSolution:
    """Quantize a weight (m, n) against its inputs' Gram matrix (n, n).

    Args:
        weight: float32, or float64 to compute in float64.
        gram: sum of x x^T in any scale; None where no input is known, for which all count alike.
        rule: how it is quantized.
        desc_act: take the columns in the order of falling diag(H); groups are formed in that order.
        damp_percent: share of mean(diag(H)) that is added to diag(H); raised in steps while below 1
            where H cannot be factored.

    Raises:
        NotPositiveDefiniteError: H cannot be factored however it is damped.
    """
    (solution,) = spqr_solve_shared(
        [weight], gram, rule, desc_act=desc_act, damp_percent=damp_percent
    )
    return solution


def spqr_solve_shared(
    weights: Sequence[Tensor],
    gram: Tensor | None,
    rule: SpqrRule,
    *,
    desc_act: bool = True,
    damp_percent: float = 1.0,
) -> list[SpqrSolution]:
    """`spqr_solve` for several weights (m_i, n) with the same inputs, factored once."""
    work = torch.promote_types(weights[0].dtype, torch.float32)
    known = gram if gram is not None else torch.eye(weights[0].shape[1]).to(weights[0].device)
    solver = _Solver(known.to(work), rule, desc_act and gram is not None, damp_percent)
    return [solver.solve(weight.to(work)) for weight in weights]


class _Solver:
    """What all weights that read the same inputs have in common."""

    def __init__(self, gram: Tensor, rule: SpqrRule, desc_act: bool, damp_percent: float) -> None:
        # Only ratios of H matter; a power of two keeps squares within the type's range.
        self.unit = _power_of_two(gram)
        h = gram / self.unit
        self.rule = rule
        self.length = group_length(len(h), rule.group_size)
        diagonal = h.diagonal().clone()
        position = torch.arange(len(h), device=h.device)
        self.order = diagonal.argsort(descending=True, stable=True) if desc_act else position
        self.dead = diagonal == 0
        h.diagonal()[self.dead] = 1
        h = h.index_select(0, self.order).index_select(1, self.order)
        # As in the reference, dead columns do not count in the mean. They are independent of all
        # others, so that their part of the factor can be set afterwards.
        self.r, self.damp_percent = factor(h, damp_percent, diagonal.mean())
        self.r.diagonal()[self.dead[self.order]] = UNUSED
        self.scattered = not torch.equal(self.order, position) and len(h) > self.length

    def solve(self, weight: Tensor) -> SpqrSolution:
        """Quantize one weight (m, n)."""
        unit = _power_of_two(weight)
        # From here on all is transposed, so that a column of W is contiguous.
        scaled = (weight.to(torch.float64) / unit).to(weight.dtype).masked_fill(self.dead, 0)
        w = scaled.index_select(1, self.order).T.contiguous()
        dtype = self.rule.dtype or self._storage(w, unit)
        starts = range(0, len(w), self.length)
        layer = _Layer(w, unit, dtype, self.rule, self.r, self._threshold(w), len(starts))
        for start in starts:
            layer.take(start, min(start + self.length, len(w)))
        back = self.order.argsort()
        length = self.length
        scales, zeros = layer.scales, layer.zeros
        return SpqrSolution(
            self.rule,
            layer.codes.T.index_select(1, back),
            torch.stack([each.codes for each in scales], 1),
            torch.stack([each.codes for each in zeros], 1),
            torch.stack([each.ranges for each in scales], 2),
            torch.stack([each.ranges for each in zeros], 2),
            back // length if self.scattered else None,
            layer.outliers.T.index_select(1, back),
            (layer.made.to(torch.float64) * unit).T.index_select(1, back).to(weight.dtype),
            float(layer.loss) * unit**2 * self.unit,
            self.damp_percent,
        )

    def _threshold(self, w: Tensor) -> float:
        """What a squared error, in terms of the output, is compared with."""
        if math.isinf(self.rule.outlier_threshold):
            return math.inf
        # A single row has no variance: the mean square takes its place.
        spread = w.var(1) if w.shape[1] > 1 else w.square().mean(1)
        size = float((spread * self.r.diagonal().square()).mean())
        return self.rule.outlier_threshold * size

    def _storage(self, w: Tensor, unit: float) -> torch.dtype:
        """float16 unless scales or weights do not survive it."""
        groups = torch.split(w, self.length)
        scales = torch.stack(
            [fit_range(g.amin(0), g.amax(0), self.rule.bits).scale for g in groups]
        )
        used = scales[scales > 0]
        smallest = float(used.amin()) * unit if len(used) else 1.0
        fits = smallest >= SMALLEST_FLOAT16_SCALE and float(w.abs().amax()) * unit <= (
            LARGEST_FLOAT16_WEIGHT
        )
        return torch.float16 if fits else torch.float32


def _power_of_two(values: Tensor) -> float:
    """A power of two, the largest magnitude over which is 1/2 to 1; 1 for zeros."""
    return math.ldexp(1, math.frexp(float(values.abs().amax()))[1])


class _Layer:
    """One weight while its columns are taken; all tensors are (n, m), in the order of taking."""

    def __init__(
        self,
        w: Tensor,
        unit: float,
        dtype: torch.dtype,
        rule: SpqrRule,
        r: Tensor,
        threshold: float,
        groups: int,
    ) -> None:
        self.w, self.unit, self.dtype, self.rule, self.r = w, unit, dtype, rule, r
        self.threshold = threshold
        self.codes = torch.empty_like(w, dtype=torch.uint8)
        self.outliers = torch.zeros_like(w, dtype=torch.bool)
        self.made = torch.empty_like(w)
        self.delta = torch.zeros_like(w)  # W - Q
        self.scales: list[Rounded] = []
        self.zeros: list[Rounded] = []
        self.loss = torch.zeros((), dtype=torch.float64, device=w.device)
        self._take = Graphed(self._walk, w.device, groups)

    def take(self, start: int, stop: int) -> None:
        """Fit the grids of a group of columns and round it."""
        r, group = self.r[start:stop, start:stop], slice(start, stop)
        u = inverse(r)
        # The weights as all columns before have left them.
        now = self.w[group] + u.T @ (self.r[:start, group].T @ self.delta[:start])
        grid = self._fit(now, r.diagonal())
        codes, outliers, made, loss = self._take(now, r.diagonal(), u, grid.scale, grid.zero)
        self.codes[group], self.outliers[group], self.made[group] = codes, outliers, made
        torch.sub(self.w[group], made, out=self.delta[group])
        self.loss += loss

    def _walk(
        self, now: Tensor, spread: Tensor, u: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Round the columns of a group, one after the other.

        Args:
            now: (k, m), the weights as all columns before have left them; updated in place.
            spread: (k,), the diagonal of R.
            u: (k, k), the inverse of R's block.
            scale, zero: (m,), the group's grids.

        Returns:
            codes, whether an outlier, and what each weight has become, all (k, m); the loss.
        """
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        loss = torch.zeros_like(self.loss)
        grid, none = RealGrid(scale, zero), torch.zeros_like(scale, dtype=torch.bool)
        for i, current in enumerate(now):
            codes = real_codes(current, grid, self.rule.bits)
            made, kept = (codes - zero).mul_(scale), none
            error = (current - made) * spread[i]
            if self.threshold < math.inf:
                kept = error.square() > self.threshold
                made = torch.where(kept, self._stored(current), made)
                error = (current - made) * spread[i]
            loss += error.square().sum(dtype=torch.float64)
            columns.append((codes.to(torch.uint8), kept, made))
            now[i + 1 :].addr_(u[i, i + 1 :], error, alpha=-1)
        codes, outliers, made = (torch.stack(each) for each in zip(*columns, strict=True))
        return codes, outliers, made, loss

    def _fit(self, now: Tensor, importance: Tensor) -> RealGrid:
        rule = self.rule
        if rule.leave_one_out and self.threshold < math.inf:
            likely = leave_one_out(now, importance, rule.bits) > self.threshold
            others = (~likely).to(now.dtype)
            mean = (now * others).sum(0) / others.sum(0).clamp(min=1)
            now = torch.where(likely, mean, now)
        grid = fit_range(now.amin(0), now.amax(0), rule.bits)
        width, shared = rule.statistic_bits, rule.statistic_group_size
        narrow = torch.float16 if self.dtype != torch.float64 else self.dtype
        self.scales.append(round_over_rows(grid.scale, width, shared, self.dtype, self.unit))
        self.zeros.append(round_over_rows(grid.zero, width, shared, narrow))
        return RealGrid(self.scales[-1].values, self.zeros[-1].values)

    def _stored(self, values: Tensor) -> Tensor:
        """Outliers as they are stored."""
        edge = torch.finfo(self.dtype).max
        stored = (values * self.unit).clamp_(-edge, edge).to(self.dtype)
        return stored.to(values.dtype) / self.unit
