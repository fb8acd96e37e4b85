"""Paired differences of rates: published values, the score equation, coverage by enumeration."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.stats.intervals import wilson
from pytest_qlab.stats.tasks import mcnemar, tango_interval, task_difference

Z = 1.959963984540054


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, int, int]:
    """b, c and n."""
    n = draw(st.integers(1, 300))
    b = draw(st.integers(0, n))
    return b, draw(st.integers(0, n - b)), n


def likelihood(b: int, c: int, n: int, only_base: float, difference: float) -> float:
    """Log-likelihood of the trinomial; the candidate alone is right with the rest."""
    shares = (only_base, only_base + difference, 1 - 2 * only_base - difference)
    total = 0.0
    for count, share in zip((b, c, n - b - c), shares, strict=True):
        if count:
            total += count * math.log(share) if share > 0 else -math.inf
    return total


def most_likely(b: int, c: int, n: int, difference: float) -> float:
    """The share that only the base model gets right, by ternary search of the likelihood."""
    low, high = max(0.0, -difference), (1 - difference) / 2
    for _ in range(300):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        if likelihood(b, c, n, first, difference) < likelihood(b, c, n, second, difference):
            low = first
        else:
            high = second
    return (low + high) / 2


def test_the_interval_equals_a_published_example() -> None:
    # Cavo et al. 2012 in Fagerland, Lydersen and Laake 2017, Statistical Analysis of Contingency
    # Tables, chapter 8; also what their package contingencytables and PropCIs print.
    assert tango_interval(16, 6, 161) == pytest.approx((-0.1240, -0.0054), abs=5.1e-5)


@pytest.mark.parametrize(
    ("b", "c", "n"), [(7, 1, 21), (16, 6, 161), (0, 5, 40), (9, 0, 30), (3, 3, 12), (120, 80, 1000)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_limits_solve_the_score_equation(b: int, c: int, n: int, confidence: float) -> None:
    """With the share under each limit from a search of the likelihood, not from a formula."""
    z = Z if confidence == 0.95 else 1.6448536269514722
    for limit, side in zip(tango_interval(b, c, n, confidence=confidence), (1, -1), strict=True):
        only_base = most_likely(b, c, n, limit)
        deviation = math.sqrt(n * (2 * only_base + limit - limit**2))
        assert (c - b - n * limit) / deviation == pytest.approx(side * z, rel=2e-4)


@given(st.integers(1, 5000))
def test_without_a_changed_answer_the_interval_is_the_closed_form(n: int) -> None:
    """All likelihood is in the answers that agree, so |d| n / sqrt(n |d| (1 - |d|)) = z."""
    limit = Z * Z / (n + Z * Z)
    assert tango_interval(0, 0, n) == pytest.approx((-limit, limit), rel=1e-9)


@given(tables())
def test_models_may_be_exchanged(table: tuple[int, int, int]) -> None:
    b, c, n = table
    here, there = task_difference(b, c, n), task_difference(c, b, n)
    assert (there.value, there.lower, there.upper) == (-here.value, -here.upper, -here.lower)
    assert (there.p_value, there.flips) == (here.p_value, here.flips)
    assert there.standard_error == here.standard_error
    assert -1 <= here.lower <= here.value <= here.upper <= 1


def test_all_answers_changed() -> None:
    found = task_difference(50, 0, 50)
    assert (found.value, found.lower, found.flips) == (-1.0, -1.0, 1.0)
    assert -1 < found.upper < -0.8


def wald(b: int, c: int, n: int) -> tuple[float, float]:
    half = Z * math.sqrt(b + c - (c - b) ** 2 / n) / n
    return (c - b) / n - half, (c - b) / n + half


def coverage(n: int, b_share: float, c_share: float) -> tuple[float, float]:
    """How often Tango's interval and Wald's hold the true difference, over all tables."""
    rest, difference = 1 - b_share - c_share, c_share - b_share
    tango = simple = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            ways = math.comb(n, b) * math.comb(n - b, c)
            chance = ways * b_share**b * c_share**c * rest ** (n - b - c)
            if chance < 1e-9:
                continue
            lower, upper = tango_interval(b, c, n)
            tango += chance * (lower <= difference <= upper)
            lower, upper = wald(b, c, n)
            simple += chance * (lower <= difference <= upper)
    return tango, simple


@pytest.mark.parametrize(
    ("n", "b_share", "c_share"),
    [(25, 0.15, 0.05), (25, 0.02, 0.02), (40, 0.1, 0.1), (30, 0.3, 0.2), (40, 0.05, 0.0)],
)
def test_coverage_over_all_tables(n: int, b_share: float, c_share: float) -> None:
    tango, simple = coverage(n, b_share, c_share)
    assert tango > 0.925
    if c_share == 0:  # where answers change in one direction only, the plain interval fails
        assert simple < 0.9 < tango


@pytest.mark.parametrize(("b", "c", "n"), [(16, 6, 161), (40, 30, 400), (200, 150, 2000)])
def test_the_interval_is_close_to_newcombes(b: int, c: int, n: int) -> None:
    """Newcombe 1998, method 10: Wilson's intervals of both rates, put together."""
    both = (n - b - c) // 2
    base, ours, neither = both + b, both + c, n - both - b - c
    (l1, u1), (l2, u2) = wilson(ours, n), wilson(base, n)
    p1, p2 = ours / n, base / n
    product = both * neither - b * c
    corrected = max(0.0, product - n / 2) if product > 0 else float(product)
    phi = corrected / math.sqrt(base * (n - base) * ours * (n - ours))

    def arm(first: float, second: float) -> float:
        return math.sqrt(first**2 - 2 * phi * first * second + second**2)

    expected = (p1 - p2 - arm(p1 - l1, u2 - p2), p1 - p2 + arm(u1 - p1, p2 - l2))
    width = expected[1] - expected[0]
    assert tango_interval(b, c, n) == pytest.approx(expected, abs=0.06 * width)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sum_of_binomial_terms(b: int, c: int) -> None:
    n = b + c
    as_rare = [math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, b)]
    assert mcnemar(b, c) == pytest.approx(min(1.0, sum(as_rare) / 2**n), rel=1e-9)


def test_mcnemar_equals_published_values() -> None:
    # Cavo et al. 2012 in Fagerland, Lydersen and Laake 2017: 6 against 16.
    assert mcnemar(6, 16) == pytest.approx(0.052479, abs=5e-7)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3000, 2500) < 1e-9


def test_the_standard_error_is_that_of_the_differences() -> None:
    """+1, -1 and 0 for each question: the standard deviation of those over sqrt(n)."""
    found = task_difference(12, 20, 100)
    values = [-1] * 12 + [1] * 20 + [0] * 68
    mean = sum(values) / 100
    variance = sum((value - mean) ** 2 for value in values) / 100
    assert found.value == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt(variance / 100))
    assert (found.flips, found.n) == (0.32, 100)


@pytest.mark.parametrize(("b", "c", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_counts_must_fit(b: int, c: int, n: int) -> None:
    with pytest.raises(ValueError, match="a paired difference needs"):
        task_difference(b, c, n)
