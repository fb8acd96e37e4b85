"""Windows that were evaluated in parts are those that were evaluated at once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.metrics.tokens import TokenArrays
from tests.metrics.test_fidelity import synthetic


def taken(tokens: TokenArrays, places: list[int]) -> TokenArrays:
    """The windows at these places, in this order, token by token."""
    fields: dict[str, Any] = {name: [] for name in tokens.to_tensors() if name != "document"}
    for number, place in enumerate(places):
        for token in np.flatnonzero(tokens.window == place):
            for name, values in fields.items():
                values.append(number if name == "window" else getattr(tokens, name)[token])
    arrays = {name: np.array(v, dtype=getattr(tokens, name).dtype) for name, v in fields.items()}
    return TokenArrays(**arrays, document=tokens.document[places])


def equal(left: TokenArrays, right: TokenArrays) -> bool:
    ours, theirs = left.to_tensors(), right.to_tensors()
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and ours[name].equal(theirs[name]) for name in ours
    )


@given(st.integers(0, 2**16), st.integers(1, 5))
def test_parts_in_any_order_join_to_the_whole(seed: int, count: int) -> None:
    whole = synthetic(seed % 7, documents=4, windows=3, tokens=6)
    drawn = random.Random(seed)
    numbers = list(range(12))
    drawn.shuffle(numbers)
    cuts = sorted(drawn.sample(range(1, 12), count - 1))
    places = [sorted(numbers[a:b]) for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    parts = [taken(whole, each) for each in places]
    joined = TokenArrays.joined(parts, places)
    assert equal(joined, whole)
    assert np.array_equal(joined.windows, whole.windows)


@given(st.permutations(range(12)), st.integers(1, 6), st.integers(1, 6))
def test_some_parts_join_to_their_windows_in_the_order_of_the_whole(
    order: list[int], first: int, second: int
) -> None:
    whole = synthetic(3, documents=4, windows=3, tokens=6)
    places = [sorted(order[:first]), sorted(order[first : first + second])]
    joined = TokenArrays.joined([taken(whole, each) for each in places], places)
    assert equal(joined, taken(whole, sorted(order[: first + second])))


def test_hidden_states_may_be_missing_from_all() -> None:
    whole = synthetic(documents=2, windows=2)
    fields = {name: getattr(whole, name) for name in ("base_nll", "candidate_nll", "kl", "agree")}
    bare = TokenArrays(**fields, window=whole.window, document=whole.document)
    joined = TokenArrays.joined([taken(bare, [1, 3]), taken(bare, [0, 2])], [[1, 3], [0, 2]])
    assert equal(joined, bare)
    assert not joined.has_hidden
