"""Two models on the same questions: the difference of their shares of right answers.

What one model alone gets right decides: with b questions that only the base model gets right and
c that only the candidate does, of n in all, the difference is (c - b) / n. Sources: McNemar 1947
(the test), Tango 1998 (the interval), Dutta et al. 2024 (flips: answers that changed say more than
a difference in which they cancel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from pytest_qlab.stats.distributions import binomial_cdf

_BISECTIONS = 200


@dataclass(frozen=True)
class TaskDifference:
    """What an estimate needs of a paired difference of two rates.

    Attributes:
        value: the candidate's share of right answers minus the base model's.
        lower, upper: Tango's score interval, within -1 and 1.
        standard_error: of the value; 0 where no answer changed, although it is not certain then.
        p_value: McNemar's exact one, two-sided, of no difference.
        flips: share of the questions that one model alone gets right.
        n: questions.
    """

    value: float
    lower: float
    upper: float
    standard_error: float
    p_value: float
    flips: float
    n: int


def task_difference(b: int, c: int, n: int, *, confidence: float = 0.95) -> TaskDifference:
    """The paired difference of two rates with its interval and test.

    Args:
        b: questions that only the base model gets right. c: that only the candidate does.
        n: all questions, which are independent of one another.

    Raises:
        ValueError: the counts do not fit, or there are no questions.
    """
    lower, upper = tango_interval(b, c, n, confidence=confidence)
    return TaskDifference(
        value=(c - b) / n,
        lower=lower,
        upper=upper,
        standard_error=math.sqrt(b + c - (c - b) ** 2 / n) / n,
        p_value=mcnemar(b, c),
        flips=(b + c) / n,
        n=n,
    )


def mcnemar(b: int, c: int) -> float:
    """The exact two-sided p-value of b against c: binomial with b + c trials of 1/2, at most 1.

    Source: McNemar 1947, in its exact conditional form (the sign test). 1 where nothing differs.
    """
    return min(1.0, 2 * binomial_cdf(min(b, c), b + c, 0.5))


def tango_interval(b: int, c: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of (c - b) / n.

    It holds every difference whose score statistic is within the normal quantile, the variance
    being that under the difference in question. Source: Tango 1998, "Equivalence test and
    confidence interval for the difference in proportions for the paired-sample design", Statistics
    in Medicine 17.

    Args:
        b, c, n: as for `task_difference`.

    Raises:
        ValueError: the counts do not fit, or there are no questions.
    """
    if min(b, c) < 0 or b + c > n or n < 1:
        raise ValueError(f"a paired difference needs b, c >= 0 and b + c <= n > 0, not {b, c, n}")
    # The upper limit is minus the lower one of the models exchanged.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return _lower_limit(b, c, n, z), -_lower_limit(c, b, n, z)


def _lower_limit(b: int, c: int, n: int, z: float) -> float:
    """Where the score statistic, which falls with the difference, comes down to `z`."""
    low, high = -1.0, (c - b) / n
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _score(b, c, n, middle) > z:
            low = middle
        else:
            high = middle
    return high


def _score(b: int, c: int, n: int, difference: float) -> float:
    """Tango's statistic: the observed difference minus this one, over its standard error.

    The share of questions that only the base model gets right has its greatest likelihood, the
    difference being given, at the larger root of a quadratic equation.
    """
    linear = (2 * n + b - c) * difference - b - c
    constant = -b * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
    only_base = max(0.0, (root - linear) / (4 * n))
    variance = n * (2 * only_base + difference * (1 - difference))
    gap = c - b - n * difference
    return math.copysign(math.inf, gap) if variance <= 0 else gap / math.sqrt(variance)
