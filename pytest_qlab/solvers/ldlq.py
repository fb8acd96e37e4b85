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
from typing import Literal

import torch
from torch import Tensor

from pytest_qlab.solvers.codebook import Points
from pytest_qlab.solvers.gptq import STEP, factor

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
    state = _State(w, points, taken)
    feedback = (r / r.diagonal()).T.contiguous()
    losses = torch.zeros((), dtype=torch.float64, device=w.device)
    for start in range(0, len(w), block_size):
        stop = min(start + block_size, len(w))
        reached = w[start:stop] + feedback[start:stop, :start] @ state.delta[:start]
        within = feedback[start:stop, start:stop]
        for first in range(0, stop - start, STEP):
            few = range(first, min(first + STEP, stop - start))
            known = state.delta[start : start + first]
            reached[few.start : few.stop].addmm_(within[few.start : few.stop, :first], known)
            known = state.delta[start + first : start + few.stop].T
            for i in few:
                # Zeros for columns that are still to come.
                reached[i].addmv_(known, within[i, first : few.stop])
                state.take(start + i, reached[i])
        errors = (reached - state.made[start:stop]) * r.diagonal()[start:stop, None]
        losses += errors.to(torch.float64).square().sum()
    loss = float(losses)
    if greedy_passes:
        h.diagonal().add_(damping * h.diagonal().mean())
        state.descend(h, greedy_passes, block_size)
        loss = float((state.delta * (h @ state.delta)).sum(dtype=torch.float64))
    codes = state.codes.T.index_select(1, taken.argsort())
    return LdlqSolution(codes, loss, damping)


def _order(diagonal: Tensor, order: Order) -> Tensor:
    if order == "active":
        return diagonal.argsort(descending=True, stable=True)
    position = torch.arange(len(diagonal), device=diagonal.device)
    return position.flip(0) if order == "last" else position


class _State:
    """What the columns have become so far; all tensors are (n, m), in the order of taking."""

    def __init__(self, w: Tensor, points: Points, taken: Tensor) -> None:
        self.w, self._points, self._columns = w, points, torch.split(taken, 1)
        self.made = torch.zeros_like(w)
        self.delta = torch.zeros_like(w)  # W - Q
        self.codes = torch.empty(0)

    def take(self, index: int, target: Tensor) -> None:
        """Round a column to the points nearest to `target` (m,)."""
        column = self._columns[index]
        codes = self._points.nearest(target.unsqueeze(1), column)
        if not len(self.codes):
            self.codes = codes.new_empty(self.w.shape)
        self.codes[index] = codes.squeeze(1)
        self.made[index] = self._points.decode(codes, column).squeeze(1)
        torch.sub(self.w[index], self.made[index], out=self.delta[index])

    def descend(self, h: Tensor, passes: int, block_size: int) -> None:
        """Round each column to the point nearest to its best value, all others as they are.

        That never increases tr((W - Q) H (W - Q)^T) where points are of single weights. Ends early
        where a pass changes nothing.
        """
        share = h / h.diagonal()[:, None]
        share.fill_diagonal_(0)
        for _ in range(passes):
            before = self.codes.clone()
            for start in range(0, len(h), block_size):
                block = slice(start, min(start + block_size, len(h)))
                within = share[block, block]
                targets = self.w[block] + share[block] @ self.delta
                targets -= within @ self.delta[block]
                for i, target in enumerate(targets):
                    self.take(start + i, target + within[i] @ self.delta[block])
            if torch.equal(before, self.codes):
                return
