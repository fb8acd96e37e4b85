"""Rates and order statistics against published values and exact coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.stats.intervals import (
    MEDIAN_SAMPLES,
    clopper_pearson,
    quantile_ranks,
    sample_quantile,
    samples_to_bound,
    wilson,
)


def exact_cdf(successes: int, trials: int, rate: float) -> float:
    """P(B <= successes), summed term by term."""
    return math.fsum(
        math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(successes + 1)
    )


def test_clopper_pearson_without_failures_is_the_closed_form() -> None:
    lower, upper = clopper_pearson(50, 50)
    assert upper == 1
    assert lower == pytest.approx(0.025 ** (1 / 50), rel=1e-9)
    assert clopper_pearson(0, 50) == pytest.approx((0, 1 - 0.025 ** (1 / 50)), rel=1e-9)


@given(st.integers(1, 80), st.integers(0, 80))
def test_clopper_pearson_puts_half_the_error_on_each_side(trials: int, given_: int) -> None:
    successes = min(trials, given_)
    lower, upper = clopper_pearson(successes, trials)
    if successes > 0:
        assert 1 - exact_cdf(successes - 1, trials, lower) == pytest.approx(0.025, abs=1e-9)
    if successes < trials:
        assert exact_cdf(successes, trials, upper) == pytest.approx(0.025, abs=1e-9)


def test_wilson_equals_published_example() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5.1e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5.1e-5)
    assert wilson(20, 20)[1] == 1.0


@given(st.integers(1, 200), st.integers(0, 200))
def test_wilson_solves_the_score_equation(trials: int, given_: int) -> None:
    successes = min(trials, given_)
    rate = successes / trials
    for bound in wilson(successes, trials):
        if 0 < bound < 1:
            score = abs(rate - bound) / math.sqrt(bound * (1 - bound) / trials)
            assert score == pytest.approx(1.959964, rel=1e-5)


@pytest.mark.parametrize("interval", [clopper_pearson, wilson])
def test_counts_must_make_a_rate(interval: object) -> None:
    assert callable(interval)
    for counts in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="a rate needs"):
            interval(*counts)


def test_ranks_of_p99_are_the_known_ones() -> None:
    # design: n = 1000 has ranks 983 and 997; two-sided 95 % needs 368 samples, one-sided 299.
    assert quantile_ranks(1000, 0.99) == (983, 997)
    assert quantile_ranks(367, 0.99)[1] is None
    assert quantile_ranks(368, 0.99)[1] == 368
    assert samples_to_bound(0.99) == 299
    assert quantile_ranks(298, 0.99, confidence=0.9)[1] is None
    assert quantile_ranks(299, 0.99, confidence=0.9)[1] == 299


def test_a_median_takes_six_samples() -> None:
    # Both extremes lie on one side of it with probability 2 / 2^n: 6.25 % for 5, 3.1 % for 6.
    assert 2 * 0.5 ** (MEDIAN_SAMPLES - 1) > 0.05 >= 2 * 0.5**MEDIAN_SAMPLES
    assert quantile_ranks(MEDIAN_SAMPLES - 1, 0.5) == (None, None)
    assert quantile_ranks(MEDIAN_SAMPLES, 0.5) == (1, MEDIAN_SAMPLES)


@given(st.integers(1, 120), st.sampled_from([0.25, 0.5, 0.9]))
def test_ranks_are_the_tightest_that_keep_the_error(samples: int, quantile: float) -> None:
    lower, upper = quantile_ranks(samples, quantile)
    allowed = [k for k in range(1, samples + 1) if exact_cdf(k - 1, samples, quantile) <= 0.025]
    enough = [k for k in range(1, samples + 1) if exact_cdf(k - 1, samples, quantile) >= 0.975]
    assert lower == (max(allowed) if allowed else None)
    assert upper == (min(enough) if enough else None)


def test_sample_quantile_of_a_permutation() -> None:
    values = np.random.default_rng(0).permutation(1000).astype(float).tolist()
    found = sample_quantile(values, 0.99)
    assert (found.value, found.lower, found.upper) == (989.0, 982.0, 996.0)
    assert sample_quantile(values, 0.5).value == 499.0


def test_sample_quantile_needs_values() -> None:
    with pytest.raises(ValueError, match="not defined"):
        sample_quantile([], 0.5)
    with pytest.raises(ValueError, match="not defined"):
        sample_quantile([1.0], 1.0)
