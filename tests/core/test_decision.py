"""Careful assertions: error rates over all looks, early stops, refusals, what becomes of doubt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pytest_qlab.decision import Decision, Look, Policy, Side, check_budget, decide, decide_by
from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import Comparison, Estimate, observe_comparisons
from pytest_qlab.stats.decisions import Outcome, bounds

PLAN = (16, 32, 64)


def measured(value: float, error: float = 0.1, clusters: int = 64, **more: Any) -> Estimate:
    fields = {"metric": "kl.mean", "candidate": "c", "n": 100 * clusters, **more}
    return Estimate(value, standard_error=error, clusters=clusters, **fields)


def judged(
    looks: Sequence[Look], budget: float = 1.0, op: Side = "<=", confidence: float | None = None
) -> Decision:
    return decide(lambda: looks, op, budget, confidence, metric="kl.mean", candidate="c")


def of_sample(sample: np.ndarray[Any, np.dtype[np.float64]]) -> list[Look]:
    """Looks at the first 16, 32 and all 64 of independent normal windows."""

    def estimate(count: int) -> Callable[[], Estimate]:
        seen = sample[:count]
        return lambda: measured(seen.mean(), seen.std(ddof=1) / math.sqrt(count), count)

    return [Look(count, estimate(count)) for count in PLAN]


@pytest.fixture(scope="module")
def at_the_budget() -> list[Decision]:
    """3,000 candidates whose value is the budget, exactly."""
    samples = np.random.default_rng(20).normal(1.0, 0.5, size=(3000, 64))
    return [judged(of_sample(sample)) for sample in samples]


def test_at_the_budget_all_looks_together_err_no_more_often_than_one_may(
    at_the_budget: list[Decision],
) -> None:
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 3000)
    for outcome in (Outcome.PASS, Outcome.FAIL):
        share = sum(found.outcome is outcome for found in at_the_budget) / 3000
        assert 0.01 < share <= allowed
    # Three looks at 5 % each would pass more: the simulation can tell.
    samples = np.random.default_rng(20).normal(1.0, 0.5, size=(3000, 64))
    naive = np.zeros(3000, dtype=bool)
    for count, table in zip(PLAN, (1.753, 1.696, 1.669), strict=True):  # t of 15, 31, 63 at 5 %
        seen = samples[:, :count]
        naive |= seen.mean(axis=1) + table * seen.std(axis=1, ddof=1) / math.sqrt(count) <= 1.0
    assert naive.mean() > allowed


def test_what_looks_decide_early_is_what_all_windows_would_hardly_deny(
    at_the_budget: list[Decision],
) -> None:
    """The spending of O'Brien and Fleming: next to nothing on the first looks."""
    early = [found for found in at_the_budget if found.looks < 3 and found.outcome == "pass"]
    # Spent at half of the data: 2 - 2 Phi(1.96 / sqrt(0.5)) = 0.0056.
    assert len(early) / 3000 <= 0.0056 + 3 * math.sqrt(0.0056 / 3000)


def test_clear_cases_take_one_look_and_say_so() -> None:
    def never() -> Estimate:
        raise AssertionError("more windows were drawn than were needed")

    for value, outcome in ((0.1, Outcome.PASS), (1.9, Outcome.FAIL)):
        looks = [Look(16, lambda value=value: measured(value, 0.02, 16)), Look(32, never)]  # type: ignore[misc]
        found = judged([*looks, Look(64, never)])
        assert found.outcome is outcome
        assert (found.windows, found.most, found.looks, found.planned) == (16, 64, 1, 3)
        assert found.sample == "16 of 64 windows"
        assert found.value == value
        assert repr(found).endswith("budget <= 1; 16 of 64 windows>")


def test_doubt_draws_all_windows() -> None:
    looks = [Look(count, lambda count=count: measured(0.99, 0.1, count)) for count in PLAN]  # type: ignore[misc]
    found = judged(looks)
    assert found.outcome is Outcome.INCONCLUSIVE
    assert (found.windows, found.looks, found.sample) == (64, 3, "all 64 windows")
    assert found.lower < 1.0 < found.upper


def test_a_single_look_has_the_whole_error_to_spend() -> None:
    found = measured(0.79).within(1.0)
    assert (found.lower, found.upper) == pytest.approx(bounds(0.79, 0.1, 64, level=0.05))
    assert found.outcome is Outcome.PASS
    assert measured(0.84).within(1.0).outcome is Outcome.INCONCLUSIVE
    assert measured(0.84).within(1.0, confidence=0.9).outcome is Outcome.PASS
    assert (found.windows, found.sample, found.looks, found.planned) == (None, "", 1, 1)


def test_of_more_is_better_the_lower_bound_decides() -> None:
    found = measured(0.97, 0.005, metric="cosine").at_least(0.95)
    assert found.outcome is Outcome.PASS
    assert "at least 0.95" in repr(found)
    assert measured(0.96, 0.01, metric="cosine").at_least(0.95).outcome is Outcome.INCONCLUSIVE
    assert measured(0.90, 0.01, metric="cosine").at_least(0.95).outcome is Outcome.FAIL


def test_counted_numbers_need_no_interval() -> None:
    (size,) = Estimate.exactly({"size": (1000, "bytes")}, candidate="c").values()
    assert size.within(1000).outcome is Outcome.PASS
    assert size.within(999).outcome is Outcome.FAIL
    assert repr(size.within(999)) == "<FAIL: size of c = 1000 bytes, budget <= 999>"
    bare = Estimate(0.03, metric="layer_error", candidate="c")
    assert bare.within(0.03).outcome is Outcome.PASS
    assert bare.within(0.0299).outcome is Outcome.FAIL


def test_an_exact_copy_passes_at_any_budget() -> None:
    copy = measured(0.0, 0.0, lower=0.0, upper=0.0)
    assert copy.within(0.0).outcome is Outcome.PASS
    assert copy.within(0.0, confidence=0.999999).outcome is Outcome.PASS


def test_quantiles_are_decided_by_their_longer_arm() -> None:
    # 95 % intervals of normal numbers reach 1.96 standard errors, one-sided bounds 1.645 of them.
    tail = Estimate(0.5, metric="kl.p99", lower=0.4, upper=0.7, n=10**6)
    found = tail.within(0.7)
    assert found.upper == pytest.approx(0.5 + 0.2 * 1.645 / 1.96, abs=1e-3)
    assert found.lower == pytest.approx(0.5 - 0.2 * 1.645 / 1.96, abs=1e-3)
    # With 5 documents, t is 2.132 at 5 % and 2.776 at 2.5 %; the former is widened for skewness.
    few = Estimate(0.5, metric="kl.p99", lower=0.4, upper=0.7, n=10**6, clusters=5)
    assert few.within(0.7).upper == pytest.approx(0.5 + 0.2 * 4.015 / 2.776, abs=1e-3)


def test_a_single_document_decides_nothing() -> None:
    alone = Estimate(0.01, metric="kl.mean", n=500, clusters=1)
    for budget in (1e-9, 1e9):
        found = alone.within(budget)
        assert found.outcome is Outcome.INCONCLUSIVE
        assert (found.lower, found.upper) == (-math.inf, math.inf)
        assert "not bounded" in repr(found)
        assert found.windows_needed is None


@pytest.mark.parametrize(
    ("metric", "op", "budget", "confidence", "convention", "message"),
    [
        ("top1_agreement", "<=", 0.9, 0.95, "", r"held by top1_agreement.at_least\(0.9\)"),
        ("cosine[code]", "<=", 0.9, 0.95, "", "higher is better for cosine"),
        ("kl.mean", ">=", 0.9, 0.95, "", r"held by kl.mean.within\(0.9\)"),
        ("kl.max", "<=", 0.9, 0.95, "", r"Use kl.p99.within"),
        ("kl.max[code]", "<=", 0.9, 0.95, "", r"no interval"),
        ("kl.mean", "<=", math.nan, 0.95, "", "has to be a finite number"),
        ("kl.mean", "<=", math.inf, 0.95, "", "has to be a finite number"),
        ("kl.mean", "<=", True, 0.95, "", "has to be a finite number"),
        ("kl.mean", "<=", "0.02", 0.95, "", "has to be a finite number"),
        ("kl.mean", "<=", None, 0.95, "", "has to be a finite number"),
        ("kl.mean", "<=", 0.02, 1.0, "", "at least 0.5 and less than 1"),
        ("kl.mean", "<=", 0.02, 95, "", "at least 0.5 and less than 1"),
        ("kl.mean", "<=", 0.02, 0.05, "", "at least 0.5 and less than 1"),
        ("kl.mean", "<=", 0.02, math.nan, "", "at least 0.5 and less than 1"),
        ("kl.mean", "<=", 0.02, "95%", "", "at least 0.5 and less than 1"),
        ("kl.mean", "<=", 0.02, 0.95, "spread512-contiguous", "windows are neighbours"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_anything_runs(
    metric: str, op: Side, budget: Any, confidence: Any, convention: str, message: str
) -> None:
    def looks() -> list[Look]:
        raise AssertionError("something was computed")

    with pytest.raises(MetricError, match=message):
        decide(looks, op, budget, confidence, metric=metric, candidate="c", convention=convention)


def test_any_real_number_is_a_budget() -> None:
    numbers: list[Any] = [np.float32(0.5), np.int64(1), 1, measured(0.5)]
    for budget in numbers:
        check_budget("kl.mean", "<=", budget, 0.95)
    assert measured(0.4).within(numbers[0]).budget == 0.5
    check_budget("somebody's own", ">=", 0.5, 0.5)
    check_budget("somebody's own", "<=", 0.5, 0.5)


def test_neighbouring_windows_are_refused_of_an_estimate_by_itself() -> None:
    with pytest.raises(MetricError, match="--qlab-sampling=contiguous"):
        measured(0.1, convention="llamacpp512-contiguous").within(0.5)
    assert measured(0.1, convention="llamacpp512").within(0.5)


@pytest.mark.parametrize(
    ("value", "inconclusive", "true", "asked"),
    [
        (0.5, "fail", True, 0),
        (1.5, "fail", False, 1),
        (1.5, "warn", False, 1),
        (1.5, "xfail", False, 1),
        (1.05, "fail", False, 1),
        (1.05, "warn", True, 1),
        (1.05, "xfail", False, 1),
    ],
)
def test_truth_is_the_outcome_or_what_the_policy_makes_of_doubt(
    value: float, inconclusive: str, true: bool, asked: int
) -> None:
    seen: list[Decision] = []
    with decide_by(lambda: Policy(inconclusive=inconclusive, react=seen.append)):
        found = measured(value).within(1.0)
        assert seen == []
        assert bool(found) is true
        assert seen == [found] * asked
    assert bool(found) is (value == 0.5), "outside of a run, doubt is not a pass"


def test_the_confidence_is_the_runs_unless_one_is_given() -> None:
    with decide_by(lambda: Policy(confidence=0.9)):
        assert measured(0.84).within(1.0).confidence == 0.9
        assert measured(0.84).within(1.0)
        assert measured(0.84).within(1.0, confidence=0.99).confidence == 0.99
        assert not measured(0.84).within(1.0, confidence=0.99)
    assert measured(0.84).within(1.0).confidence == 0.95


def test_a_policy_can_stop_the_test() -> None:
    def react(decision: Decision) -> None:
        raise RuntimeError(decision.candidate)

    with decide_by(lambda: Policy(react=react)), pytest.raises(RuntimeError, match="c"):
        assert measured(1.05).within(1.0)


@pytest.mark.parametrize(
    ("value", "inconclusive", "outcome", "ok"),
    [
        (0.5, "fail", "pass", True),
        (1.5, "warn", "fail", False),
        (1.05, "fail", "inconclusive", False),
        (1.05, "warn", "inconclusive", True),
        (1.05, "xfail", "inconclusive", True),
    ],
)
def test_decisions_are_observed_as_comparisons(
    value: float, inconclusive: str, outcome: str, ok: bool
) -> None:
    seen: list[Comparison] = []
    looks = [Look(count, lambda: measured(value)) for count in PLAN]
    with observe_comparisons(seen.append), decide_by(lambda: Policy(inconclusive=inconclusive)):
        found = judged(looks)
    (noted,) = seen
    assert (noted.candidate, noted.metric, noted.op) == ("c", "kl.mean", "<=")
    assert (noted.value, noted.budget) == (value, 1.0)
    assert (noted.outcome, noted.ok) == (outcome, ok)
    assert (noted.lower, noted.upper, noted.windows) == (found.lower, found.upper, found.windows)


def test_bounds_that_are_infinite_are_not_written_down() -> None:
    seen: list[Comparison] = []
    with observe_comparisons(seen.append):
        Estimate(0.01, metric="kl.mean", n=500, clusters=1).within(1.0)
    assert (seen[0].lower, seen[0].upper) == (None, None)


def test_windows_needed_decide_with_the_promised_power() -> None:
    found = judged([Look(64, lambda: measured(0.9, 0.1))])
    needed = found.windows_needed
    # (t of 63 at 95 % with the allowance for skewness + z of 80 %)^2 (error / gap)^2 times as many.
    bound = 1.66940 + 2.5 * (2 * 1.66940**2 + 1) / (6 * 8)
    assert needed == math.ceil(64 * (bound + 0.84162) ** 2)
    # With so many, the error shrinks by the root and the bound is closer: more than 80 % pass.
    error = 0.1 * math.sqrt(64 / needed)
    bound = 1.6478 + 2.5 * (2 * 1.6478**2 + 1) / (6 * math.sqrt(needed))
    values = np.random.default_rng(3).normal(0.9, error, size=4000)
    assert 0.8 < np.mean(values + bound * error <= 1.0) < 0.9
    assert judged([Look(64, lambda: measured(1.0, 0.1))]).windows_needed is None
