"""AWQ: scale input channels by how active they are, then clip, before rounding to nearest.

Lin et al.: AWQ, MLSys 2024 (arXiv 2306.00978), section 3.2, with the searches of the reference code
mit-han-lab/llm-awq (auto_scale.py, auto_clip.py); `duo_scaling` as casper-hansen/AutoAWQ. Both run
the layer on cached inputs X for every candidate; here the same squared errors are read off the Gram
matrix G = X^T X, since ||X D^T||^2 = tr(D G D^T): no forward pass, and no subsample of tokens.

The error is that of the linears themselves, added up over those that share the input; where several
do, the reference takes the output of the attention or MLP around them. Grids are those of
`solvers.grid`, whose range always contains 0. The reference's need not, but its zero point is
clamped, which spoils groups whose weights all have one sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.solvers.grid import GridRule, fake_quantize, grouped, rounded

SMALLEST_SCALE = 1e-4
STRIP = 512


@dataclass(frozen=True)
class ScaleSearch:
    """The chosen scale [n] and exponent, and the summed squared output error of each candidate."""

    scale: Tensor
    ratio: float
    losses: tuple[float, ...]


def search_scale(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    mean_abs: Tensor,
    rule: GridRule,
    group_size: int,
    *,
    n_grid: int = 20,
    duo_scaling: bool = False,
) -> ScaleSearch:
    """Choose the scale s of the inputs shared by some linears: least error of Q(W s) / s.

    The candidates are s = mean|x|^r for r = 0, 1/n_grid, .. (r = 0 is no scaling), made such that
    the largest and the smallest are reciprocal.

    Args:
        weights: (m_i, n) each.
        grams: (n, n) each, sum of x x^T over the tokens that the linear sees.
        mean_abs: (n,), mean |x| over tokens.
        duo_scaling: divide by the weights' own mean magnitude as well; then r = 0 does scale.

    Raises:
        ValueError: no candidate has a finite error.
    """
    magnitude = _mean_magnitude(weights, group_size) if duo_scaling else None
    best, losses = -1, []
    chosen = torch.ones_like(mean_abs)
    for step in range(n_grid):
        scale = _candidate(mean_abs, step / n_grid, magnitude)
        losses.append(
            sum(
                output_error(weight - fake_quantize(weight * scale, rule, group_size) / scale, gram)
                for weight, gram in zip(weights, grams, strict=True)
            )
        )
        if losses[step] < (losses[best] if best >= 0 else torch.inf):
            best, chosen = step, scale
    if best < 0:
        raise ValueError("no scale has a finite error")
    return ScaleSearch(chosen, best / n_grid, tuple(losses))


def search_clip(
    weight: Tensor,
    gram: Tensor,
    rule: GridRule,
    group_size: int,
    *,
    n_grid: int = 20,
    max_shrink: float = 0.5,
) -> Tensor:
    """Choose for each row and group the limit of |w| that gives its own output the least error.

    The limits tried are max|w| (1 - i / n_grid) for i < max_shrink n_grid; the error of a group
    involves the diagonal block of the Gram matrix that belongs to its columns.

    Returns:
        (m, G); the weight to quantize is `clip(weight, limits, group_size)`.
    """
    groups = grouped(weight, group_size)
    blocks = _diagonal_blocks(gram, groups.shape[1], groups.shape[2])
    widest = groups.abs().amax(-1)
    best = widest.clone()
    least = torch.full_like(widest, torch.inf)
    for step in range(max(1, int(max_shrink * n_grid))):
        limit = widest * (1 - step / n_grid)
        clipped = groups.clamp(-limit.unsqueeze(-1), limit.unsqueeze(-1))
        scale, zero = (edge.to(groups.dtype).unsqueeze(-1) for edge in rule.fit(clipped))
        delta = (groups - rounded(clipped, scale, zero, rule.bits)).transpose(0, 1)
        error = (torch.bmm(delta, blocks) * delta).sum(-1).T
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, limit, best)
    return best


def clip(weight: Tensor, limits: Tensor, group_size: int) -> Tensor:
    """Clamp each group of (m, n) to plus or minus its limit (m, G)."""
    edge = limits.unsqueeze(-1)
    return grouped(weight, group_size).clamp(-edge, edge).flatten(1)[:, : weight.shape[1]]


def output_error(delta: Tensor, gram: Tensor) -> float:
    """tr(D G D^T), the sum over tokens of |D x|^2, for D (m, n) and a symmetric G (n, n).

    Strip by strip: G is symmetric, so that what lies above the diagonal blocks counts twice.
    """
    total = 0.0
    for start in range(0, delta.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        product = delta[:, strip] @ gram[strip, strip]
        product += 2 * (delta[:, :start] @ gram[:start, strip])
        total += float(product.mul_(delta[:, strip]).sum())
    return total


def _candidate(mean_abs: Tensor, ratio: float, magnitude: Tensor | None) -> Tensor:
    scale = mean_abs**ratio
    if magnitude is not None:
        scale = scale / (magnitude ** (1 - ratio) + 1e-4)
    scale = scale.clamp(min=SMALLEST_SCALE)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def _mean_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Per column, the mean over all rows of |w| in shares of the largest of its group (n,)."""
    weight = torch.cat(list(weights))
    groups = grouped(weight, group_size).abs()
    share = groups / (groups.amax(-1, keepdim=True) + 1e-6)
    return share.flatten(1)[:, : weight.shape[1]].mean(0)


def _diagonal_blocks(gram: Tensor, count: int, length: int) -> Tensor:
    """(G, g, g): the diagonal blocks of the Gram matrix, the last one padded with zeros."""
    missing = count * length - len(gram)
    padded = pad(gram, (0, missing, 0, missing))
    tiles = padded.view(count, length, count, length)
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
