"""Seeded bootstrap intervals: quantiles of clustered tokens, and ratios of paired samples.

Resampling clusters with replacement means drawing how often each one occurs; everything else is a
matrix product with those counts, so that thousands of replicates take a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.stats.paired import FloatArray, IntArray

REPLICATES = 2000


@dataclass(frozen=True)
class BootstrapQuantile:
    """A quantile with its percentile interval; no interval from fewer than 2 clusters."""

    quantile: float
    value: float
    lower: float | None
    upper: float | None


def cluster_counts(clusters: int, replicates: int, seed: int) -> FloatArray:
    """How often each cluster occurs in each replicate: (replicates, clusters), rows sum to C."""
    generator = np.random.default_rng(seed)
    shares = np.full(clusters, 1.0 / clusters)
    return generator.multinomial(clusters, shares, size=replicates).astype(np.float64)


def clustered_quantiles(
    values: NDArray[Any],
    clusters: IntArray,
    quantiles: Sequence[float],
    *,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> list[BootstrapQuantile]:
    """Quantiles of tokens with intervals from resampling their clusters.

    A quantile q is the smallest value with at least a share q of the tokens at or below it
    (numpy's `inverted_cdf`). The order of the tokens and the names of the clusters do not matter.

    Args:
        values: per token; clusters: per token, 0..C-1.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order].astype(np.float64)
    members = _canonical(values, clusters)[order]
    count = int(members.max()) + 1
    points = [ordered[_rank(q, ordered.size) - 1] for q in quantiles]
    if count < 2:
        return [
            BootstrapQuantile(q, float(v), None, None)
            for q, v in zip(quantiles, points, strict=True)
        ]
    weights = cluster_counts(count, replicates, seed)
    finder = _WeightedQuantiles(members, count, weights)
    tail = (1 - confidence) / 2
    found = []
    for q, point in zip(quantiles, points, strict=True):
        replicate = ordered[finder.positions(q)]
        lower, upper = np.quantile(replicate, [tail, 1 - tail])
        found.append(
            BootstrapQuantile(q, float(point), min(float(lower), point), max(float(upper), point))
        )
    return found


def _rank(quantile: float, total: float) -> int:
    """Rank from 1 of the quantile among `total` samples; 0.99 of 100 is the 99th, not the 100th."""
    return max(1, math.ceil(quantile * total * (1 - 1e-12)))


def _canonical(values: NDArray[Any], clusters: IntArray) -> IntArray:
    """Renumber clusters by size and content, so that their names do not change the replicates."""
    sizes = np.bincount(clusters)
    sums = np.bincount(clusters, weights=values.astype(np.float64))
    present = np.flatnonzero(sizes)
    rank = np.zeros(sizes.size, dtype=np.int64)
    rank[present[np.lexsort((sums[present], sizes[present]))]] = np.arange(present.size)
    return rank[clusters]


class _WeightedQuantiles:
    """Positions of weighted quantiles in sorted tokens, for many weightings of their clusters.

    The cumulative weight is known exactly at every b-th token, b = sqrt(n), from one matrix
    product; the block that holds the quantile is then searched token by token.
    """

    def __init__(self, members: IntArray, clusters: int, weights: FloatArray) -> None:
        size = members.size
        self._members, self._weights = members, weights
        self._block = max(1, math.isqrt(size))
        blocks = -(-size // self._block)
        table = np.bincount(
            members * blocks + np.arange(size) // self._block, minlength=clusters * blocks
        ).reshape(clusters, blocks)
        # Counts are integers below 2^53, so the sums are exact in float64.
        self._cumulative = weights @ np.cumsum(table, axis=1).astype(np.float64)

    def positions(self, quantile: float) -> IntArray:
        """Per replicate, the index of the token that is the quantile."""
        total = self._cumulative[:, -1]
        wanted = np.maximum(1.0, np.ceil(quantile * total * (1 - 1e-12)))
        block = (self._cumulative < wanted[:, None]).sum(axis=1)
        rows = np.arange(block.size)
        before = np.where(block > 0, self._cumulative[rows, np.maximum(block - 1, 0)], 0.0)
        inside = block[:, None] * self._block + np.arange(self._block)[None, :]
        beyond = inside >= self._members.size
        inside = np.minimum(inside, self._members.size - 1)
        gained = np.where(beyond, 0.0, self._weights[rows[:, None], self._members[inside]])
        short = (before[:, None] + np.cumsum(gained, axis=1)) < wanted[:, None]
        return np.asarray(inside[rows, short.sum(axis=1)], dtype=np.int64)


def median_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ratio of medians of paired samples, and its interval from resampling the pairs.

    Raises:
        ValueError: the samples are empty, of different length, or not positive.
    """
    above = np.asarray(numerators, dtype=np.float64)
    below = np.asarray(denominators, dtype=np.float64)
    if above.size != below.size or above.size == 0 or min(above.min(), below.min()) <= 0:
        raise ValueError("a ratio of medians needs equally many positive samples of both")
    generator = np.random.default_rng(seed)
    ratios = np.empty(replicates)
    chunk = max(1, 2_000_000 // above.size)
    for start in range(0, replicates, chunk):
        stop = min(start + chunk, replicates)
        drawn = generator.integers(above.size, size=(stop - start, above.size))
        ratios[start:stop] = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(ratios, [tail, 1 - tail])
    value = float(np.median(above) / np.median(below))
    return value, min(float(lower), value), max(float(upper), value)
