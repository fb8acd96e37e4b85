"""The order in which windows are drawn: nested, spread, each once; neighbours only on request."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.data.windows import looks_of, make_windows
from pytest_qlab.errors import DataError
from tests.data.test_windows import PLAIN, _document

COUNTS = st.integers(1, 600)
SEEDS = st.integers(0, 2**32)


def sizes(count: int) -> list[int]:
    return list(accumulate(len(look) for look in looks_of(count)))


@given(COUNTS, SEEDS)
def test_every_window_is_drawn_once_and_each_look_is_in_order(count: int, seed: int) -> None:
    looks = looks_of(count, seed)
    assert sorted(number for look in looks for number in look) == list(range(count))
    assert all(list(look) == sorted(look) and look for look in looks)
    assert looks == looks_of(count, seed)


@given(st.integers(16, 600), SEEDS)
def test_what_is_seen_after_each_look_is_spread_over_the_whole(count: int, seed: int) -> None:
    """Of s windows at equal steps, any run of r neighbours holds s r / n of them, give or take.

    Halves of halves are rounded once a level, so that at most one is off for each.
    """
    seen: set[int] = set()
    looks = looks_of(count, seed)
    for level, look in enumerate(looks):
        seen.update(look)
        roundings = len(looks) - level
        marks = [0, *accumulate(number in seen for number in range(count))]
        for length in {1, 2, count // 4, count // 2}:
            expected = len(seen) * length / count
            for start in range(count - length + 1):
                assert abs(marks[start + length] - marks[start] - expected) <= roundings + 1


def test_looks_are_at_shares_of_which_enough_windows_are_left() -> None:
    """An eighth from 256 windows on, a quarter from 64, a half from 16: 4 / share windows each."""
    assert sizes(1) == [1]
    assert sizes(15) == [15]
    assert sizes(16) == [8, 16]
    assert sizes(63) == [32, 63]
    assert sizes(64) == [16, 32, 64]
    assert sizes(255) == [64, 128, 255]
    assert sizes(256) == [32, 64, 128, 256]


def test_every_window_may_be_among_the_first() -> None:
    """The starts are random: no window's place decides whether clear cases rest on it."""
    first = {number for seed in range(200) for number in looks_of(64, seed)[0]}
    assert first == set(range(64))
    gaps = {b - a for seed in range(50) for a, b in pairwise(looks_of(64, seed)[0])}
    assert gaps == {4}, "a quarter of 64 is every fourth"


def test_neighbours_are_taken_only_on_request_and_say_so() -> None:
    documents = [_document(1000, "a"), _document(1000, "b")]
    everything = make_windows(documents, PLAIN, length=50, maximum=0)
    first = make_windows(documents, PLAIN, length=50, maximum=7, sampling="contiguous")
    assert first.windows == everything.windows[:7]
    assert first.convention == "spread-contiguous"
    spread = make_windows(documents, PLAIN, length=50, maximum=7)
    assert spread.convention == "spread"
    assert spread.windows != first.windows
    assert {window.document for window in spread.windows} == {0, 1}
    assert first.digest != spread.digest
    whole = make_windows(documents, PLAIN, length=50, maximum=0, sampling="contiguous")
    assert whole.windows == everything.windows


def test_an_unknown_sampling_is_refused() -> None:
    with pytest.raises(DataError, match="Unknown sampling 'random'"):
        make_windows([_document(100)], PLAIN, length=50, sampling="random")
