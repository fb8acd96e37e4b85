"""Levels of several looks against published boundaries, and against simulated paths."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.stats.sequential import boundaries, crossing, spent

NORMAL = NormalDist()


def z_values(levels: tuple[float, ...]) -> list[float]:
    return [-NORMAL.inv_cdf(level) for level in levels]


@pytest.mark.parametrize(
    ("looks", "published"),
    [
        # Two-sided 0.05: R package ldbounds, and Reboussin et al. 2000, table for asf = 1.
        (4, (4.3326, 2.9631, 2.3590, 2.0141)),
        (5, (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
    ],
)
def test_equal_looks_have_the_published_boundaries(
    looks: int, published: tuple[float, ...]
) -> None:
    found = boundaries([k / looks for k in range(1, looks + 1)], 0.025)
    assert z_values(found) == pytest.approx(published, abs=2e-4)


@pytest.mark.parametrize(
    ("published", "error"),
    [
        ([4.049, 2.863, 2.337, 2.024], 0.05),  # O'Brien and Fleming, 4 looks
        ([2.361] * 4, 0.05),  # Pocock, 4 looks: Jennison and Turnbull 2000, table 2.1
        ([4.562, 3.226, 2.634, 2.281, 2.040], 0.05),  # O'Brien and Fleming, 5 looks
    ],
)
def test_published_designs_err_as_published(published: list[float], error: float) -> None:
    looks = len(published)
    levels = [1 - NORMAL.cdf(z) for z in published]
    found = sum(crossing([k / looks for k in range(1, looks + 1)], levels))
    assert 2 * found == pytest.approx(error, rel=2e-3)


def test_one_look_is_the_plain_level() -> None:
    assert boundaries([1], 0.05) == pytest.approx((0.05,))
    assert boundaries([1.0], 0.5) == pytest.approx((0.5,))


def test_two_looks_equal_the_bivariate_normal() -> None:
    """P(Z1 <= a, Z2 > b) by summing over a fine grid of the first look, the tail exact."""
    first, second = z_values(boundaries([0.5, 1.0], 0.05))
    assert NORMAL.cdf(-first) == pytest.approx(spent(0.5, 0.05))
    edges = np.linspace(-9, first, 40_001)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    reached = [
        NORMAL.pdf(z) * NORMAL.cdf(-(second - math.sqrt(0.5) * z) / math.sqrt(0.5)) * width
        for z in middles.tolist()
    ]
    assert spent(0.5, 0.05) + math.fsum(reached) == pytest.approx(0.05, abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    alpha=st.floats(0.001, 0.5),
)
def test_all_that_is_to_be_spent_is_spent(parts: list[int], alpha: float) -> None:
    fractions = [part / sum(parts) for part in itertools.accumulate(parts)]
    levels = boundaries(fractions, alpha)
    assert all(0 < level <= alpha * (1 + 1e-9) for level in levels)
    errors = list(itertools.accumulate(crossing(fractions, levels)))
    assert errors == pytest.approx([spent(t, alpha) for t in fractions], rel=1e-6, abs=1e-12)
    assert errors[-1] == pytest.approx(alpha, rel=1e-6)


def test_simulated_paths_err_as_wanted() -> None:
    """200,000 random walks of 16 steps: looks at a quarter, a half and all of them."""
    walks = np.cumsum(np.random.default_rng(1).normal(size=(200_000, 16)), axis=1)
    bounds = z_values(boundaries([0.25, 0.5, 1.0], 0.1))
    beyond = [walks[:, n - 1] / math.sqrt(n) > z for n, z in zip((4, 8, 16), bounds, strict=True)]
    assert np.logical_or.reduce(beyond).mean() == pytest.approx(0.1, abs=0.0025)
    # Looking three times at the uncorrected level errs far more often.
    naive = [walks[:, n - 1] / math.sqrt(n) > 1.2816 for n in (4, 8, 16)]
    assert np.logical_or.reduce(naive).mean() > 0.15


@pytest.mark.parametrize("looks", [[], [0, 1], [0.5, 0.5], [0.6, 0.3], [0.5, 1.1], [-0.5, 1]])
def test_looks_must_increase_up_to_all(looks: list[float]) -> None:
    with pytest.raises(ValueError, match="increasing fractions"):
        boundaries(looks, 0.05)


@pytest.mark.parametrize("alpha", [0, 0.6, -1])
def test_the_error_must_be_an_error(alpha: float) -> None:
    with pytest.raises(ValueError, match="one-sided error"):
        boundaries([1], alpha)
