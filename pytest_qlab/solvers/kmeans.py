"""Weighted k-means of numbers, a row of a matrix at a time, solved exactly.

On a line, the clusters of an optimal solution are intervals of the sorted points, so that dynamic
programming finds it (Wang and Song 2011, "Ckmeans.1d.dp"): the best t clusters of the first j
points are the best t - 1 clusters of the first i and one cluster of the rest. The best i grows with
j, which leaves n log n candidates for each t if the middle j is settled first (Grønlund et al.,
arXiv 1701.07204, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POINTS_AT_ONCE = {"cpu": 2**17, "cuda": 2**23}
"""Of several rows; on a processor, about what its cache holds."""


def kmeans_rows(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """The centers with the least sum of weight * (point - nearest center)**2, for each row.

    Where there are fewer different points than clusters, centers repeat or stand on points that
    they do not improve. In a row whose weights are all 0, all points count the same.

    Args:
        points: (m, n), finite.
        weights: (m, n), at least 0.
        clusters: at least 1, at most n.

    Returns:
        float64 (m, clusters), rising.
    """
    rows, columns = points.shape
    at_once = max(1, POINTS_AT_ONCE.get(points.device.type, 2**17) // columns)
    found = [
        _centers(points[start : start + at_once], weights[start : start + at_once], clusters)
        for start in range(0, rows, at_once)
    ]
    return torch.cat(found)


def _centers(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    x, order = points.to(torch.float64).sort(dim=1, stable=True)
    w = weights.to(torch.float64).gather(1, order)
    w = w / w.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    total = w.sum(1, keepdim=True)
    w = torch.where(total > 0, w / total, 1 / x.shape[1])
    # Around their mean, squares of sums do not cancel; no larger than 1, they do not overflow.
    mean = (w * x).sum(1, keepdim=True)
    x = x - mean
    reach = x.abs().amax(1, keepdim=True)
    x = x / torch.where(reach > 0, reach, 1.0)

    bounds = _best_intervals(_Sums.of(x, w), clusters)
    count = bounds.diff(dim=1)

    def per_cluster(values: Tensor) -> Tensor:
        sums = torch.segment_reduce(
            values.flatten(), "sum", lengths=count.flatten(), unsafe=True, initial=0
        )
        return sums.view(count.shape)

    weight, plain = per_cluster(w), per_cluster(x) / count
    centers = torch.where(weight > 0, per_cluster(w * x) / weight, plain)
    # A cluster without points gets the point that would be its first.
    spare = x.gather(1, bounds[:, :-1].clamp(max=x.shape[1] - 1))
    centers = torch.where(count > 0, centers, spare)
    return (centers * reach + mean).sort(dim=1).values


class _Sums(NamedTuple):
    """Sums over the first j points of a row, j = 0 .. n: of weights, and of weight * point."""

    weight: Tensor
    moment: Tensor

    @classmethod
    def of(cls, x: Tensor, w: Tensor) -> _Sums:
        first = x.new_zeros(len(x), 1)
        return cls(torch.cat([first, w.cumsum(1)], 1), torch.cat([first, (w * x).cumsum(1)], 1))

    def gain(self, weight: Tensor, moment: Tensor) -> Tensor:
        """What a cluster with these sums takes off the sum of weight * point**2."""
        gain = moment.square_().div_(weight)
        return gain.masked_fill_(weight <= 0, 0)


def _best_intervals(sums: _Sums, clusters: int) -> Tensor:
    """Where the clusters of the optimal solution begin, and n: int64 (m, clusters + 1).

    Instead of the least loss, the greatest gain is sought, which is the same and takes no sums of
    squares.
    """
    rows, width = sums.weight.shape
    gains = sums.gain(sums.weight.clone(), sums.moment.clone())
    layers = []
    for _ in range(2, clusters):
        gains, begins = _next_layer(gains, sums)
        layers.append(begins)
    bounds = [torch.full((rows, 1), width - 1, device=gains.device)]
    if clusters > 1:
        last = sums.gain(sums.weight[:, -1:] - sums.weight, sums.moment[:, -1:] - sums.moment)
        bounds.append((gains + last).argmax(1, keepdim=True))
    for begins in reversed(layers):
        bounds.append(begins.gather(1, bounds[-1]).to(torch.int64))
    bounds.append(torch.zeros_like(bounds[0]))
    return torch.cat(bounds[::-1], 1)


def _next_layer(before: Tensor, sums: _Sums) -> tuple[Tensor, Tensor]:
    """The best gain of the first j points with one cluster more, and where that cluster begins.

    For j = 0, and then for every other multiple of ever smaller powers of 2. The candidates i of a
    j lie between the best ones of its neighbours that are known already, so that at each step all
    candidates of a row stand in one line, shared out among the j.

    Args:
        before: float64 (m, n + 1), the best gains with one cluster less.

    Returns:
        float64 and int32, both (m, n + 1).
    """
    rows, width = before.shape
    gains = torch.zeros_like(before)
    begins = torch.zeros(before.shape, dtype=torch.int32, device=before.device)
    step = 1 << (width - 1).bit_length()
    while step > 1:
        step //= 2
        middle = slice(step, None, 2 * step)
        places = torch.arange(step, width, 2 * step, dtype=torch.int32, device=before.device)
        low = begins[:, 0 : width - step : 2 * step]
        high = begins[:, 2 * step :: 2 * step]
        if high.shape[1] < low.shape[1]:  # nothing is known after the last
            high = torch.cat([high, places[-1:].expand(rows, 1)], 1)
        weight, moment = sums.weight[:, middle], sums.moment[:, middle]
        index = low.to(torch.int64)
        best = sums.gain(
            weight - sums.weight.gather(1, index), moment - sums.moment.gather(1, index)
        )
        best += before.gather(1, index)
        better, where = _best_in_line(before, sums, low, torch.minimum(high, places), high, middle)
        improved = better > best
        gains[:, middle] = torch.where(improved, better, best)
        begins[:, middle] = torch.where(improved, where, low)
    return gains, begins


def _best_in_line(
    before: Tensor, sums: _Sums, low: Tensor, top: Tensor, high: Tensor, middle: slice
) -> tuple[Tensor, Tensor]:
    """For each j, the best gain over low < i <= top, and the first such i; -inf where none is.

    Candidates from `top` to `high`, which begin after j, belong to nobody.
    """
    rows, count = low.shape
    width = before.shape[1]
    # Of each row: the candidates of a j, nobody's after them, and so on; then the rest.
    lengths = torch.zeros(rows, 2 * count + 1, dtype=torch.int64, device=before.device)
    lengths[:, 0:-1:2] = top - low
    lengths[:, 1:-1:2] = high - top
    lengths[:, -1] = width - 1 - high[:, -1]
    lengths = lengths.flatten()
    owner = torch.repeat_interleave(lengths, output_size=rows * (width - 1))

    def spread(values: Tensor) -> Tensor:
        of_owner = torch.zeros(rows, 2 * count + 1, dtype=values.dtype, device=values.device)
        of_owner[:, 0:-1:2] = values[:, middle]
        return of_owner.flatten().index_select(0, owner)

    weight = spread(sums.weight).sub_(sums.weight[:, 1:].reshape(-1))
    moment = spread(sums.moment).sub_(sums.moment[:, 1:].reshape(-1))
    gain = sums.gain(weight, moment).add_(before[:, 1:].reshape(-1))
    best = torch.segment_reduce(gain, "max", lengths=lengths, unsafe=True)
    own = best.view(rows, -1)
    own[:, 1::2] = torch.inf  # so that nothing of nobody's is found
    own[:, -1] = torch.inf
    found = (gain == best.index_select(0, owner)).nonzero().squeeze(1)
    where = torch.full_like(lengths, rows * width)
    where.scatter_reduce_(0, owner[found], found, "amin")
    where = where.view(rows, -1)[:, 0:-1:2] % (width - 1) + 1
    return own[:, 0:-1:2], where.to(torch.int32)
