"""The slope test: what grows is found, what wanders is not, and neighbours are not independent."""

from __future__ import annotations

import random

import pytest

from pytest_qlab.stats.trend import is_growing

TIMES = [float(number) for number in range(200)]


def test_a_line_grows_and_its_mirror_does_not() -> None:
    assert is_growing(TIMES, TIMES)
    assert not is_growing(TIMES, TIMES[::-1])


def test_what_stays_does_not_grow() -> None:
    assert not is_growing(TIMES, [3.0] * 200)
    assert not is_growing(TIMES, [3.0 + number % 2 for number in range(200)])


def test_a_rise_that_does_not_matter_is_none() -> None:
    # From 10 to 12, certain but small; the mean is 11.
    assert not is_growing(TIMES, [10 + time / 100 for time in TIMES])
    assert is_growing(TIMES, [10 + time / 100 for time in TIMES], rise=0.1)


def test_one_late_burst_is_no_trend() -> None:
    assert not is_growing(TIMES, [1.0] * 175 + [100.0] * 25)


def test_the_level_is_kept_for_independent_samples() -> None:
    """Of series without a trend, a share `level` is called growing: within 4 sd of a binomial."""
    draw, level, trials = random.Random(0), 0.05, 2000
    found = sum(
        is_growing(TIMES[:80], [draw.gauss(0, 1) for _ in range(80)], level=level, rise=0.0)
        for _ in range(trials)
    )
    assert abs(found - level * trials) < 4 * (trials * level * (1 - level)) ** 0.5


def test_few_samples_show_nothing() -> None:
    assert not is_growing(TIMES[:7], TIMES[:7])
    assert not is_growing([1.0] * 20, TIMES[:20])


@pytest.mark.parametrize(("times", "values", "blocks"), [([1.0], [], 8), ([], [], 2)])
def test_what_is_no_series_is_refused(times: list[float], values: list[float], blocks: int) -> None:
    with pytest.raises(ValueError, match="slope test"):
        is_growing(times, values, blocks=blocks)
