"""Seeded bootstrap intervals: quantiles of clustered tokens, and ratios of paired samples.

Resampling clusters with replacement means drawing how often each one occurs; everything else is a
matrix product with those counts, so that thousands of replicates take a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.stats.distributions import t_quantile
from pytest_qlab.stats.paired import FloatArray, IntArray

REPLICATES = 2000
_AT_ONCE = 2**17  # numbers that intermediate arrays have, so that they stay in the cache


@dataclass(frozen=True)
class BootstrapQuantile:
    """A quantile with its percentile interval; no interval from fewer than 2 clusters."""

    quantile: float
    value: float
    lower: float | None
    upper: float | None


def cluster_counts(clusters: int, replicates: int, seed: int) -> NDArray[np.float32]:
    """How often each cluster occurs in each replicate: (replicates, clusters), rows sum to C."""
    generator = np.random.default_rng(seed)
    # Drawing and counting is several times as fast as numpy's multinomial.
    drawn = generator.integers(clusters, size=(replicates, clusters), dtype=np.int32)
    counts = np.empty((replicates, clusters), dtype=np.float32)
    step = max(1, _AT_ONCE // clusters)
    for start in range(0, replicates, step):
        rows = drawn[start : start + step]
        rows += (np.arange(len(rows), dtype=np.int32) * clusters)[:, None]
        found = np.bincount(rows.ravel(), minlength=rows.size)
        counts[start : start + step] = found.reshape(rows.shape)
    return counts


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
    The interval is between two quantiles of the replicates, further out for fewer clusters.

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
    tail = expanded_tail((1 - confidence) / 2, count)
    found = []
    for q, point in zip(quantiles, points, strict=True):
        replicate = ordered[finder.positions(q)]
        lower, upper = np.quantile(replicate, [tail, 1 - tail])
        found.append(
            BootstrapQuantile(q, float(point), min(float(lower), point), max(float(upper), point))
        )
    return found


def expanded_tail(tail: float, clusters: int) -> float:
    """The share of the replicates that is left out on each side, so that a share `tail` errs there.

    Replicates vary less than samples do, by sqrt((C - 1) / C), and as if their variance were known.
    Source: Hesterberg 2015, What Teachers Should Know About the Bootstrap, The American
    Statistician 69: the expanded percentile interval, which is as wide as Student's t where
    replicates are normal.
    """
    reach = t_quantile(1 - tail, clusters - 1) * math.sqrt(clusters / (clusters - 1))
    return NormalDist().cdf(-reach)


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

    The cumulative weight is known exactly at every b-th token, b about sqrt(n), from one matrix
    product; the block that holds the quantile is then searched token by token.
    """

    def __init__(self, members: IntArray, clusters: int, weights: NDArray[np.float32]) -> None:
        size = members.size
        self._block = max(1, math.isqrt(size) // 2)
        blocks = -(-size // self._block)
        table = np.bincount(
            members * blocks + np.arange(size) // self._block, minlength=clusters * blocks
        ).reshape(clusters, blocks)
        # Sums of whole numbers are exact: below 2^24 in float32, which is faster, else in float64.
        largest = clusters * int(table.sum(axis=1).max())
        kind = np.float32 if largest < 2**24 else np.float64
        self._weights = weights.astype(kind, copy=False)
        self._cumulative = self._weights @ np.cumsum(table, axis=1).astype(kind)
        # What fills up the last block comes after all weight, so that no quantile falls on it.
        filled = np.resize(members, blocks * self._block)
        self._members = filled.reshape(blocks, self._block)

    def positions(self, quantile: float) -> IntArray:
        """Per replicate, the index of the token that is the quantile."""
        total = self._cumulative[:, -1].astype(np.float64)
        wanted = np.maximum(1.0, np.ceil(quantile * total * (1 - 1e-12)))
        found = np.empty(wanted.size, dtype=np.int64)
        step = max(1, _AT_ONCE // self._block)
        for start in range(0, wanted.size, step):
            rows = slice(start, start + step)
            found[rows] = self._search(rows, wanted[rows])
        return found

    def _search(self, rows: slice, wanted: FloatArray) -> IntArray:
        cumulative = self._cumulative[rows]
        block = (cumulative < wanted[:, None]).sum(axis=1)
        before = np.take_along_axis(cumulative, np.maximum(block - 1, 0)[:, None], axis=1)
        before[block == 0] = 0
        gained = np.take_along_axis(self._weights[rows], self._members[block], axis=1)
        short = (before + np.cumsum(gained, axis=1)) < wanted[:, None]
        return np.asarray(block * self._block + short.sum(axis=1), dtype=np.int64)


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
