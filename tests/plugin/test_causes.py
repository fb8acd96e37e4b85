"""What a missed budget comes from and what would help: the words, the sums, and no way to break."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_qlab.decision import Decision
from pytest_qlab.estimate import Estimate
from pytest_qlab.measuring.attribution import Attribution
from pytest_qlab.measuring.layers import LayerError
from pytest_qlab.running.causes import (
    Missed,
    causes,
    causes_of_comparison,
    causes_of_decision,
    explain_attribution,
    more_bits,
)
from pytest_qlab.stats.decisions import Outcome
from tests.plugin.fakes import QUALITY, add_to_conftest

LAYERS = {"a": 0.04, "b": 0.01, "c": 0.02, "d": 0.03, "e": 0.0}


def attribution(total: float = 0.1, **changes: Any) -> Attribution:
    fields: dict[str, Any] = {"layers": LAYERS, "embeddings": {}, "rest": 0.0}
    facts: dict[str, Any] = {"control": 0.0, "resumed": True, "windows": 8, "tokens": 768}
    return Attribution(total=total, **{**fields, **facts, **changes})


class Subject:
    """As much of a candidate as a message looks at."""

    id = "rtn"

    def __init__(self, found: Attribution | Exception | None = None, worst: int = 1) -> None:
        self._found, self._worst = found, worst
        self.lab = SimpleNamespace(looks=((0, 1), (2, 3)))
        self.measured: dict[str, float] = {}
        self.asked = 0

    def affordable_attribution(self) -> Attribution | None:
        self.asked += 1
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def worst_layers(self) -> list[LayerError]:
        return [LayerError("down", (4, 4), 4.1, 18.25, 0.99, 0.0123)] * self._worst


def estimate(value: float, metric: str = "kl.mean", **more: Any) -> Estimate:
    return Estimate(value, metric=metric, candidate="rtn", **more)


def lines(subject: Subject, op: str, left: object, right: object) -> list[str]:
    return causes_of_comparison([SimpleNamespace(candidates={"rtn": subject})], op, left, right)


WORST = "layers with the largest output error: down 0.012 (18.2 dB)"
ASK = (
    "what would help: more bits where they count; "
    "quantized.attribution measures how much KL each layer causes"
)


# Which lines there are


def test_the_three_that_cause_most_whether_they_add_up_and_what_would_help() -> None:
    found = lines(Subject(attribution()), "<", estimate(0.2, lower=0.19, upper=0.21), 0.11)
    assert found == [
        "largest KL by themselves: a 0.04 (40%), d 0.03 (30%), c 0.02 (20%)",
        "all parts by themselves add up to 0.1 nats, together they cause 0.1 "
        "(768 tokens of 8 windows)",
        # 0.2 (1 - 3/4 * 0.9)
        "what would help: one bit more for those 3 layers would leave about 0.065",
    ]


def test_more_windows_would_help_where_the_budget_is_within_the_interval() -> None:
    measured = estimate(0.2, lower=0.1, upper=0.3, standard_error=0.05, clusters=64)
    found = lines(Subject(attribution()), "<", measured, 0.15)
    # t of 63 at 95 % with the allowance for skewness, and z of 80 %; error and gap are the same.
    bound = 1.66940 + 2.5 * (2 * 1.66940**2 + 1) / (6 * 8)
    needed = math.ceil(4 * (bound + 0.84162) ** 2)
    assert found[-1] == (
        f"about {needed} windows would decide it if the value is right: give "
        f"--qlab-max-windows={needed}, and enough text for them"
    )
    assert found[0].startswith("largest KL by themselves: a")
    assert not any("bit" in line for line in found)


def test_windows_of_a_measure_with_an_interval_only() -> None:
    measured = estimate(0.2, "kl.p99", lower=0.1, upper=0.3, clusters=64)
    found = lines(Subject(), "<", measured, 0.15)
    assert found[0] == WORST
    assert "about 33 windows would decide it" in found[1]


def test_output_errors_where_attribution_would_be_dear() -> None:
    assert lines(Subject(), "<", estimate(0.2), 0.1) == [WORST, ASK]
    assert lines(Subject(worst=0), "<", estimate(0.2), 0.1) == [ASK]


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("?"), KeyError("x")])
def test_an_attribution_that_fails_hides_nothing(error: Exception) -> None:
    assert lines(Subject(error), "<", estimate(0.2), 0.1) == [WORST, ASK]


def test_a_candidate_of_which_nothing_can_be_asked_has_only_the_hint() -> None:
    bare: Any = SimpleNamespace()
    assert causes(bare, Missed("kl.mean", 0.2, "<", 0.1)) == [ASK]
    assert causes(bare, Missed("kl.mean", 0.2, "<", 0.1, open=True, standard_error=0.1)) == []


@pytest.mark.parametrize(
    ("metric", "op", "expected"),
    [
        ("size", "<", []),
        ("compression_ratio", ">", []),
        ("latency.p50", "<", []),
        ("memory.peak", "<", []),
        ("somebodys.own", "<", []),
        ("layer_error", "<", [WORST]),
        ("weights.snr_db", ">", [WORST]),
        # Damage that was wanted.
        ("kl.mean", ">", []),
        ("top1_agreement", "<", []),
        ("kl.mean", "==", []),
    ],
)
def test_what_no_layer_is_to_blame_for(metric: str, op: str, expected: list[str]) -> None:
    subject = Subject(attribution())
    assert lines(subject, op, estimate(0.2, metric), 0.1) == expected
    assert subject.asked == 0


def test_two_estimates_only_name_what_is_known() -> None:
    subject = Subject(attribution())
    assert lines(subject, "<", estimate(0.2), estimate(0.1)) == [WORST]
    assert subject.asked == 0


def test_of_two_labs_the_one_that_measured_the_value_was_asked() -> None:
    one, other = Subject(attribution(layers={"one": 0.1})), Subject(attribution())
    other.measured["kl.mean"] = 0.2
    labs = [SimpleNamespace(candidates={"rtn": each}) for each in (other, one)]
    assert causes_of_comparison(labs, "<", estimate(0.2), 0.1)[0].startswith("largest KL by them")
    assert (other.asked, one.asked) == (1, 0)
    assert causes_of_comparison([], "<", estimate(0.2), 0.1) == []


def decision(outcome: Outcome) -> Decision:
    return Decision(
        outcome=outcome,
        metric="kl.mean",
        candidate="rtn",
        value=0.2,
        lower=0.15,
        upper=math.inf,
        op="<=",
        budget=0.11,
        confidence=0.95,
        unit="nats",
    )


def test_a_careful_assertion_says_the_same() -> None:
    labs = [SimpleNamespace(candidates={"rtn": Subject(attribution())})]
    found = causes_of_decision(labs, decision(Outcome.FAIL))
    assert found[0].startswith("largest KL by themselves: a 0.04 (40%)")
    assert found[-1].endswith("would leave about 0.065 nats")


# How much would be left


def help_of(metric: str, value: float, op: str, budget: float, **changes: Any) -> str:
    (line,) = more_bits(Missed(metric, value, op, budget), attribution(**changes))
    return line


def test_as_many_of_the_largest_as_are_enough() -> None:
    """The four layers leave a quarter of 0.2, three of them 0.065, 0.05 + 3/4 * 0.02."""
    assert help_of("kl.mean", 0.2, "<", 0.06) == (
        "what would help: one bit more for those 3 layers would leave about 0.065, still not "
        "enough; 1 bit more for all, about 0.05"
    )


def test_the_layers_that_are_enough_are_counted() -> None:
    many = {f"{n}": 0.01 for n in range(10)}
    found = help_of("kl.mean", 0.4, "<=", 0.221, layers=many)
    # Six of ten: 0.4 (1 - 0.75 * 0.6) = 0.22; five: 0.25; three: 0.31.
    assert found == (
        "what would help: one bit more for those 3 layers would leave about 0.31, still not "
        "enough; 1 bit more for the 6 largest, about 0.22"
    )


def test_more_than_one_bit_for_all() -> None:
    assert help_of("kl.mean", 0.2, "<", 0.004).endswith(
        "; 3 bits more for all, about 0.0031"  # 0.2 / 64
    )


def test_what_bits_cannot_save_is_not_promised() -> None:
    line = help_of("kl.mean", 0.16, "<", 0.05, layers={"a": 0.05}, rest=0.05)
    assert line == (
        "what would help: one bit more for that layer would leave about 0.1, still not enough"
    )


@pytest.mark.parametrize(
    ("metric", "value", "op", "expected"),
    [
        ("kl.p99", 2.0, "<", 0.65),
        ("perplexity_delta", 2.0, "<", 0.65),
        ("perplexity_delta[code]", 2.0, "<", 0.65),
        ("perplexity_ratio", math.exp(2), "<", math.exp(0.65)),
        ("cosine", 0.8, ">", 1 - 0.2 * 0.325),
        ("top1_agreement", 0.8, ">", 1 - 0.2 * math.sqrt(0.325)),
        ("snr_db", 20.0, ">", 20 - 10 * math.log10(0.325)),
    ],
)
def test_other_measures_follow_the_kl(metric: str, value: float, op: str, expected: float) -> None:
    """0.9 of the KL is in three layers, and a quarter of it would be left: 0.325."""
    budget = value * (0.99 if op == "<" else 1.01)
    assert help_of(metric, value, op, budget).endswith(f"would leave about {expected:.2g}")


@pytest.mark.parametrize(
    ("metric", "value"), [("perplexity", 20.0), ("kl.tail", 0.1), ("perplexity_ratio", 0.99)]
)
def test_no_number_where_none_follows(metric: str, value: float) -> None:
    expected = "what would help: more bits for those 3 layers"
    assert help_of(metric, value, "<", value / 2) == expected


def test_no_number_where_the_parts_do_not_add_up() -> None:
    assert help_of("kl.mean", 0.2, "<", 0.1, total=0.2) == (
        "what would help: more bits for those 3 layers"
    )


def test_an_exact_copy_has_nothing_to_say() -> None:
    nothing = attribution(0.0, layers={"a": 0.0})
    assert explain_attribution(nothing) == []
    assert more_bits(Missed("kl.mean", 0.0, "<", -1.0), nothing) == []


# In a run

ATTRIBUTED = """
from pytest_qlab.measuring.attribution import Attribution

def affordable_attribution(self):
    return Attribution(
        layers={"layers.0.up": 0.01, "layers.0.down": 0.03}, embeddings={}, rest=0.0, total=0.04,
        control=0.0, resumed=True, windows=8, tokens=768,
    )

FakeCandidate.affordable_attribution = affordable_attribution
"""
BROKEN = """
def broken(self, *_):
    raise RuntimeError("broken on purpose")

FakeCandidate.affordable_attribution = broken
FakeCandidate.worst_layers = broken
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "worker"])
def test_a_run_says_it(project: pytest.Pytester, workers: tuple[str, ...]) -> None:
    add_to_conftest(project, ATTRIBUTED)
    project.makepyfile(QUALITY)
    result = project.runpytest_subprocess("--qlab-methods=beta", "-p", "no:cacheprovider", *workers)
    result.stdout.fnmatch_lines(
        [
            "E*assert 0.2345 < 0.1",
            "E*largest KL by themselves: layers.0.down 0.03 (75%), layers.0.up 0.01 (25%)",
            "E*all parts by themselves add up to 0.04 nats, together they cause 0.04 (768 tokens*",
            "E*what would help: one bit more for those 2 layers would leave about 0.059",
        ]
    )
    result.assert_outcomes(failed=1)


def test_what_breaks_in_the_explanation_hides_no_assertion(project: pytest.Pytester) -> None:
    add_to_conftest(project, BROKEN)
    project.makepyfile(
        QUALITY
        + """
def test_careful(quantized):
    assert quantized.perplexity_delta.within(0.1)
"""
    )
    result = project.runpytest_subprocess("--qlab-methods=beta", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(
        ["E*assert 0.2345 < 0.1", "E*perplexity_delta of beta-w4 = 0.2345*"]
    )
    result.stdout.fnmatch_lines(["E*assert <FAIL: perplexity_delta of beta-w4 = 0.2345*"])
    result.stdout.no_fnmatch_line("*broken on purpose*")
    result.assert_outcomes(failed=2)


def test_a_careful_assertion_that_fails_says_it(project: pytest.Pytester) -> None:
    add_to_conftest(project, ATTRIBUTED)
    project.makepyfile(
        """
def test_careful(quantized):
    assert quantized.perplexity_delta.within(0.1)
"""
    )
    result = project.runpytest_subprocess("--qlab-methods=beta", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(
        [
            "E*assert <FAIL: perplexity_delta of beta-w4 = 0.2345*",
            "E*perplexity_delta of beta-w4 = 0.2345*budget <= 0.1*",
            "E*largest KL by themselves: layers.0.down 0.03 (75%), layers.0.up 0.01 (25%)",
            "E*what would help: one bit more for those 2 layers would leave about 0.059",
        ]
    )
