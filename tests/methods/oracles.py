"""Slow implementations to hold the solvers against: written from the papers, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FitGrid = Callable[[Tensor], tuple[Tensor, Tensor]]


def loop_fit(bits: int, symmetric: bool) -> FitGrid:
    """Min-max grids row by row: group (m, g) to scales and zero points (m,) each."""

    def fit(group: Tensor) -> tuple[Tensor, Tensor]:
        scales, zeros = [], []
        for row in group.tolist():
            low, high = min(*row, 0.0), max(*row, 0.0)
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
            if low == high == 0.0:
                low, high = -1.0, 1.0
            scale = (high - low) / (2**bits - 1)
            scales.append(scale)
            zeros.append(2 ** (bits - 1) if symmetric else round(-low / scale))
        return torch.tensor(scales, dtype=torch.float64), torch.tensor(zeros, dtype=torch.float64)

    return fit


def slow_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    fit: FitGrid,
    *,
    group_size: int,
    desc_act: bool,
    static_groups: bool,
    damp_percent: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Optimal brain quantization in a fixed order, with the inverse of the rest at every column.

    When column j is fixed with the error e = w_j - q_j, the rest moves by
    -e [H^-1]_{j,rest} / [H^-1]_jj, where H is what is left of the Hessian.

    Returns:
        codes and the dequantized weight, both (m, n) in the weight's column order.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    length = columns if group_size == -1 else group_size
    whole_rows = fit(w) if group_size == -1 else None
    for j in range(columns):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    static = [fit(w[:, a : a + length]) for a in range(0, columns, length)]
    order = list(range(columns))
    if desc_act:
        order.sort(key=lambda j: -float(h[j, j]))
    w, h = w[:, order], h[order][:, order]
    h += damp_percent * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)

    codes, points = torch.empty_like(w), torch.empty_like(w)
    seen_by_fit = w.clone()
    grid = whole_rows or static[0]
    for j in range(columns):
        if j % block_size == 0:
            # Grids do not see the updates within the block that their group begins in.
            seen_by_fit = w.clone()
        if whole_rows is None and static_groups:
            grid = static[order[j] // length]
        elif whole_rows is None and j % length == 0:
            grid = fit(seen_by_fit[:, j : j + length])
        scale, zero = grid
        codes[:, j] = (torch.round(w[:, j] / scale) + zero).clamp(0, 2**bits - 1)
        points[:, j] = scale * (codes[:, j] - zero)
        inverse = torch.linalg.inv(h[j:, j:])
        error = w[:, j] - points[:, j]
        w[:, j + 1 :] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
    back = [order.index(j) for j in range(columns)]
    return codes[:, back], points[:, back]


def ldlq(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """QuIP's adaptive rounding with linear feedback, last column first; codes (m, n).

    H = L D L^T with L unit lower; column j is rounded after adding (W - Q)_{>j} L_{>j,j}.
    """
    w, h = weight.double(), hessian.double()
    factor = torch.linalg.cholesky(h)
    unit = factor / factor.diagonal()
    codes, delta = torch.empty_like(w), torch.zeros_like(w)
    for j in reversed(range(w.shape[1])):
        target = w[:, j] + delta[:, j + 1 :] @ unit[j + 1 :, j]
        codes[:, j] = (torch.round(target / scale) + zero).clamp(0, 2**bits - 1)
        delta[:, j] = w[:, j] - scale * (codes[:, j] - zero)
    return codes


def correlated(
    rows: int, columns: int, tokens: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A float64 weight (m, n), inputs (tokens, n) whose channels correlate, their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = torch.eye(columns, dtype=torch.float64) + normal(columns, columns) / columns**0.5
    inputs = normal(tokens, columns) @ mix * normal(columns).exp()
    return normal(rows, columns), inputs, inputs.T @ inputs
