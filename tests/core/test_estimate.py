"""Estimates: floats that remember what they are."""

from __future__ import annotations

import json
import math
import operator
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import Comparison, Estimate, observe_comparisons

finite = st.floats(allow_nan=False)


@given(finite, finite)
def test_compares_like_the_float_it_is(value: float, other: float) -> None:
    estimate = Estimate(value, metric="m")
    assert (estimate < other) == (value < other)
    assert (estimate <= other) == (value <= other)
    assert (estimate > other) == (value > other)
    assert (estimate >= other) == (value >= other)
    assert (estimate == other) == (value == other)
    assert (other < estimate) == (other < value)
    assert hash(estimate) == hash(value)


def test_is_a_plain_float_in_arithmetic() -> None:
    estimate = Estimate(2.0, metric="m", lower=1.0, upper=3.0)
    assert type(estimate * 2) is float
    assert type(1.1 * estimate) is float
    assert type(float(estimate)) is float
    assert f"{estimate:.1f}" == "2.0"
    assert estimate == pytest.approx(2.0)


def test_comparisons_are_observed() -> None:
    seen: list[Comparison] = []
    estimate = Estimate(0.2, metric="kl.mean", candidate="rtn")
    with observe_comparisons(seen.append):
        assert estimate < 0.3
        assert not estimate > 0.3
        assert estimate > 0.1
        assert estimate != "text"
    assert estimate < 0.5
    assert [(each.op, each.budget, each.ok) for each in seen] == [
        ("<", 0.3, True),
        (">", 0.3, False),
        (">", 0.1, True),
    ]
    assert json.loads(json.dumps(seen[0].to_dict()))["metric"] == "kl.mean"


def test_unordered_types_are_refused() -> None:
    with pytest.raises(TypeError):
        assert Estimate(1.0, metric="m") < "2"


def test_nan_is_never_compared() -> None:
    with pytest.raises(MetricError, match="not a number"):
        Estimate(math.nan, metric="perplexity")


def test_round_trips() -> None:
    estimate = Estimate(
        1.5, metric="x", candidate="c", lower=1.0, upper=2.0, n=10, clusters=3, unit="nats"
    )
    for copy in (
        Estimate.from_dict("x", json.loads(json.dumps(estimate.to_dict()))),
        pickle.loads(pickle.dumps(estimate)),
    ):
        assert copy == estimate
        assert vars(copy) == vars(estimate)
    assert repr(estimate) == "1.5 [1, 2] nats"


def test_the_absolute_value_is_an_estimate_too() -> None:
    fields = {"metric": "perplexity_delta", "candidate": "c"}
    below = abs(Estimate(-0.2, lower=-0.3, upper=-0.1, **fields))  # type: ignore[arg-type]
    assert (float(below), below.lower, below.upper) == (0.2, 0.1, 0.3)
    around = abs(Estimate(-0.1, lower=-0.3, upper=0.1, **fields))  # type: ignore[arg-type]
    assert (float(around), around.lower, around.upper) == (0.1, 0.0, 0.3)
    bounded = abs(Estimate(-0.2, upper=-0.1, **fields))  # type: ignore[arg-type]
    assert (bounded.lower, bounded.upper) == (0.1, None)
    seen: list[Comparison] = []
    with observe_comparisons(seen.append):
        assert abs(below) < 0.25
    assert [(each.metric, each.value) for each in seen] == [("perplexity_delta", 0.2)]


def ratio_of(value: float, floor: float | None = 0.02) -> Estimate:
    return Estimate(value, metric="latency.decode.ratio", candidate="rtn", floor=floor)


def test_chance_does_not_decide_a_ratio_of_latencies() -> None:
    """The base model's ratio to itself may be 0.98 to 1.02."""
    for value, budget in ((1.005, 1.01), (0.99, 1.0), (1.01, 0.995)):
        for refused in (operator.lt, operator.le):
            with pytest.raises(MetricError, match=r"differs from 1 by up to 0\.02.*Allow 1\.02"):
                refused(ratio_of(value), budget)
    assert ratio_of(1.01) < 1.03
    assert not ratio_of(1.2) < 1.01, "clearly slower"
    assert ratio_of(0.6) < 1.0, "clearly faster"
    assert ratio_of(0.6) < 0.61, "a budget on a real gain"
    assert ratio_of(1.005, floor=None) < 1.01
    assert ratio_of(1.005) > 1.0, "nothing is bounded"
    assert ratio_of(1.005) < ratio_of(1.006), "two estimates are no budgets of each other"
