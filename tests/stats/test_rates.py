"""Bounds of clustered rates: exact without clusters, and coverage where the symmetric ones fail."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.stats.intervals import clopper_pearson
from pytest_qlab.stats.rates import rate_bounds, rate_interval
from scripts.simulate_rates import simulate

# So many clusters that Student's t is the normal distribution.
MANY = 10**7


def binomial_cdf(successes: int, trials: int, rate: float) -> float:
    """P(B <= successes), summed term by term."""
    return math.fsum(
        math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(successes + 1)
    )


@given(st.integers(2, 60), st.integers(0, 60), st.sampled_from([0.3, 0.05, 0.001]))
def test_independent_trials_have_the_exact_bounds(trials: int, given_: int, level: float) -> None:
    events = min(trials, given_)
    lower, upper = rate_bounds(events / trials, trials, trials, 1.0, level=level)
    if events == 0:
        assert lower == 0
    else:
        assert 1 - binomial_cdf(events - 1, trials, lower) == pytest.approx(level, rel=1e-6)
    if events == trials:
        assert upper == 1
    else:
        assert binomial_cdf(events, trials, upper) == pytest.approx(level, rel=1e-6)


def test_a_design_effect_leaves_fewer_trials() -> None:
    """Exactly: 1000 trials with a design effect of 4 are 250."""
    wanted = clopper_pearson(10, 250)
    assert rate_interval(0.04, 1000, MANY, 4.0) == pytest.approx(wanted, rel=2e-3)
    # Five clusters: t is 2.776 rather than 1.962, so 250 become 125.
    few = 250 * (1.962 / 2.776) ** 2
    none = rate_interval(0.0, 1000, 5, 4.0)
    assert none == pytest.approx((0, 1 - 0.025 ** (1 / few)), rel=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(2, 5000), st.integers(2, 500), st.floats(0.5, 20))
def test_bounds_are_in_order_and_mirrored(
    given_: int, trials: int, clusters: int, effect: float
) -> None:
    rate, clusters = min(given_, trials) / trials, min(clusters, trials)
    lower, upper = rate_bounds(rate, trials, clusters, effect, level=0.025)
    assert 0 <= lower <= rate <= upper <= 1
    assert rate_bounds(1 - rate, trials, clusters, effect, level=0.025) == pytest.approx(
        (1 - upper, 1 - lower), abs=1e-9
    )
    wider = rate_bounds(rate, trials, clusters, effect, level=0.001)
    assert wider[0] <= lower + 1e-12
    assert wider[1] >= upper - 1e-12


def test_levels_of_first_looks_are_told_from_zero() -> None:
    """Without events, (1 - upper)^n is the level itself."""
    _, upper = rate_bounds(0.0, 50, 50, 1.0, level=1e-20)
    assert upper == pytest.approx(1 - 1e-20 ** (1 / 50), rel=1e-9)


def test_one_cluster_has_no_interval() -> None:
    assert rate_interval(0.1, 100, 1, None) == (None, None)
    assert rate_interval(0.1, 100, 1, 1.0) == (None, None)


@pytest.mark.parametrize("level", [0.0, 0.6])
def test_level_must_be_one_sided(level: float) -> None:
    with pytest.raises(ValueError, match="one-sided level"):
        rate_bounds(0.1, 100, 10, 1.0, level=level)


@pytest.mark.parametrize(
    "arguments", [(-0.1, 10, 10, 1.0), (0.1, 1, 10, 1.0), (0.1, 10, 1, 1.0), (0.1, 10, 10, 0.0)]
)
def test_arguments_must_make_a_rate(arguments: tuple[float, int, int, float]) -> None:
    with pytest.raises(ValueError, match="a rate needs"):
        rate_bounds(*arguments, level=0.05)


@pytest.mark.parametrize(
    ("rate", "effect", "worst"),
    [
        (0.1, 1.0, 0.04),  # agreement is like this: both kinds of intervals hold
        (0.1, 4.0, 0.045),
        (0.001, 1.0, 0.04),  # 17 events
        (0.001, 4.0, 0.10),
    ],
)
def test_errors_of_clustered_rates(rate: float, effect: float, worst: float) -> None:
    """500 samples of 24 documents with 700 tokens each, whose rates are beta-distributed.

    Each side of a 95 % interval should err with 2.5 %. The dangerous one is the upper side for few
    events; there the symmetric interval errs at least one and a half times as often.
    """
    found = simulate(24, rate, effect, samples=500, seed=3)
    assert found.above < 0.04
    assert found.below < worst
    if rate < 0.01:
        assert found.t_below > 1.5 * found.below
