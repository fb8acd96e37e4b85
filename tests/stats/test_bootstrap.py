"""The vectorised bootstrap against plain resampling, and its coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_qlab.stats.bootstrap import (
    _canonical,
    cluster_counts,
    clustered_quantiles,
    expanded_tail,
    median_ratio,
)


def slow_replicates(
    values: NDArray[np.float64],
    clusters: NDArray[np.int64],
    quantile: float,
    counts: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Write the resampled tokens out, cluster by cluster, and take numpy's quantile of them."""
    found = []
    for row in counts:
        drawn = [np.tile(values[clusters == c], int(row[c])) for c in range(len(row))]
        found.append(np.quantile(np.concatenate(drawn), quantile, method="inverted_cdf"))
    return np.array(found)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clusters=st.integers(2, 9),
    tokens=st.integers(2, 150),
    quantile=st.sampled_from([0.1, 0.5, 0.95, 0.99]),
    ties=st.booleans(),
)
def test_equals_plain_resampling(
    seed: int, clusters: int, tokens: int, quantile: float, ties: bool
) -> None:
    generator = np.random.default_rng(seed)
    members = np.concatenate(
        [np.arange(clusters), generator.integers(clusters, size=tokens)]
    ).astype(np.int64)
    values = generator.normal(size=members.size)
    values = np.round(values) if ties else values
    [found] = clustered_quantiles(values, members, [quantile], replicates=60, seed=seed)
    counts = cluster_counts(clusters, 60, seed)
    slow = slow_replicates(values, _canonical(values, members), quantile, counts)
    value = np.quantile(values, quantile, method="inverted_cdf")
    assert found.value == value
    tail = expanded_tail(0.025, clusters)
    # numpy interpolates between replicates in another order for one quantile than for two.
    assert found.lower == pytest.approx(min(np.quantile(slow, tail), value), abs=1e-12)
    assert found.upper == pytest.approx(max(np.quantile(slow, 1 - tail), value), abs=1e-12)


def test_of_few_clusters_replicates_further_out_are_taken() -> None:
    # t at 97.5 % of 10 and of 44 degrees of freedom is 2.2281 and 2.0154; P(Z < -2.3369) = 0.00972.
    assert expanded_tail(0.025, 11) == pytest.approx(0.00972, abs=1e-5)
    assert expanded_tail(0.025, 45) == pytest.approx(0.02077, abs=1e-5)
    assert expanded_tail(0.025, 10**6) == pytest.approx(0.025, abs=1e-6)


def test_counts_are_resamples_of_all_clusters() -> None:
    counts = cluster_counts(7, 3000, seed=1)
    assert counts.shape == (3000, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.1)
    # A binomial count with 7 trials of 1/7 has variance 6/7.
    assert counts.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.1)


def test_same_seed_same_bits_and_other_seed_other_interval() -> None:
    generator = np.random.default_rng(0)
    values, members = generator.gamma(1, size=900), np.repeat(np.arange(30), 30)
    once, again, other = (
        clustered_quantiles(values, members, [0.5, 0.99], seed=seed) for seed in (3, 3, 4)
    )
    assert once == again
    assert once != other


def test_order_of_tokens_and_names_of_clusters_do_not_matter() -> None:
    generator = np.random.default_rng(5)
    members = np.sort(generator.integers(12, size=700))
    values = generator.gamma(1, size=700)
    renamed = generator.permutation(12)[members]
    order = np.argsort(renamed, kind="stable")
    expected = clustered_quantiles(values, members, [0.5, 0.99])
    assert clustered_quantiles(values[order], renamed[order], [0.5, 0.99]) == expected


def test_scale_equivariance() -> None:
    generator = np.random.default_rng(6)
    values, members = generator.gamma(1, size=400), np.repeat(np.arange(20), 20)
    [once] = clustered_quantiles(values, members, [0.9])
    [twice] = clustered_quantiles(2 * values, members, [0.9])
    assert once.lower is not None
    assert once.upper is not None
    assert (twice.value, twice.lower) == (2 * once.value, 2 * once.lower)
    assert twice.upper == pytest.approx(2 * once.upper)


def test_one_cluster_has_no_interval() -> None:
    [found] = clustered_quantiles(np.arange(100.0), np.zeros(100, dtype=np.int64), [0.99])
    assert (found.value, found.lower, found.upper) == (98.0, None, None)


def test_coverage_of_the_median_of_clustered_tokens() -> None:
    """Documents shift their tokens by as much as tokens vary; the true median is 0."""
    generator = np.random.default_rng(8)
    resamples, covered, covered_by_tokens = 400, 0, 0
    for number in range(resamples):
        shift = generator.normal(size=(30, 1))
        values = (shift + generator.normal(size=(30, 12))).ravel()
        members = np.repeat(np.arange(30), 12)
        [robust] = clustered_quantiles(values, members, [0.5], replicates=400)
        assert robust.lower is not None
        assert robust.upper is not None
        covered += robust.lower <= 0 <= robust.upper
        if number % 4 == 0:
            [naive] = clustered_quantiles(values, np.arange(360), [0.5], replicates=200)
            assert naive.lower is not None
            assert naive.upper is not None
            covered_by_tokens += naive.lower <= 0 <= naive.upper
    assert 0.92 <= covered / resamples <= 0.98
    assert covered_by_tokens / (resamples / 4) < 0.75


def test_median_ratio_cancels_what_pairs_share() -> None:
    generator = np.random.default_rng(9)
    machine = generator.gamma(2, size=300) + 1
    value, lower, upper = median_ratio((2.5 * machine).tolist(), machine.tolist())
    assert (value, lower, upper) == pytest.approx((2.5, 2.5, 2.5))


def test_median_ratio_covers_the_true_ratio() -> None:
    generator = np.random.default_rng(10)
    covered = 0
    for _ in range(200):
        machine = generator.lognormal(sigma=0.3, size=60)
        above = 1.4 * machine * generator.lognormal(sigma=0.1, size=60)
        below = machine * generator.lognormal(sigma=0.1, size=60)
        _, lower, upper = median_ratio(above.tolist(), below.tolist(), replicates=300)
        covered += lower <= 1.4 <= upper
    assert 0.91 <= covered / 200 <= 1.0


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_median_ratio_needs_positive_pairs(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="equally many positive"):
        median_ratio(above, below)
