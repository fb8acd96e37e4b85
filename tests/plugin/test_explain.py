from __future__ import annotations

import pytest

from pytest_qlab.estimate import Estimate
from pytest_qlab.running.explain import explain_comparison
from tests.plugin.fakes import QUALITY


def estimate(value: float = 0.25, **more: object) -> Estimate:
    fields: dict[str, object] = {"metric": "kl.mean", "candidate": "rtn-w4g128", **more}
    return Estimate(value, **fields)  # type: ignore[arg-type]


def test_says_what_was_measured_the_budget_and_by_how_much_it_was_missed() -> None:
    lines = explain_comparison(
        "<",
        estimate(
            lower=0.2,
            upper=0.3,
            n=512,
            clusters=8,
            convention="spread512",
            unit="nats",
            detail="one line of detail",
        ),
        0.1,
    )
    assert lines == [
        "0.25 < 0.1",
        "kl.mean of rtn-w4g128 = 0.25 nats  budget < 0.1  (over by 0.15, +150%)",
        "one line of detail",
        "95% interval [0.2, 0.3]",
        "512 samples, 8 documents, convention spread512",
    ]


def test_the_budget_may_stand_on_the_left() -> None:
    lines = explain_comparison(">=", 0.1, estimate())
    assert lines is not None
    assert "budget <= 0.1" in lines[1]
    assert "over by 0.15" in lines[1]


def test_a_value_below_a_floor_is_short() -> None:
    lines = explain_comparison(">", estimate(0.9), 0.95)
    assert lines is not None
    assert "short by 0.05, -5%" in lines[1]


def test_a_budget_of_zero_has_no_percentage() -> None:
    lines = explain_comparison("<", estimate(), 0)
    assert lines is not None
    assert "(over by 0.25)" in lines[1]


def test_two_estimates_are_both_described() -> None:
    lines = explain_comparison("<", estimate(candidate="gptq"), estimate(0.125, candidate="rtn"))
    assert lines is not None
    assert "kl.mean of gptq = 0.25" in lines[1]
    assert "kl.mean of rtn = 0.125 (+0.125)" in lines[1]


def test_what_is_simulated_is_called_so() -> None:
    lines = explain_comparison("<", estimate(simulated=True), 0.1)
    assert lines is not None
    assert lines[-1] == "simulated: no kernel runs the packed bits"


@pytest.mark.parametrize(
    ("op", "left", "right"),
    [
        ("<", 1.0, 2.0),
        ("<", estimate(), "text"),
        ("<", estimate(), True),
        ("in", estimate(), 3),
        ("==", estimate(), pytest.approx(0.25)),
    ],
)
def test_other_comparisons_are_left_to_pytest(op: str, left: object, right: object) -> None:
    assert explain_comparison(op, left, right) is None


def test_the_layers_that_are_furthest_off_are_named(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY)
    result = project.runpytest_subprocess("--qlab-methods=beta", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(
        ["*layers with the largest output error: layers.0.down 0.012 (18.2 dB)"]
    )
