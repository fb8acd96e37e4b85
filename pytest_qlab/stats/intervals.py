"""Intervals for rates and for quantiles of independent samples, free of a distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pytest_qlab.stats.distributions import beta_quantile, binomial_cdf

MEDIAN_SAMPLES = 6
"""The fewest samples whose extremes bound their median at 95 %."""


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval for a binomial rate; one-sided in effect at 0 or all successes.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trials.
    """
    _check_counts(successes, trials)
    tail = (1 - confidence) / 2
    lower = 0.0 if successes == 0 else beta_quantile(tail, successes, trials - successes + 1)
    upper = (
        1.0 if successes == trials else beta_quantile(1 - tail, successes + 1, trials - successes)
    )
    return lower, upper


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a binomial rate.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trials.
    """
    _check_counts(successes, trials)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    shrink = 1 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / shrink
    lower = 0.0 if successes == 0 else max(0.0, middle - half)
    upper = 1.0 if successes == trials else min(1.0, middle + half)
    return lower, upper


def _check_counts(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"a rate needs 0 <= successes <= trials > 0, not {successes} of {trials}")


@dataclass(frozen=True)
class SampleQuantile:
    """A quantile of independent samples, with the order statistics that bound it.

    A bound is None where no order statistic reaches the wanted coverage.
    """

    value: float
    lower: float | None
    upper: float | None


def quantile_ranks(
    samples: int, quantile: float, confidence: float = 0.95
) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the order statistics that bound a quantile, (1 - confidence)/2 each side.

    The quantile lies below the k-th smallest sample with probability P(Binomial(n, q) <= k - 1),
    whatever the distribution. The lower rank is the largest, the upper the smallest that keeps its
    side's error within (1 - confidence)/2; None where the sample is too small for one.
    """
    tail = (1 - confidence) / 2
    lower: int | None = None
    upper: int | None = None
    low, high = 1, samples
    while low <= high:  # largest k with P(B <= k - 1) <= tail
        middle = (low + high) // 2
        if binomial_cdf(middle - 1, samples, quantile) <= tail:
            lower, low = middle, middle + 1
        else:
            high = middle - 1
    low, high = 1, samples
    while low <= high:  # smallest k with P(B <= k - 1) >= 1 - tail
        middle = (low + high) // 2
        if binomial_cdf(middle - 1, samples, quantile) >= 1 - tail:
            upper, high = middle, middle - 1
        else:
            low = middle + 1
    return lower, upper


def sample_quantile(
    values: Sequence[float], quantile: float, confidence: float = 0.95
) -> SampleQuantile:
    """The smallest sample with at least that share of samples at or below it, and its interval.

    Raises:
        ValueError: there are no values, or the quantile is not inside (0, 1).
    """
    if not values or not 0 < quantile < 1:
        raise ValueError(f"quantile {quantile} of {len(values)} values is not defined")
    ordered = sorted(values)
    rank = max(1, math.ceil(quantile * len(ordered) * (1 - 1e-12)))
    lower, upper = quantile_ranks(len(ordered), quantile, confidence)
    return SampleQuantile(
        value=ordered[rank - 1],
        lower=None if lower is None else ordered[lower - 1],
        upper=None if upper is None else ordered[upper - 1],
    )


def samples_to_bound(quantile: float, confidence: float = 0.95) -> int:
    """How many samples it takes until their maximum bounds the quantile from above.

    One-sided: the smallest n with 1 - quantile^n >= confidence; 299 for p99 at 95 %.
    """
    return math.ceil(math.log(1 - confidence) / math.log(quantile))
