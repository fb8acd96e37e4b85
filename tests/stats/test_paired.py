"""Cluster-robust estimates against formulas written out by hand, and their coverage."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_qlab.stats.distributions import t_quantile
from pytest_qlab.stats.paired import (
    Spread,
    cluster_index,
    interval,
    log_ratio,
    mean_influence,
    spread,
    token_mean,
)

WINDOWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 40), st.floats(-3, 3)), min_size=3, max_size=30
)


def estimate(rows: list[tuple[int, int, float]]) -> Spread:
    """The token mean of windows given as (document, tokens, mean)."""
    documents, counts, means = (np.array(column) for column in zip(*rows, strict=True))
    return token_mean(means * counts, counts, cluster_index(documents))


def by_hand(rows: list[tuple[int, int, float]]) -> tuple[float, float]:
    """Mean and standard error by the formula of the ratio estimator, in loops."""
    total = sum(n for _, n, _ in rows)
    mean = sum(n * m for _, n, m in rows) / total
    documents = sorted({d for d, _, _ in rows})
    squares = 0.0
    for document in documents:
        squares += sum(n * (m - mean) for d, n, m in rows if d == document) ** 2
    c = len(documents)
    return mean, math.sqrt(c / (c - 1) * squares) / total


@given(WINDOWS.filter(lambda rows: len({row[0] for row in rows}) > 1))
def test_token_mean_equals_hand_formula(rows: list[tuple[int, int, float]]) -> None:
    mean, error = by_hand(rows)
    found = estimate(rows)
    clusters = len({row[0] for row in rows})
    half = t_quantile(0.975, clusters - 1) * error
    assert found.value == pytest.approx(mean, abs=1e-12)
    assert found.standard_error == pytest.approx(error, abs=1e-12)
    assert found.lower == pytest.approx(mean - half, abs=1e-9)
    assert found.upper == pytest.approx(mean + half, abs=1e-9)
    assert found.clusters == clusters


def test_one_window_a_document_is_the_usual_t_interval() -> None:
    values = [0.1, 0.4, -0.2, 0.3, 0.15]
    found = estimate([(i, 1, v) for i, v in enumerate(values)])
    error = statistics.stdev(values) / math.sqrt(5)
    assert found.standard_error == pytest.approx(error)
    assert found.upper == pytest.approx(statistics.mean(values) + 2.776445 * error, abs=1e-6)


@given(WINDOWS, st.randoms(use_true_random=False))
def test_order_and_names_of_documents_do_not_matter(
    rows: list[tuple[int, int, float]], random: object
) -> None:
    shuffle = getattr(random, "shuffle")  # noqa: B009
    shuffled = [((row[0] * 7 + 3) % 11, *row[1:]) for row in rows]
    shuffle(shuffled)
    a, b = estimate(rows), estimate(shuffled)
    assert a.value == pytest.approx(b.value, abs=1e-12)
    if len({row[0] for row in rows}) > 1:
        assert a.standard_error == pytest.approx(b.standard_error, abs=1e-12)


@given(WINDOWS.filter(lambda rows: len({row[0] for row in rows}) > 1), st.floats(-5, 5))
def test_scale_equivariance(rows: list[tuple[int, int, float]], scale: float) -> None:
    a = estimate(rows)
    b = estimate([(d, n, scale * m) for d, n, m in rows])
    assert a.standard_error is not None
    assert b.value == pytest.approx(scale * a.value, abs=1e-10)
    assert b.standard_error == pytest.approx(abs(scale) * a.standard_error, abs=1e-10)


@given(WINDOWS.filter(lambda rows: len({row[0] for row in rows}) > 1))
def test_cutting_a_window_in_two_changes_nothing(rows: list[tuple[int, int, float]]) -> None:
    document, count, mean = rows[0]
    cut = [(document, count, mean - 1), (document, count, mean + 1), *rows[1:]]
    whole = [(document, 2 * count, mean), *rows[1:]]
    assert estimate(cut).value == pytest.approx(estimate(whole).value, abs=1e-12)
    assert estimate(cut).standard_error == pytest.approx(estimate(whole).standard_error, abs=1e-12)


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = token_mean(
        np.array([3.0, 5.0]), np.array([3, 5]), np.array([0, 1]), squares=np.array([3.0, 5.0])
    )
    assert (found.value, found.lower, found.upper) == (1.0, 1.0, 1.0)
    assert found.design_effect == 1.0


def test_one_document_of_few_windows_has_no_interval() -> None:
    clusters = cluster_index(np.zeros(15, dtype=int))
    found = token_mean(np.arange(15.0), np.ones(15), clusters, squares=np.arange(15.0) ** 2)
    assert found.value == 7
    assert (found.standard_error, found.lower, found.design_effect) == (None, None, None)
    assert interval(1.0, None, 1) == (None, None)


def test_one_long_document_is_cut_into_blocks_of_neighbours() -> None:
    index = cluster_index(np.full(20, 4))
    assert index.tolist() == [0] * 8 + [1] * 12
    assert cluster_index(np.full(1000, 0)).max() == 99
    assert cluster_index(np.array([9, 2, 9, 5])).tolist() == [2, 0, 2, 1]


def test_design_effect_of_whole_documents_is_their_size() -> None:
    """Tokens that repeat their document's value carry as much as one token: DEFF = n."""
    values = np.random.default_rng(0).normal(size=400)
    tokens = 25
    found = token_mean(
        values * tokens, np.full(400, tokens), np.arange(400), squares=values**2 * tokens
    )
    assert found.design_effect == pytest.approx(tokens, rel=0.01)


def test_design_effect_of_independent_tokens_is_one() -> None:
    values = np.random.default_rng(1).normal(size=(2000, 10))
    found = token_mean(
        values.sum(axis=1), np.full(2000, 10), np.arange(2000), squares=(values**2).sum(axis=1)
    )
    assert found.design_effect == pytest.approx(1, abs=0.12)


def test_log_ratio_equals_numerical_derivative() -> None:
    """Leave-one-out changes of ln(sum a / sum b) are the influences, to first order."""
    generator = np.random.default_rng(2)
    a, b = generator.uniform(5, 6, 500), generator.uniform(1, 2, 500)
    found = log_ratio(a, b, np.arange(500))
    assert found.value == pytest.approx(math.log(a.sum() / b.sum()))
    full = math.log(a.sum() / b.sum())
    left_out = np.log((a.sum() - a) / (b.sum() - b)) - full
    jackknife = math.sqrt((left_out**2).sum() * 499 / 500)
    assert found.standard_error == pytest.approx(jackknife, rel=0.01)


def test_influences_sum_to_zero() -> None:
    generator = np.random.default_rng(3)
    counts = generator.integers(1, 50, 30)
    assert mean_influence(generator.normal(size=30) * counts, counts).sum() == pytest.approx(0)


def clustered_sample(generator: np.random.Generator) -> tuple[NDArray[Any], ...]:
    """40 documents of 1 to 4 windows of 10 to 60 tokens; document effects as large as noise."""
    windows = generator.integers(1, 5, 40)
    documents = np.repeat(np.arange(40), windows)
    counts = generator.integers(10, 61, documents.size)
    means = 0.3 + generator.gamma(2.0, 0.5, 40)[documents] - 1.0
    means = means + generator.normal(size=documents.size) / 2
    return means * counts, counts, cluster_index(documents)


def test_nominal_95_percent_intervals_cover_and_iid_ones_do_not() -> None:
    generator = np.random.default_rng(20)
    resamples, covered, covered_by_windows = 600, 0, 0
    for _ in range(resamples):
        sums, counts, clusters = clustered_sample(generator)
        robust = token_mean(sums, counts, clusters)
        naive = spread(robust.value, mean_influence(sums, counts), np.arange(counts.size))
        assert robust.lower is not None
        assert robust.upper is not None
        assert naive.lower is not None
        assert naive.upper is not None
        covered += robust.lower <= 0.3 <= robust.upper
        covered_by_windows += naive.lower <= 0.3 <= naive.upper
    assert 0.92 <= covered / resamples <= 0.98
    assert covered_by_windows / resamples < 0.91


@settings(max_examples=20)
@given(st.integers(2, 30))
def test_interval_uses_t_with_one_degree_less(clusters: int) -> None:
    lower, upper = interval(2.0, 0.5, clusters)
    assert upper == pytest.approx(2 + 0.5 * t_quantile(0.975, clusters - 1))
    assert lower == pytest.approx(2 - 0.5 * t_quantile(0.975, clusters - 1))
