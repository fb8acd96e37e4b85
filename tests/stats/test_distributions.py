"""Quantiles against exact binomial sums, published t tables and closed forms."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.stats.distributions import (
    beta_quantile,
    binomial_cdf,
    regularized_beta,
    t_quantile,
)


def exact_binomial_cdf(successes: int, trials: int, rate: Fraction) -> float:
    return float(
        sum(
            math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k)
            for k in range(successes + 1)
        )
    )


@given(
    trials=st.integers(1, 60),
    share=st.fractions(0, 1, max_denominator=60),
    numerator=st.integers(1, 99),
)
def test_binomial_cdf_equals_exact_sum(trials: int, share: Fraction, numerator: int) -> None:
    successes = int(share * trials)
    rate = Fraction(numerator, 100)
    exact = exact_binomial_cdf(successes, trials, rate)
    assert binomial_cdf(successes, trials, float(rate)) == pytest.approx(exact, rel=1e-11)


def test_binomial_cdf_with_many_trials() -> None:
    # Symmetry: P(B <= n/2) = (1 + P(B = n/2)) / 2 at rate one half.
    n = 200_000
    log_middle = math.lgamma(n + 1) - 2 * math.lgamma(n / 2 + 1) - n * math.log(2)
    assert binomial_cdf(n // 2, n, 0.5) == pytest.approx((1 + math.exp(log_middle)) / 2, rel=1e-9)


def test_binomial_cdf_at_the_ends() -> None:
    assert binomial_cdf(-1, 5, 0.3) == 0
    assert binomial_cdf(5, 5, 0.3) == 1


@pytest.mark.parametrize(
    ("probability", "degrees", "table"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.95, 5, 2.015),
        (0.995, 20, 2.845),
        (0.975, 10**7, 1.960),
    ],
)
def test_t_quantile_equals_table(probability: float, degrees: int, table: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(table, abs=5.1e-4)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-table, abs=5.1e-4)


def test_t_quantile_with_one_degree_is_cauchy() -> None:
    for probability in (0.6, 0.9, 0.999):
        expected = math.tan(math.pi * (probability - 0.5))
        assert t_quantile(probability, 1) == pytest.approx(expected, rel=1e-9)
    assert t_quantile(0.5, 7) == 0


@given(st.floats(0.001, 0.999), st.floats(0.3, 300), st.floats(0.3, 300))
def test_beta_quantile_inverts_the_distribution(p: float, a: float, b: float) -> None:
    x = beta_quantile(p, a, b)
    if 1e-12 < x < 1 - 1e-12:
        assert regularized_beta(a, b, x) == pytest.approx(p, abs=1e-8)


def test_uniform_and_power_closed_forms() -> None:
    assert beta_quantile(0.3, 1, 1) == pytest.approx(0.3)
    assert regularized_beta(3, 1, 0.5) == pytest.approx(0.125)


@pytest.mark.parametrize("arguments", [(0, 1, 0.5), (1, -1, 0.5), (1, 1, 1.5)])
def test_arguments_out_of_range(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="needs a, b > 0"):
        regularized_beta(*arguments)


def test_t_refuses_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="0 < p < 1"):
        t_quantile(1.0, 3)
    with pytest.raises(ValueError, match="0 < p < 1"):
        t_quantile(0.9, 0)
