"""LDLQ for any codebook: columns rounded one after the other, errors fed back to those to come.

Chee et al., QuIP, NeurIPS 2023 (arXiv 2307.13304), section 3: with H = L D L^T, L unit lower
triangular, column j becomes the point nearest to w_j + (W - Q)_{>j} L_{>j,j}, last column first.
They prove that this is GPTQ, which takes the first column first: the order in which columns are
taken is a permutation of H, and all else is the same. It minimizes tr((W - Q) H (W - Q)^T) greedily
and is best among all roundings with linear feedback.

Nearly all of the time is in matrix products, as in `solvers/gptq.py`, whose factorization and
whose scheme of blocks this is; but what a column can become is asked of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pytest_qlab.solvers.codebook import Points
from pytest_qlab.solvers.gptq import STEP, factor
from pytest_qlab.solvers.graphs import Graphed

Order = Literal["first", "last", "active"]
"""Which column is taken first: the first (GPTQ), the last (LDLQ), or that with the most active
inputs (act-order)."""


@dataclass(frozen=True)
class LdlqSolution:
    """Codes in the weight's own column order, and how they were reached.

    Attributes:
        codes: (m, n), of the type that the codebook gives.
        loss: tr((W - Q) H (W - Q)^T) with the damped H, by the columns' errors; dead columns of W
            count as zero.
        damp_percent: the damping with which H could be factored.
    """

    codes: Tensor
    loss: float
    damp_percent: float


def ldlq(
    weight: Tensor,
    gram: Tensor,
    points: Points,
    *,
    order: Order = "first",
    damp_percent: float = 0.01,
    block_size: int = 128,
    greedy_passes: int = 0,
) -> LdlqSolution:
    """Choose codes of a weight against its inputs' Gram matrix.

    As with GPTQ, columns whose inputs are always 0 are cleared before.

    Args:
        weight: (m, n), float32, or float64 to compute in float64.
        gram: (n, n), sum of x x^T in any scale.
        points: what each weight can become.
        order: in which columns are taken.
        damp_percent: share of mean(diag(H)) that is added to diag(H); raised in steps up to 1 where
            H cannot be factored.
        block_size: columns between two updates of the rest; it changes rounding errors only.
        greedy_passes: how often, at most, every column is rounded anew with all others as they are,
            in the same order (`descend`).

    Raises:
        NotPositiveDefiniteError: H cannot be factored however it is damped.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    h = gram.to(work, copy=True)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    taken = _order(h.diagonal(), order)
    h = h.index_select(0, taken).index_select(1, taken)
    r, damping = factor(h, damp_percent)
    w = weight.to(work).masked_fill(dead, 0).index_select(1, taken).T.contiguous()
    feedback = (r / r.diagonal()).T.contiguous()
    made = _Made(torch.empty(0), torch.zeros_like(w))
    losses = torch.zeros((), dtype=torch.float64, device=w.device)
    starts = range(0, len(w), block_size)
    take = Graphed(partial(walk, points), w.device, len(starts))
    for start in starts:
        block = slice(start, min(start + block_size, len(w)))
        reached = w[block] + feedback[block, :start] @ made.delta[:start]
        codes, delta, reached = take(feedback[block, block], reached, w[block], taken[block])
        made.put(block, codes, delta)
        errors = (reached - (w[block] - delta)) * r.diagonal()[block, None]
        losses += errors.to(torch.float64).square().sum()
    loss = float(losses)
    if greedy_passes:
        h.diagonal().add_(damping * h.diagonal().mean())
        descend(points, w, h, taken, made, greedy_passes, block_size)
        loss = float((made.delta * (h @ made.delta)).sum(dtype=torch.float64))
    return LdlqSolution(made.codes.T.index_select(1, taken.argsort()), loss, damping)


def _order(diagonal: Tensor, order: Order) -> Tensor:
    if order == "active":
        return diagonal.argsort(descending=True, stable=True)
    position = torch.arange(len(diagonal), device=diagonal.device)
    return position.flip(0) if order == "last" else position


@dataclass
class _Made:
    """Codes, and W - Q, of the columns so far; all tensors are (n, m), in the order of taking."""

    codes: Tensor
    delta: Tensor

    def put(self, block: slice, codes: Tensor, delta: Tensor) -> None:
        """What a block of columns has become."""
        if not len(self.codes):
            self.codes = codes.new_empty(self.delta.shape)
        self.codes[block] = codes
        self.delta[block] = delta


def walk(
    points: Points, feedback: Tensor, reached: Tensor, w: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of a block, one after the other.

    Args:
        points: what each weight can become.
        feedback: (k, k), row j what the errors of others add to column j.
        reached: (k, m), the weights after the updates of all blocks before; those of the columns
            before in the same block are added to it, in place.
        w: (k, m), the weights themselves.
        columns: (k,), their places in the matrix, int64.

    Returns:
        codes (k, m); W - Q; `reached`.
    """
    codes, delta = [], torch.zeros_like(w)
    places = torch.split(columns, 1)
    for first in range(0, len(w), STEP):
        few = slice(first, min(first + STEP, len(w)))
        reached[few].addmm_(feedback[few, :first], delta[:first])
        known = delta[few].T  # zeros for columns that are still to come
        for i in range(few.start, few.stop):
            reached[i].addmv_(known, feedback[i, few])
            codes.append(_round(points, reached[i], w[i], places[i], delta[i]))
    return torch.stack(codes), delta, reached


def descend(
    points: Points,
    w: Tensor,
    h: Tensor,
    taken: Tensor,
    made: _Made,
    passes: int,
    block_size: int,
) -> None:
    """Round each column to the point nearest to its best value, all others as they are.

    That never increases tr((W - Q) H (W - Q)^T) where points are of single weights. Ends early
    where a pass changes nothing.
    """
    share = h / h.diagonal()[:, None]
    share.fill_diagonal_(0)
    starts = range(0, len(h), block_size)
    take = Graphed(partial(walk_again, points), w.device, passes * len(starts))
    for _ in range(passes):
        before = made.codes.clone()
        for start in starts:
            block = slice(start, min(start + block_size, len(h)))
            within, delta = share[block, block], made.delta[block]
            targets = w[block] + share[block] @ made.delta
            targets -= within @ delta
            made.put(block, *take(within, targets, w[block], delta, taken[block]))
        if torch.equal(before, made.codes):
            return


def walk_again(
    points: Points, within: Tensor, targets: Tensor, w: Tensor, delta: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block anew, one after the other; arguments as those of `walk`.

    Args:
        within: (k, k), zeros on its diagonal.
        targets: (k, m), the columns' best values but for what the block's own errors add.
        delta: (k, m), W - Q as it is.

    Returns:
        codes (k, m); W - Q.
    """
    codes, delta = [], delta.clone()
    places = torch.split(columns, 1)
    for i, target in enumerate(targets):
        codes.append(_round(points, target + within[i] @ delta, w[i], places[i], delta[i]))
    return torch.stack(codes), delta


def _round(points: Points, target: Tensor, weight: Tensor, column: Tensor, error: Tensor) -> Tensor:
    """Codes (m,) of the points nearest to `target` (m,); `error` takes what is left of `weight`."""
    codes = points.nearest(target.unsqueeze(1), column)
    torch.sub(weight, points.decode(codes, column).squeeze(1), out=error)
    return codes.squeeze(1)
