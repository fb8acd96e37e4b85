"""GPTQ: codes for one layer, chosen column by column, each error made good by the columns after it.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023 (arXiv 2210.17323), Algorithm 1, with the
options of the reference code IST-DASLab/gptq (act-order, static groups). Minimizes
tr((W - Q) H (W - Q)^T), H = X^T X of the layer's inputs X, damped.

The paper needs U, the upper Cholesky factor of the inverse: U^T U = H^-1. Here H itself is
factored, from its last column backwards: H = R R^T with R upper triangular. Then U = R^-1, and the
block of U on the diagonal at columns B is the inverse of that block of R. What the columns before B
contribute to B, which the reference subtracts from all later columns after every block, is then
(W - Q)_<B R_<B,B U_BB: the same numbers from one Cholesky factorization, without the n x n inverse
(the form known as LDLQ; Chee et al., QuIP, arXiv 2307.13304, prove the equivalence).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats.affine import group_length
from pytest_qlab.solvers.grid import AffineCodes, Grid, GridRule, grouped, nearest_codes

SMALLEST_DAMP_STEP = 0.01


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
    work = torch.promote_types(weight.dtype, torch.float32)
    w, h = weight.to(work, copy=True), gram.to(work, copy=True)
    rule = rule.resolved(w, group_size)
    columns = w.shape[1]
    length = group_length(columns, group_size)

    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    # As in the reference: grids of whole rows are fitted before dead columns are cleared.
    grid = rule.fit(grouped(w if group_size == -1 else w.masked_fill(dead, 0), group_size))
    w[:, dead] = 0

    position = torch.arange(columns, device=w.device)
    order = h.diagonal().argsort(descending=True, stable=True) if desc_act else position
    r, damp_percent = _factor(h[order][:, order], damp_percent)
    fitted_before = static_groups or group_size == -1
    groups = (order if fitted_before else position) // length
    group_of: list[int] = groups.tolist()

    # From here on all is transposed, so that a column of W is contiguous.
    w = w.T[order]
    scales, zeros = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    delta = torch.empty_like(w)  # W - Q
    codes = torch.empty_like(w, dtype=torch.uint8)
    loss = 0.0
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        reach = stop
        if not fitted_before:
            last = (stop - 1) // length * length  # where the last group of the block begins
            reach = min(last + length, columns) if last >= start else stop
        u = _inverse(r[start:reach, start:reach])
        # The weights after the updates of all earlier blocks.
        block = w[start:reach] + u.T @ (r[:start, start:reach].T @ delta[:start])
        errors = torch.empty_like(block[: stop - start])
        for i, j in enumerate(range(start, stop)):
            g = group_of[j]
            if not fitted_before and j % length == 0:
                # The reference's rule: the grid of a group does not see the updates by earlier
                # columns of the same block.
                scales[g], zeros[g] = rule.fit(block[i : i + length].T)
            scale, zero = scales[g].to(work), zeros[g]
            column = block[i] - u[:i, i] @ errors[:i]
            code = nearest_codes(column, scale, zero, rule.bits)
            point = (code - zero) * scale
            codes[j] = code
            delta[j] = w[j] - point
            errors[i] = (column - point) / u[i, i]
        loss += 0.5 * float(errors.square().sum())

    back = order.argsort()
    scattered = desc_act and not fitted_before and len(scales) > 1
    quantized = AffineCodes(
        codes[back].T.contiguous(),
        Grid(scales.T.contiguous(), zeros.T.contiguous()),
        rule,
        group_size,
        groups[back] if scattered else None,
    )
    return GptqSolution(quantized, loss, damp_percent)


def _factor(h: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """Upper triangular R with R R^T = H + damping, and the damping it took.

    The retry is that of ModelCloud/GPTQModel: more damping, a step at a time, while it is below 1.
    """
    mean = h.diagonal().mean()
    step = max(damp_percent, SMALLEST_DAMP_STEP)
    while damp_percent < 1:
        damped = h.clone()
        damped.diagonal().add_(damp_percent * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        # Numbers that overflow give infinities or NaN without being reported.
        if not failed and bool(lower.isfinite().all()):
            return lower.flip(0, 1), damp_percent
        damp_percent += step
    raise NotPositiveDefiniteError("the Gram matrix is not positive definite")


def _inverse(upper: Tensor) -> Tensor:
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse
