"""Three outcomes, against t tables, symmetry and simulated gates, normal and skewed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_qlab.stats.decisions import Outcome, bounds, decide, judge, reach

NUMBERS = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    # t of 10 and of 120 degrees of freedom, from a table.
    ("clusters", "level", "t"),
    [(11, 0.05, 1.812), (11, 0.01, 2.764), (121, 0.05, 1.658), (11, 0.5, 0.0)],
)
def test_bounds_are_those_of_the_table_widened_for_skewness(
    clusters: int, level: float, t: float
) -> None:
    half = 0.5 * (t + 2.5 * (2 * t**2 + 1) / 6 / clusters**0.5)
    assert bounds(2.0, 0.5, clusters, level=level) == pytest.approx((2 - half, 2 + half), abs=6e-4)


def test_of_many_clusters_the_bounds_are_normal() -> None:
    assert reach(10**8, 0.05) == pytest.approx(1.6449, abs=5e-4)
    assert reach(10**8, 0.001) == pytest.approx(3.0902, abs=2e-3)


def test_a_budget_inside_the_bounds_is_not_decided() -> None:
    lower, upper = bounds(2.0, 0.5, 11, level=0.05)
    assert decide(2.0, 0.5, 11, upper, level=0.05) is Outcome.PASS
    assert decide(2.0, 0.5, 11, upper - 1e-9, level=0.05) is Outcome.INCONCLUSIVE
    assert decide(2.0, 0.5, 11, lower, level=0.05) is Outcome.INCONCLUSIVE
    assert decide(2.0, 0.5, 11, lower - 1e-9, level=0.05) is Outcome.FAIL


@given(NUMBERS, st.floats(1e-6, 1e3), st.integers(2, 500), NUMBERS, st.floats(1e-9, 0.5))
def test_higher_is_better_is_the_mirror_image(
    value: float, error: float, clusters: int, budget: float, level: float
) -> None:
    once = decide(value, error, clusters, budget, level=level)
    mirrored = decide(-value, error, clusters, -budget, level=level, higher_is_better=True)
    assert once is mirrored


@pytest.mark.parametrize("error", [None, 0.0])
def test_exact_numbers_decide_at_once(error: float | None) -> None:
    assert decide(3.0, error, None, 3.0, level=0.01) is Outcome.PASS
    assert decide(3.0, error, None, 2.99, level=0.01) is Outcome.FAIL
    assert decide(3.0, error, None, 3.0, level=0.01, higher_is_better=True) is Outcome.PASS
    assert decide(3.0, error, None, 3.01, level=0.01, higher_is_better=True) is Outcome.FAIL


def test_an_error_that_is_not_known_decides_nothing() -> None:
    assert bounds(3.0, None, 1, level=0.05) == (-math.inf, math.inf)
    assert decide(3.0, None, 1, 1e9, level=0.05) is Outcome.INCONCLUSIVE
    assert decide(3.0, 0.1, 20, 1e9, level=0.0) is Outcome.INCONCLUSIVE


def test_levels_of_first_looks_are_told_from_zero() -> None:
    """1 - 1e-20 is 1 in floating point; the bounds are far, but they are there."""
    lower, upper = bounds(0.0, 1.0, 1000, level=1e-20)
    # z of 1e-20 is 9.26; with 999 degrees of freedom a little more, and 2.3 for skewness.
    assert -12.3 < lower < -11.5
    assert upper == -lower


def test_outcomes_are_words() -> None:
    assert [str(outcome) for outcome in Outcome] == ["pass", "fail", "inconclusive"]
    assert judge(0.1, 0.3, 0.2) == "inconclusive"


@pytest.mark.parametrize("level", [-0.1, 0.51])
def test_level_must_be_one_sided(level: float) -> None:
    with pytest.raises(ValueError, match="one-sided level"):
        bounds(0.0, 1.0, 5, level=level)


def errors_at_the_budget(samples: NDArray[np.float64], budget: float) -> tuple[float, float]:
    """How often candidates pass and fail whose mean is the budget; a row for each run."""
    clusters = samples.shape[1]
    errors = samples.std(axis=1, ddof=1) / math.sqrt(clusters)
    found = [
        decide(value, error, clusters, budget, level=0.05)
        for value, error in zip(samples.mean(axis=1).tolist(), errors.tolist(), strict=True)
    ]
    return tuple(found.count(each) / len(found) for each in (Outcome.PASS, Outcome.FAIL))  # type: ignore[return-value]


@pytest.mark.parametrize("clusters", [16, 45])
def test_at_the_budget_no_error_is_more_frequent_than_allowed(clusters: int) -> None:
    samples = np.random.default_rng(4).normal(size=(4000, clusters))
    assert max(errors_at_the_budget(samples, 0.0)) < 0.04


@pytest.mark.parametrize("clusters", [16, 45, 150])
def test_documents_as_skewed_as_an_exponential_are_allowed_for(clusters: int) -> None:
    """A few documents are damaged most; Student's t alone would pass 7 to 12 % of candidates."""
    samples = np.random.default_rng(5).exponential(size=(6000, clusters))
    passed, failed = errors_at_the_budget(samples, 1.0)
    # 0.003 is one standard deviation of what 6000 runs say.
    assert 0.04 < passed < 0.066
    assert failed < 0.02
    # Of measures of which more is better, the lower bound is the one that counts.
    assert errors_at_the_budget(-samples, -1.0) == (failed, passed)
