"""Bounds of a rate over tokens that are clustered in documents.

Source: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of
positive counts estimated from survey data", Survey Methodology 24: Clopper and Pearson's interval
with the effective sample size for the number of trials. For common events it equals that of
Student's t; for few, whose estimate is far from normal, it errs less often and more evenly.
"""

from __future__ import annotations

from pytest_qlab.stats.distributions import beta_quantile, t_quantile


def rate_bounds(
    rate: float, trials: int, clusters: int, design_effect: float, *, level: float
) -> tuple[float, float]:
    """One-sided bounds of a rate: each is wrong with probability `level`.

    The effective number of trials is `trials` over the design effect, and that times
    (t of trials - 1 degrees of freedom / t of clusters - 1)², since the design effect itself is
    estimated from so many clusters.

    Args:
        rate: share of the trials. clusters: independent groups of them, at least 2.
        design_effect: squared standard error over that of independent trials. Where no event (or
            nothing else) was seen there is none to see: give one from elsewhere.
        level: above 0 and at most 0.5.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (0 <= rate <= 1 and trials > 1 and clusters > 1 and design_effect > 0):
        raise ValueError(
            "a rate needs 0 <= rate <= 1, several trials and clusters and a design effect above 0, "
            f"not {rate}, {trials}, {clusters}, {design_effect}"
        )
    if not 0 < level <= 0.5:
        raise ValueError(f"a one-sided level is above 0 and at most 0.5, not {level}")
    effective = trials / design_effect
    if level < 0.5:
        effective *= (t_quantile(level, trials - 1) / t_quantile(level, clusters - 1)) ** 2
    events = rate * effective
    others = effective - events
    lower = 0.0 if rate == 0 else beta_quantile(level, events, others + 1)
    # The lower tail of the others, since 1 - level would round to 1 for the first looks.
    upper = 1.0 if rate == 1 else 1 - beta_quantile(level, others, events + 1)
    return min(lower, rate), max(upper, rate)


def rate_interval(
    rate: float,
    trials: int,
    clusters: int,
    design_effect: float | None,
    *,
    confidence: float = 0.95,
) -> tuple[float | None, float | None]:
    """The two-sided interval; (None, None) with one cluster or without a design effect."""
    if clusters < 2 or design_effect is None:
        return None, None
    return rate_bounds(rate, trials, clusters, design_effect, level=(1 - confidence) / 2)
