"""Pass, fail, or not known yet: an estimate held against a budget by one-sided bounds.

Source: non-inferiority testing with a margin that is fixed beforehand. A candidate passes where
even the pessimistic bound is within the budget and fails where even the optimistic one is not;
"not significantly over the budget" is never a pass.

Damage is skewed between documents: a few of them have far more than the others. A sample without
these has too small a mean and too small an error at once, so that Student's t errs too often on one
side, and too seldom on the other, which is why two-sided intervals are right nevertheless. Bounds
are therefore wider by the first term of the Cornish-Fisher expansion of the t statistic,
skewness (2 t^2 + 1) / (6 sqrt(clusters)): Hall 1992, The Bootstrap and Edgeworth Expansion. The
skewness is not estimated, since it seems small in just the samples that miss the heavy documents.
"""

from __future__ import annotations

import math
from enum import StrEnum
from statistics import NormalDist

from pytest_qlab.stats.distributions import t_quantile

SKEWNESS = 2.5
"""Assumed of the damage of documents, to either side. Exponential distributions have 2; with this
number the terms that the expansion leaves out are made up for: of 16 or more exponential clusters,
a bound at 5 % is wrong in 5 to 6 % of samples, and that of Student's t alone in 7 to 12 %."""


class Outcome(StrEnum):
    """What a sample of text says about a budget."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


def bounds(
    value: float, standard_error: float | None, clusters: int | None, *, level: float
) -> tuple[float, float]:
    """One-sided bounds of an estimate: each is wrong with probability `level`.

    An exact number (no standard error and no clusters, or no error at all) is its own bound; an
    estimate whose error is not known, as from a single cluster, is not bounded.

    Args:
        value: the estimate. standard_error: of the value.
        clusters: how many independent ones there are.
        level: between 0 and 0.5, such as 0.05.

    Raises:
        ValueError: the level is not from [0, 0.5].
    """
    if not 0 <= level <= 0.5:
        raise ValueError(f"a one-sided level is from 0 to 0.5, not {level}")
    if standard_error == 0 or (standard_error is None and clusters is None):
        return value, value
    if standard_error is None or clusters is None or clusters < 2 or level == 0:
        return -math.inf, math.inf
    half = reach(clusters, level) * standard_error
    return value - half, value + half


def reach(clusters: int, level: float) -> float:
    """How many standard errors an estimate and its one-sided bound are apart.

    Args:
        clusters: at least 2. level: above 0 and at most 0.5.
    """
    # The quantile of the lower tail, since 1 - level would round to 1 for the first looks.
    t = -t_quantile(level, clusters - 1)
    return t + SKEWNESS * (2 * t * t + 1) / (6 * math.sqrt(clusters))


def windows_to_decide(
    gap: float,
    standard_error: float,
    windows: int,
    clusters: int,
    *,
    level: float,
    power: float = 0.8,
) -> int:
    """About how many windows would decide, if the value is right.

    As many times those that there are as the error has to shrink, by their root, until the bound
    and the deviation that `power` allows fit into the gap. More windows of more clusters need a
    little less, since the bound is closer then.

    Args:
        gap: between the value and the budget, not 0. standard_error: of the value.
        windows, clusters: that it comes from. level: of the bound.
    """
    wanted = (reach(clusters, level) + NormalDist().inv_cdf(power)) * standard_error
    return math.ceil(windows * (wanted / gap) ** 2)


def judge(lower: float, upper: float, budget: float, *, higher_is_better: bool = False) -> Outcome:
    """The outcome for one-sided bounds: exactly at the budget is within it."""
    if higher_is_better:
        lower, upper, budget = -upper, -lower, -budget
    if upper <= budget:
        return Outcome.PASS
    return Outcome.FAIL if lower > budget else Outcome.INCONCLUSIVE


def decide(
    value: float,
    standard_error: float | None,
    clusters: int | None,
    budget: float,
    *,
    level: float,
    higher_is_better: bool = False,
) -> Outcome:
    """`judge` with the `bounds` of an estimate; the arguments are theirs.

    A candidate exactly at the budget passes with at most about the probability `level`, and fails
    with at most as much.
    """
    lower, upper = bounds(value, standard_error, clusters, level=level)
    return judge(lower, upper, budget, higher_is_better=higher_is_better)
