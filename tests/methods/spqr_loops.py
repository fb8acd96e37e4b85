"""SpQR as a slow loop over single weights, in float64, from the paper and its reference code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def loop_grid(values: list[float], bits: int) -> tuple[float, float]:
    """Scale and real zero point of a group.

    A range that is narrow and far from 0, or of one point, is widened to contain 0.
    """
    low, high, top = min(values), max(values), 2**bits - 1
    if low == high or abs(-low / ((high - low) / top)) > 2 ** (bits + 3):
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / top
    return scale, -low / scale if scale else 0.0


def loop_code(value: float, scale: float, zero: float, bits: int) -> int:
    # Where the scale is 0, all codes stand for 0.
    steps = value / max(scale, 1e-300)
    return max(0, min(round(steps + zero), int(2**bits - 1)))


def loop_point(value: float, scale: float, zero: float, bits: int) -> float:
    return scale * (loop_code(value, scale, zero, bits) - zero)


def loop_gain(group: list[float], importance: list[float], bits: int) -> list[float]:
    """By how much the squared error falls when each weight is left out, one after the other."""

    def error(kept: list[int]) -> float:
        if not kept:
            return 0.0
        scale, zero = loop_grid([group[j] for j in kept], bits)
        return sum(
            ((group[j] - loop_point(group[j], scale, zero, bits)) * importance[j]) ** 2
            for j in kept
        )

    everything = list(range(len(group)))
    return [error(everything) - error([j for j in everything if j != e]) for e in everything]


def loop_statistics(values: list[float], bits: int, group_size: int) -> list[float]:
    """Scales or zero points of all rows, rounded on grids that neighbouring rows share."""
    rounded: list[float] = []
    for start in range(0, len(values), group_size):
        shared = values[start : start + group_size]
        low, step = min(shared), (max(shared) - min(shared)) / (2**bits - 1)
        rounded += [low + step * (round((v - low) / step) if step else 0) for v in shared]
    return rounded


@dataclass(frozen=True)
class LoopResult:
    weight: Tensor
    codes: Tensor
    outliers: Tensor


def slow_spqr(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    statistic_bits: int,
    statistic_group_size: int,
    threshold: float,
    leave_one_out: bool,
    desc_act: bool,
    damp_percent: float,
) -> LoopResult:
    """All in the weight's column order; H^-1 of what is left is formed anew for every column."""
    w, h = weight.double().clone(), hessian.double().clone()
    rows, columns = w.shape
    order = list(range(columns))
    if desc_act:
        order.sort(key=lambda j: -float(h[j, j]))
    w, h = w[:, order], h[order][:, order]
    dead = [j for j in range(columns) if h[j, j] == 0]
    h += damp_percent * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    for j in dead:
        h[j, j] = 1
        w[:, j] = 0
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    sizes = [1 / math.sqrt(float(inverse[0, 0])) for inverse in inverses]  # 1 / U_jj
    spread = [float(w[:, j].var()) * sizes[j] ** 2 for j in range(columns)]
    limit = threshold * sum(spread) / columns if threshold < math.inf else math.inf

    points, codes = torch.empty_like(w), torch.empty_like(w, dtype=torch.uint8)
    outliers = torch.zeros_like(w, dtype=torch.bool)
    scales, zeros = [0.0] * rows, [0.0] * rows
    for j in range(columns):
        if j % group_size == 0:
            fitted = []
            for i in range(rows):
                group = w[i, j : j + group_size].tolist()
                if leave_one_out and limit < math.inf:
                    gains = loop_gain(group, sizes[j : j + group_size], bits)
                    kept = [v for v, gain in zip(group, gains, strict=True) if gain <= limit]
                    mean = sum(kept) / max(len(kept), 1)
                    group = [
                        v if gain <= limit else mean for v, gain in zip(group, gains, strict=True)
                    ]
                fitted.append(loop_grid(group, bits))
            scales = loop_statistics([s for s, _ in fitted], statistic_bits, statistic_group_size)
            zeros = loop_statistics([z for _, z in fitted], statistic_bits, statistic_group_size)
        errors = torch.zeros(rows, dtype=torch.float64)
        for i in range(rows):
            value = float(w[i, j])
            codes[i, j] = loop_code(value, scales[i], zeros[i], bits)
            point = scales[i] * (int(codes[i, j]) - zeros[i])
            if ((value - point) * sizes[j]) ** 2 > limit:
                outliers[i, j], point = True, value
            points[i, j], errors[i] = point, value - point
        w[:, j + 1 :] -= torch.outer(errors, inverses[j][0, 1:] / inverses[j][0, 0])
    back = [order.index(j) for j in range(columns)]
    return LoopResult(points[:, back], codes[:, back], outliers[:, back])
