"""GPTQ: codes for one layer, chosen column by column, each error made good by the columns after it.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023 (arXiv 2210.17323), Algorithm 1, with the
options of the reference code IST-DASLab/gptq (act-order, static groups). Minimizes
tr((W - Q) H (W - Q)^T), H = X^T X of the layer's inputs X, damped.

The paper needs U, the upper Cholesky factor of the inverse: U^T U = H^-1. Here H itself is
factored, from its last column backwards: H = R R^T with R upper triangular. Then U = R^-1, and what
the paper has subtracted from column j when it reaches it is (W - Q)_<j R_<j,j / R_jj: the same
numbers from one Cholesky factorization, without any inverse (the form known as LDLQ; Chee et al.,
QuIP, arXiv 2307.13304, prove the equivalence). Only a grid that is fitted on the way needs U's
blocks, the inverses of R's, because the reference fits it to weights as they are between columns.

Nearly all of the time is in matrix products: a few columns at a time take over what all blocks
before contribute in one product, so that a single column only meets the others of its few. On a
GPU the operations of a block are launched as one graph.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_qlab.formats.affine import group_length
from pytest_qlab.solvers.graphs import Graphed
from pytest_qlab.solvers.grid import AffineCodes, Grid, GridRule, grouped

SMALLEST_DAMP_STEP = 0.01
STEP = 32
# Two threads that walk over few rows fight for the interpreter after each operation, and both take
# longer than one after the other.
FEW_ROWS = 2048
_turn = threading.Lock()


class NotPositiveDefiniteError(ArithmeticError):
    """A Gram matrix that cannot be factored, however it is damped."""


@dataclass(frozen=True)
class GptqSolution:
    """Codes in the weight's own column order, and how they were reached.

    Attributes:
        loss: sum over weights of the reference's (w - q)^2 / (2 U_jj^2), which equals half of
            tr((W - Q) H (W - Q)^T) with the damped H; dead columns of W count as zero.
        damp_percent: the damping with which H could be factored.
    """

    quantized: AffineCodes
    loss: float
    damp_percent: float


def gptq_solve(
    weight: Tensor,
    gram: Tensor,
    rule: GridRule,
    *,
    group_size: int = -1,
    desc_act: bool = False,
    static_groups: bool = False,
    damp_percent: float = 0.01,
    block_size: int = 128,
) -> GptqSolution:
    """Quantize a weight against its inputs' Gram matrix.

    Args:
        weight: (m, n), float32, or float64 to compute in float64.
        gram: (n, n), sum of x x^T in any scale.
        rule: how grids are fitted.
        group_size: columns of a group, or -1 for the whole row.
        desc_act: take the columns in the order of falling diag(H) instead of their own.
        static_groups: fit the grids beforehand, to groups of columns that are neighbours in the
            weight. Otherwise a group is made of columns that follow each other in the order they
            are taken in, and its grid is fitted when its first column is reached.
        damp_percent: share of mean(diag(H)) that is added to diag(H); raised in steps up to 1 where
            H cannot be factored.
        block_size: columns between two updates of the rest. It changes rounding errors only, except
            for groups that are not static: see below.

    Raises:
        NotPositiveDefiniteError: H cannot be factored however it is damped.
    """
    (solution,) = gptq_solve_shared(
        [weight],
        gram,
        rule,
        group_size=group_size,
        desc_act=desc_act,
        static_groups=static_groups,
        damp_percent=damp_percent,
        block_size=block_size,
    )
    return solution


def gptq_solve_shared(
    weights: Sequence[Tensor],
    gram: Tensor,
    rule: GridRule,
    *,
    group_size: int = -1,
    desc_act: bool = False,
    static_groups: bool = False,
    damp_percent: float = 0.01,
    block_size: int = 128,
) -> list[GptqSolution]:
    """`gptq_solve` for several weights (m_i, n) whose inputs are the same, in one go.

    Rows do not know of each other, so that the weights can be stacked: one factorization, one walk
    over the columns. Their codes are those of each alone, but for rounding errors of the products.
    """
    work = torch.promote_types(weights[0].dtype, torch.float32)
    rules = [rule.resolved(weight.to(work), group_size) for weight in weights]
    if any(each != rules[0] for each in rules):  # scales of different types cannot be stacked
        stacks = [[index] for index in range(len(weights))]
    else:
        stacks = [list(range(len(weights)))]
    solver = _Solver(gram.to(work), group_size, desc_act, static_groups, damp_percent, block_size)
    return [
        solution
        for stack in stacks
        for solution in solver.solve([weights[index].to(work) for index in stack], rules[stack[0]])
    ]


class _Solver:
    """What all weights that read the same inputs have in common."""

    def __init__(
        self,
        gram: Tensor,
        group_size: int,
        desc_act: bool,
        static_groups: bool,
        damp_percent: float,
        block_size: int,
    ) -> None:
        h = gram.clone()
        columns = len(h)
        self.group_size, self.block_size = group_size, block_size
        self.length = group_length(columns, group_size)
        self.dead = h.diagonal() == 0
        h.diagonal()[self.dead] = 1
        position = torch.arange(columns, device=h.device)
        self.order = h.diagonal().argsort(descending=True, stable=True) if desc_act else position
        ordered = h.index_select(0, self.order).index_select(1, self.order)
        self.r, self.damp_percent = factor(ordered, damp_percent)
        self.feedback = (self.r / self.r.diagonal()).T.contiguous()
        self.fitted_before = static_groups or group_size == -1
        self.groups = (self.order if self.fitted_before else position) // self.length
        self.scattered = desc_act and not self.fitted_before and columns > self.length

    def solve(self, weights: Sequence[Tensor], rule: GridRule) -> list[GptqSolution]:
        w = torch.cat(list(weights))
        # As in the reference: grids of whole rows are fitted before dead columns are cleared.
        cleared = w.masked_fill(self.dead, 0)
        grid = rule.fit(grouped(w if self.group_size == -1 else cleared, self.group_size))
        # From here on all is transposed, so that a column of W is contiguous.
        w = cleared.index_select(1, self.order).T.contiguous()
        grid = Grid(grid.scale.T.contiguous(), grid.zero.T.contiguous())
        codes = torch.empty_like(w, dtype=torch.uint8)
        delta = torch.zeros_like(w)  # W - Q
        losses = torch.zeros(w.shape[1], dtype=torch.float64, device=w.device)
        starts = range(0, len(w), self.block_size)
        take = Graphed(walk, w.device, len(starts))
        turn = _turn if w.shape[1] <= FEW_ROWS and not w.is_cuda else nullcontext()
        for start in starts:
            stop = min(start + self.block_size, len(w))
            if not self.fitted_before:
                self._fit_groups(start, stop, w, delta, grid, rule)
            of_column = self.groups[start:stop]
            scale, zero = grid.scale[of_column].to(w.dtype), grid.zero[of_column]
            reached = w[start:stop] + self.feedback[start:stop, :start] @ delta[:start]
            # Steps are whole numbers from the zero point, whose bounds are those of the codes.
            low, high = -zero, 2**rule.bits - 1 - zero
            feedback = self.feedback[start:stop, start:stop]
            with turn:
                taken = take(feedback, reached, w[start:stop], scale, low, high)
            steps, delta[start:stop], reached = taken
            codes[start:stop] = steps + zero
            errors = reached - steps * scale
            losses += (errors * self.r.diagonal()[start:stop, None]).square().sum(0)
        back = self.order.argsort()
        whole = AffineCodes(
            codes.index_select(0, back).T.contiguous(),
            Grid(grid.scale.T.contiguous(), grid.zero.T.contiguous()),
            rule,
            self.group_size,
            self.groups[back] if self.scattered else None,
        )
        rows = [len(weight) for weight in weights]
        solutions = []
        for codes, scale, zero, loss in zip(
            *(torch.split(each, rows) for each in (whole.codes, *whole.grid, losses)), strict=True
        ):
            found = replace(whole, codes=codes, grid=Grid(scale, zero))
            solutions.append(GptqSolution(found, 0.5 * float(loss.sum()), self.damp_percent))
        return solutions

    def _fit_groups(
        self, start: int, stop: int, w: Tensor, delta: Tensor, grid: Grid, rule: GridRule
    ) -> None:
        """Fit the grids of the groups that begin in a block.

        The reference's rule: they see the updates by all blocks before, but not those by earlier
        columns of the same block.
        """
        begins = range(-(-start // self.length) * self.length, stop, self.length)
        if not begins:
            return
        reach = min(begins[-1] + self.length, len(w))
        u = inverse(self.r[start:reach, start:reach])
        seen = w[start:reach] + u.T @ (self.r[:start, start:reach].T @ delta[:start])
        for j in begins:
            group = j // self.length
            grid.scale[group], grid.zero[group] = rule.fit(
                seen[j - start : j - start + self.length].T
            )


def walk(
    feedback: Tensor, reached: Tensor, w: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of a block, one after the other; tensors are (columns, m).

    Args:
        feedback: (columns, columns): row j what the errors of others add to column j.
        reached: the weights after the updates of all blocks before; those of the columns before
            in the same block are added to it, in place.
        w: the weights themselves.
        scale: of each weight.
        low, high: the least and the greatest step of each weight.

    Returns:
        each weight's steps from its zero point, whole numbers; W - Q; `reached`.
    """
    steps, delta = torch.empty_like(reached), torch.zeros_like(w)
    for first in range(0, len(w), STEP):
        few = slice(first, first + STEP)
        reached[few].addmm_(feedback[few, :first], delta[:first])
        known = delta[few].T  # zeros for columns that are still to come
        # Five operations a column, all in place: what they cost is the time it takes to start
        # them. The views they work on are made beforehand.
        columns = reached[few].unbind(), feedback[few, few].unbind(), scale[few].unbind()
        made = steps[few].unbind(), w[few].unbind(), delta[few].unbind()
        for column, before, unit, least, most, step, weight, error in zip(
            *columns, low[few].unbind(), high[few].unbind(), *made, strict=True
        ):
            column.addmv_(known, before)
            torch.div(column, unit, out=step).round_()
            torch.clamp(step, least, most, out=step)
            torch.addcmul(weight, step, unit, value=-1, out=error)
    return steps, delta, reached


def factor(h: Tensor, damp_percent: float, mean: Tensor | None = None) -> tuple[Tensor, float]:
    """Upper triangular R with R R^T = H + damping, and the damping it took.

    The retry is that of ModelCloud/GPTQModel: more damping, a step at a time, while it is below 1.

    Args:
        h: (n, n), symmetric.
        damp_percent: the first share of `mean` that is added to the diagonal.
        mean: what damping is a share of; that of the diagonal if None.

    Raises:
        NotPositiveDefiniteError: H cannot be factored however it is damped.
    """
    mean = h.diagonal().mean() if mean is None else mean
    step = max(damp_percent, SMALLEST_DAMP_STEP)
    while True:
        damped = h.clone()
        damped.diagonal().add_(damp_percent * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        # Numbers that overflow give infinities or NaN without being reported; whatever is in a row
        # is in its diagonal.
        if not failed and bool(lower.diagonal().isfinite().all()):
            return lower.flip(0, 1), damp_percent
        damp_percent += step
        if damp_percent >= 1:
            raise NotPositiveDefiniteError("the Gram matrix is not positive definite")


def inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    result: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return result
