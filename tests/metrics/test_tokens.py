"""Arrays of tokens: what fits together, their sums, and parts that join to what was cut."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.divergence import HiddenComparison, TokenComparison
from pytest_qlab.metrics.tokens import TokenArrays
from tests.metrics.synthetic import synthetic


def test_arrays_must_fit_together() -> None:
    fields = {k: v for k, v in vars(synthetic()).items() if k != "windows"}
    with pytest.raises(ValueError, match="differ in length"):
        TokenArrays(**{**fields, "kl": fields["kl"][1:]})
    with pytest.raises(ValueError, match="no document"):
        TokenArrays(**{**fields, "document": fields["document"][:-1]})
    with pytest.raises(ValueError, match="all three arrays"):
        TokenArrays(**{**fields, "hidden_error": None})
    with pytest.raises(MetricError, match="No token was scored"):
        TokenArrays(**{k: v[:0] for k, v in fields.items()})


@pytest.mark.parametrize("name", ["base_nll", "candidate_nll", "kl", "hidden_cosine"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_single_bad_token_is_an_error(name: str, bad: float) -> None:
    fields = {k: v for k, v in vars(synthetic()).items() if k != "windows"}
    fields[name] = fields[name].copy()
    place = int(np.flatnonzero(fields["window"] == 5)[0])
    fields[name][place] = bad
    total = fields[name].size
    with pytest.raises(MetricError, match=f"{name} is NaN or infinite for 1 of {total}.*window 5"):
        TokenArrays(**fields)


def test_tensors_of_another_version_are_refused() -> None:
    tensors = synthetic().to_tensors()
    with pytest.raises(MetricError, match="written by another version"):
        TokenArrays.from_tensors({**tensors, "more": tensors["kl"]})
    del tensors["kl"]
    with pytest.raises(MetricError, match="written by another version"):
        TokenArrays.from_tensors(tensors)


def test_window_sums_are_sums_over_windows() -> None:
    tokens = synthetic(8)
    row = tokens.windows[4]
    mine = tokens.window == 4
    delta = tokens.candidate_nll[mine].astype(float) - tokens.base_nll[mine]
    assert (row["window"], row["document"], row["tokens"]) == (4, 1, mine.sum())
    assert row["delta"] == pytest.approx(delta.sum())
    assert row["delta_squared"] == pytest.approx((delta**2).sum())
    assert row["kl_squared"] == pytest.approx((tokens.kl[mine].astype(float) ** 2).sum())
    assert row["kl_tail"] == (tokens.kl[mine] > 1).sum()
    assert row["agree"] == tokens.agree[mine].sum()


def comparison(values: list[float]) -> TokenComparison:
    found = torch.tensor(values)
    return TokenComparison(found, found + 0.5, found * 0, found > 1, found, found)


def test_windows_are_collected_in_order() -> None:
    comparisons = [comparison([1.0, 2.0]), comparison([3.0])]
    moved = [HiddenComparison(*[torch.ones(n)] * 3) for n in (2, 1)]
    found = TokenArrays.collect(comparisons, [4, 2], moved)
    assert found.base_nll.tolist() == [1, 2, 3]
    assert found.agree.tolist() == [False, True, True]
    assert found.window.tolist() == [0, 0, 1]
    assert found.document.tolist() == [4, 2]
    assert found.has_hidden
    assert not TokenArrays.collect(comparisons, [4, 2]).has_hidden
    with pytest.raises(ValueError, match="one document for each"):
        TokenArrays.collect(comparisons, [4])
    with pytest.raises(MetricError, match="No window"):
        TokenArrays.collect([], [])


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
