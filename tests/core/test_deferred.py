"""Measures that are computed when looked at: the estimate to everybody, and no window too many."""

from __future__ import annotations

import copy
import json
import math
import operator
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.decision import Look
from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import Comparison, Estimate, observe_comparisons
from pytest_qlab.gate.deferred import DeferredKl, deferred
from pytest_qlab.running.payload import plain

NUMBERS = st.floats(-1e6, 1e6)
BINARY: list[Callable[..., Any]] = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    divmod,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.eq,
    operator.ne,
    max,
    min,
]
UNARY: list[Callable[..., Any]] = [
    operator.neg,
    operator.pos,
    abs,
    bool,
    float,
    int,
    round,
    math.trunc,
    math.floor,
    math.ceil,
    math.isfinite,
    math.exp,
    hash,
    str,
    repr,
    "{:.3f}".format,
    "%.3g".__mod__,
    lambda x: round(x, 2),
    lambda x: sum([x, x]),
    lambda x: sorted([x, 0.5]),
    lambda x: x in {float(x)},
    lambda x: x.as_integer_ratio(),
    lambda x: x.is_integer(),
    lambda x: np.float64(2.5) * x,
    lambda x: np.mean([x, 1.0]),
    lambda x: np.asarray(x).dtype,
    lambda x: x == pytest.approx(float(x)),
    lambda x: float(x) == pytest.approx(x),
    lambda x: statistics.fmean([x, 2.0]),
    lambda x: f"{x} {x:+.2f} {x!s}",
    lambda x: (x.metric, x.candidate, x.lower, x.upper, x.n, x.unit, x.standard_error),
    lambda x: x.to_dict(),
    lambda x: x.effective_n,
    lambda x: pickle.loads(pickle.dumps(x)).to_dict(),
    lambda x: copy.deepcopy(x).to_dict(),
    lambda x: json.loads(json.dumps(plain({"x": x}))),
    lambda x: isinstance(x, Estimate),
    lambda x: isinstance(x, float),
]


def estimate(value: float, **more: Any) -> Estimate:
    fields = {
        "metric": "kl.mean",
        "candidate": "c",
        "lower": value - 0.5,
        "upper": value + 0.5,
        "standard_error": 0.25,
        "n": 640,
        "clusters": 64,
        "design_effect": 2.0,
        "unit": "nats",
        "convention": "spread512",
        **more,
    }
    return Estimate(value, **fields)


class Counted:
    """Looks that count how often each is computed; values and errors by the number of windows."""

    def __init__(self, values: dict[int, float], error: float = 0.01, **more: Any) -> None:
        self.computed: list[int] = []
        self.values, self.error, self.more = values, error, more

    def at(self, windows: int) -> Callable[[], Estimate]:
        def compute() -> Estimate:
            self.computed.append(windows)
            more = {"clusters": windows, "standard_error": self.error, **self.more}
            return estimate(self.values[windows], **more)

        return compute

    def looks(self) -> list[Look]:
        return [Look(windows, self.at(windows)) for windows in self.values]

    def measure(self, convention: str = "spread512") -> Estimate:
        return deferred("kl.mean", "c", self.looks, lambda: convention)


def later(value: float) -> Estimate:
    return deferred("kl.mean", "c", lambda: [Look(64, lambda: estimate(value))], lambda: "")


def same(function: Callable[..., Any], left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    """Both calls return equal values of one type, or raise the same error."""
    outcomes = []
    for arguments in (left, right):
        try:
            found = function(*arguments)
            # What gives an operand back, as `max` does, may give the deferred one.
            found = Estimate.to_dict(found) if type(found) is Estimate else found
            found = found.to_dict() if isinstance(found, Estimate) else found
            outcomes.append((type(found), found))
        except (ArithmeticError, ValueError, TypeError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


@given(NUMBERS, NUMBERS)
def test_every_binary_operator_is_the_estimates(value: float, other: float) -> None:
    for function in BINARY:
        with np.errstate(all="ignore"):
            same(function, (later(value), other), (estimate(value), other))
            same(function, (other, later(value)), (other, estimate(value)))
            same(function, (later(value), later(other)), (estimate(value), estimate(other)))
            same(function, (later(value), estimate(other)), (estimate(value), estimate(other)))
            same(function, (estimate(value), later(other)), (estimate(value), estimate(other)))


@given(st.floats(-50, 50))
def test_every_other_use_is_the_estimates(value: float) -> None:
    for function in UNARY:
        same(function, (later(value),), (estimate(value),))


def test_text_is_no_number() -> None:
    with pytest.raises(TypeError):
        assert later(1.0) < "2"
    assert later(1.0) != "1.0"
    with pytest.raises(AttributeError, match="no_such"):
        _ = later(1.0).no_such  # type: ignore[attr-defined]


def test_json_wants_the_number_and_says_so() -> None:
    with pytest.raises(TypeError, match="Estimate is not JSON serializable"):
        json.dumps(later(0.5))
    assert json.dumps(float(later(0.5))) == "0.5"


def test_nothing_is_computed_until_it_is_looked_at_and_then_once() -> None:
    counted = Counted({16: 0.1, 32: 0.2, 64: 0.3})
    measure = counted.measure()
    assert (measure.metric, measure.candidate) == ("kl.mean", "c")
    assert isinstance(measure, Estimate)
    assert counted.computed == []
    assert measure < 0.31
    assert measure > 0.29
    assert float(measure) == 0.3
    assert counted.computed == [64]


def test_plain_comparisons_are_observed_as_the_estimates_are() -> None:
    seen: list[Comparison] = []
    with observe_comparisons(seen.append):
        assert later(0.2) < 0.3
        assert not operator.gt(0.1, later(0.2))
    assert [(c.metric, c.candidate, c.value, c.op, c.budget, c.ok) for c in seen] == [
        ("kl.mean", "c", 0.2, "<", 0.3, True),
        ("kl.mean", "c", 0.2, "<", 0.1, False),
    ]


def test_an_assertion_that_stops_early_leaves_the_plain_one_all_windows() -> None:
    counted = Counted({16: 0.1, 32: 0.2, 64: 0.3})
    measure = counted.measure()
    decision = measure.within(1.0)
    assert decision
    assert (decision.windows, decision.most, decision.value) == (16, 64, 0.1)
    assert counted.computed == [16]
    # The failure message of pytest shows the measure, and draws nothing for it.
    assert repr(measure) == "<kl.mean of c: 0.1, 16 of 64 windows>"
    assert counted.computed == [16]
    assert measure == 0.3
    assert measure.clusters == 64
    assert counted.computed == [16, 64]
    assert "16 of 64" not in repr(measure)


@given(st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(0.001, 0.5))
def test_the_outcome_is_the_same_whatever_was_computed_before(
    first: float, second: float, third: float, error: float
) -> None:
    values = {16: first, 32: second, 64: third}
    fresh, used = Counted(values, error).measure(), Counted(values, error).measure()
    assert used == third
    assert used.within(1.0) == fresh.within(1.0) == fresh.within(1.0)


def test_of_more_is_better_it_says_at_least() -> None:
    counted = Counted({16: 0.99, 64: 0.5}, error=0.001, metric="cosine")
    measure = deferred("cosine", "c", counted.looks, lambda: "spread512")
    assert measure.at_least(0.8)
    assert counted.computed == [16]


def test_a_distance_from_zero_is_decided_as_deferred() -> None:
    counted = Counted({16: -0.1, 64: -0.2}, error=0.001, metric="log_perplexity_delta")
    measure = deferred("log_perplexity_delta", "c", counted.looks, lambda: "spread512")
    distance = abs(measure)
    assert counted.computed == []
    found = distance.within(0.3)
    assert (found.outcome, found.windows, found.value) == ("pass", 16, 0.1)
    assert distance.within(0.05).outcome == "fail"
    assert float(distance) == 0.2
    assert float(abs(abs(measure))) == 0.2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda x: x.at_least(0.5), "lower is better"),
        (lambda x: x.within(math.nan), "finite number"),
        (lambda x: x.within(0.5, confidence=2), "confidence"),
    ],
)
def test_mistakes_are_refused_before_looks_are_even_planned(
    ask: Callable[[Estimate], object], message: str
) -> None:
    def looks() -> list[Look]:
        raise AssertionError("the model was quantized")

    with pytest.raises(MetricError, match=message):
        ask(deferred("kl.mean", "c", looks, lambda: "spread512"))


def test_neighbouring_windows_carry_no_confidence() -> None:
    counted = Counted({64: 0.1})
    measure = counted.measure("spread512-contiguous")
    with pytest.raises(MetricError, match="windows are neighbours"):
        measure.within(0.5)
    assert counted.computed == []
    assert measure < 0.5


def test_an_error_of_the_measurement_is_raised_by_whoever_looks() -> None:
    def looks() -> list[Look]:
        raise MetricError("the weights are NaN")

    broken = deferred("kl.mean", "c", looks, lambda: "")
    for look in (float, repr, lambda x: x.within(1.0), lambda x: x < 1.0):
        with pytest.raises(MetricError, match="NaN"):
            look(broken)


def test_the_group_of_kl_shows_itself_without_computing() -> None:
    counted = Counted({64: 0.1})
    each = counted.measure()
    group = DeferredKl(mean=each, median=each, p99=each, max=each, tail=each)
    assert repr(group) == "<KL of c>"
    assert counted.computed == []


def test_they_can_be_made_without_torch() -> None:
    code = "import sys, pytest_qlab.gate.deferred; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
