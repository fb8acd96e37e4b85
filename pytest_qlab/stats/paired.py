"""Means and ratios over windows that are grouped in documents, with cluster-robust intervals.

The unit of analysis is the window, given as sums over its scored tokens; the unit of independence
is the document (the cluster). A function of window sums is linearised: each window has an
influence on the estimate, and the variance of the estimate is C/(C-1) times the sum over the C
clusters of the squared influence of the cluster. Intervals use Student's t with C-1 degrees of
freedom. Because candidate and baseline see the same tokens, differences are taken per window, so
that what both have in common cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.stats.distributions import t_quantile

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_SMALLEST_BLOCK = 8


@dataclass(frozen=True)
class Spread:
    """An estimate with its standard error and interval; both None where nothing defines them.

    `design_effect` is the squared standard error over that of independent tokens, where known.
    """

    value: float
    standard_error: float | None
    lower: float | None
    upper: float | None
    clusters: int
    design_effect: float | None = None


def cluster_index(documents: NDArray[Any]) -> IntArray:
    """Clusters 0..C-1 of the windows, from the document of each.

    Several documents are the clusters. Windows of a single document, such as a corpus joined into
    one stream, are cut into blocks of max(8, n^(1/3)) neighbours; fewer than two whole blocks stay
    one cluster, for which no interval is defined.
    """
    _, inverse = np.unique(documents, return_inverse=True)
    index: IntArray = inverse.astype(np.int64)
    if index.size == 0 or index.max() > 0:
        return index
    block = max(_SMALLEST_BLOCK, math.ceil(index.size ** (1 / 3)))
    blocks = index.size // block
    # The windows left over join the last block.
    numbers: IntArray = np.minimum(np.arange(index.size) // block, max(blocks - 1, 0))
    return numbers


def cluster_sums(values: NDArray[Any], clusters: IntArray) -> FloatArray:
    """Sums of the windows' values over each cluster, in float64."""
    sums: FloatArray = np.bincount(clusters, weights=values.astype(np.float64)).astype(np.float64)
    return sums


def standard_error(influence: NDArray[Any], clusters: IntArray) -> float | None:
    """Cluster-robust standard error from each window's influence; None for fewer than 2 clusters.

    The influences of an estimate sum to zero over all windows.
    """
    per_cluster = cluster_sums(influence, clusters)
    count = per_cluster.size
    if count < 2:
        return None
    return math.sqrt(float(np.square(per_cluster).sum()) * count / (count - 1))


def interval(
    value: float, error: float | None, clusters: int, confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """value -+ t * error with clusters - 1 degrees of freedom, or (None, None) without an error."""
    if error is None:
        return None, None
    half = t_quantile((1 + confidence) / 2, clusters - 1) * error
    return value - half, value + half


def spread(
    value: float,
    influence: NDArray[Any],
    clusters: IntArray,
    *,
    confidence: float = 0.95,
    independent_error: float | None = None,
) -> Spread:
    """The interval of an estimate from each window's influence on it.

    `independent_error` is the standard error that independent tokens would have.
    """
    error = standard_error(influence, clusters)
    count = int(clusters.max()) + 1
    lower, upper = interval(value, error, count, confidence)
    design_effect = None
    if error is not None and independent_error is not None:
        # Without any variation between tokens there is none between clusters either.
        design_effect = (error / independent_error) ** 2 if independent_error > 0 else 1.0
    return Spread(value, error, lower, upper, count, design_effect)


def mean_influence(sums: NDArray[Any], counts: NDArray[Any]) -> FloatArray:
    """Each window's influence on the mean over tokens, sum(sums) / sum(counts)."""
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    return np.asarray((sums - mean * counts) / total, dtype=np.float64)


def token_mean(
    sums: NDArray[Any],
    counts: NDArray[Any],
    clusters: IntArray,
    *,
    squares: NDArray[Any] | None = None,
    confidence: float = 0.95,
) -> Spread:
    """The mean over tokens from window sums: the ratio estimator, window means weighted by tokens.

    Args:
        sums, counts: per window, the sum of the tokens' values and how many there are.
        clusters: per window, its cluster, as `cluster_index` returns it.
        squares: per window, the sum of squared values; gives the design effect.
    """
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    independent = None
    if squares is not None and total > 1:
        variance = max(0.0, float(squares.sum()) / total - mean * mean) * total / (total - 1)
        independent = math.sqrt(variance / total)
    return spread(
        mean,
        mean_influence(sums, counts),
        clusters,
        confidence=confidence,
        independent_error=independent,
    )


def log_ratio(
    numerators: NDArray[Any],
    denominators: NDArray[Any],
    clusters: IntArray,
    confidence: float = 0.95,
) -> Spread:
    """ln(sum(numerators) / sum(denominators)) of positive sums, by the delta method."""
    above, below = float(numerators.sum()), float(denominators.sum())
    return spread(
        math.log(above / below),
        numerators / above - denominators / below,
        clusters,
        confidence=confidence,
    )
