"""Exact k-means on a line: against all partitions, Lloyd's algorithm, and what must not matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.solvers import kmeans as kmeans_module
from pytest_qlab.solvers.grid import GridRule, fake_quantize
from pytest_qlab.solvers.kmeans import kmeans_rows


def loss_of(points: Tensor, weights: Tensor, centers: Tensor) -> Tensor:
    """Of each row: sum of weight * (point - nearest center)**2, in float64."""
    squares = (points.double().unsqueeze(-1) - centers.double().unsqueeze(1)).square()
    return (weights.double() * squares.amin(-1)).sum(1)


def best_partition(points: list[float], weights: list[float], clusters: int) -> float:
    """The least loss over all ways to cut the sorted points into intervals."""
    pairs = sorted(zip(points, weights, strict=True))
    best = math.inf
    for cuts in itertools.combinations(range(1, len(pairs)), clusters - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(pairs))):
            weight = math.fsum(w for _, w in pairs[start:stop])
            if weight > 0:
                mean = math.fsum(w * x for x, w in pairs[start:stop]) / weight
                total += math.fsum(w * (x - mean) ** 2 for x, w in pairs[start:stop])
        best = min(best, total)
    return best


numbers = st.one_of(
    st.floats(-10, 10, allow_nan=False), st.integers(-3, 3).map(float), st.just(1e-6)
)
importances = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-4, 1e3]))


@settings(deadline=None, max_examples=300)
@given(
    pairs=st.lists(st.tuples(numbers, importances), min_size=1, max_size=10),
    clusters=st.integers(1, 5),
)
def test_no_partition_is_better(pairs: list[tuple[float, float]], clusters: int) -> None:
    clusters = min(clusters, len(pairs))
    points, weights = (list(each) for each in zip(*pairs, strict=True))
    weights = weights if any(weights) else [1.0] * len(weights)
    x, w = torch.tensor([points], dtype=torch.float64), torch.tensor([weights], dtype=torch.float64)
    centers = kmeans_rows(x, w, clusters)
    assert centers.shape == (1, clusters)
    assert bool((centers.diff() >= 0).all())
    spread = sum(weights) * max(abs(max(points)), abs(min(points))) ** 2
    expected = best_partition(points, weights, clusters)
    assert float(loss_of(x, w, centers)) <= expected + 1e-13 * spread


def random_rows(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian points with weights over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(rows, columns, generator=generator)
    return points, torch.randn(rows, columns, generator=generator).mul(2).exp()


def lloyd(points: Tensor, weights: Tensor, centers: Tensor) -> Tensor:
    """One step of Lloyd's algorithm for one row: centers become the means of what is nearest."""
    nearest = (points.unsqueeze(-1) - centers).abs().argmin(-1)
    moved = centers.clone()
    for cluster in range(len(centers)):
        mine = nearest == cluster
        if bool(mine.any()):
            moved[cluster] = (weights[mine] * points[mine]).sum() / weights[mine].sum()
    return moved


@pytest.mark.parametrize("clusters", [4, 16])
def test_lloyd_from_any_start_is_never_better_and_does_not_improve_it(clusters: int) -> None:
    points, weights = (each.double() for each in random_rows(3, 300))
    found = kmeans_rows(points, weights, clusters)
    best = loss_of(points, weights, found)
    generator = torch.Generator().manual_seed(1)
    for row in range(3):
        torch.testing.assert_close(lloyd(points[row], weights[row], found[row]), found[row])
        for _ in range(8):
            start = torch.randperm(300, generator=generator)[:clusters]
            centers = points[row, start].sort().values
            for _ in range(60):
                centers = lloyd(points[row], weights[row], centers)
            loss = loss_of(points[row, None], weights[row, None], centers[None])
            assert float(best[row]) <= float(loss[0]) * (1 + 1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_better_than_a_uniform_grid(bits: int) -> None:
    points, weights = random_rows(8, 200)
    grid = fake_quantize(points, GridRule(bits, mse=True), -1)
    uniform = (weights.double() * (points - grid).double().square()).sum(1)
    found = loss_of(points, weights, kmeans_rows(points, weights, 2**bits))
    assert bool((found < uniform).all())


def test_it_is_no_worse_than_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster", exc_type=ImportError)
    points, weights = random_rows(4, 256)
    found = loss_of(points, weights, kmeans_rows(points, weights, 8))
    for row in range(4):
        theirs = cluster.KMeans(n_clusters=8, random_state=0, n_init="auto", max_iter=50)
        theirs.fit(points[row, :, None].numpy(), sample_weight=weights[row].numpy())
        assert float(found[row]) <= theirs.inertia_ * (1 + 1e-5)


def test_as_many_clusters_as_different_points_leave_no_error() -> None:
    points = torch.tensor([[3.0, -1, 3, -1, 3], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0]])
    for clusters in (2, 3, 5):
        centers = kmeans_rows(points, torch.ones_like(points), clusters)
        assert float(loss_of(points, torch.ones_like(points), centers).max()) < 1e-28


def test_the_order_of_the_columns_does_not_matter() -> None:
    points, weights = random_rows(5, 123)
    order = torch.randperm(123, generator=torch.Generator().manual_seed(3))
    expected = kmeans_rows(points, weights, 8)
    torch.testing.assert_close(kmeans_rows(points[:, order], weights[:, order], 8), expected)


def test_rows_are_solved_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights = random_rows(7, 65)
    expected = kmeans_rows(points, weights, 4)
    monkeypatch.setitem(kmeans_module.POINTS_AT_ONCE, "cpu", 150)
    assert torch.equal(kmeans_rows(points, weights, 4), expected)
    assert torch.equal(kmeans_rows(points[3:4], weights[3:4], 4), expected[3:4])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_centers_follow_the_scale_of_the_points_and_not_that_of_the_weights(scale: float) -> None:
    points, weights = random_rows(3, 40)
    expected = kmeans_rows(points, weights, 4)
    found = kmeans_rows(points * scale, weights, 4)
    torch.testing.assert_close(found / scale, expected, rtol=1e-5, atol=1e-5)
    found = kmeans_rows(points, weights * scale, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_device_finds_the_same() -> None:
    points, weights = random_rows(9, 333)
    found = kmeans_rows(points.cuda(), weights.cuda(), 8)
    torch.testing.assert_close(found.cpu(), kmeans_rows(points, weights, 8))


def test_a_constant_far_away_is_no_loss_of_precision() -> None:
    points, weights = random_rows(2, 50)
    far = points.double() + 1e6
    expected = kmeans_rows(points, weights, 4)
    torch.testing.assert_close(kmeans_rows(far, weights, 4) - 1e6, expected, rtol=0, atol=1e-8)


def test_rows_without_weights_count_all_points_the_same() -> None:
    points, _ = random_rows(2, 30)
    expected = kmeans_rows(points, torch.ones_like(points), 4)
    torch.testing.assert_close(kmeans_rows(points, torch.zeros_like(points), 4), expected)


def test_points_without_weight_do_not_count() -> None:
    points, weights = random_rows(1, 60)
    weights[:, 40:] = 0
    full = kmeans_rows(points, weights, 4)
    part = kmeans_rows(points[:, :40], weights[:, :40], 4)
    losses = [float(loss_of(points, weights, centers)) for centers in (full, part)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
