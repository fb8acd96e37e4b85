"""Careful assertions in a run: outcome by policy, words, what reaches the results."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from tests.plugin.fakes import add_to_conftest, notes_of, results_of
from tests.plugin.looking import LOOKING

CAREFUL = """
def test_careful(quantized):
    assert quantized.kl.mean.within(0.02)
"""
SURE, OVER, OPEN = "alpha", "alpha:bits=2", "beta"
NODE = "test_it.py::test_careful"


@pytest.fixture
def careful(project: pytest.Pytester) -> pytest.Pytester:
    """The project, with measures that are drawn look by look."""
    add_to_conftest(project, LOOKING)
    project.makepyfile(test_it=CAREFUL)
    return project


def run(project: pytest.Pytester, methods: str, *arguments: str) -> pytest.RunResult:
    return project.runpytest_subprocess(
        *("-p", "no:cacheprovider", "--qlab-json=results.json", "--junit-xml=junit.xml"),
        f"--qlab-methods={methods}",
        *arguments,
    )


def budget_of(project: pytest.Pytester, candidate: str) -> dict[str, Any]:
    (row,) = [row for row in results_of(project)["candidates"] if row["id"] == candidate]
    (budget,) = row["budgets"]
    found: dict[str, Any] = budget
    return found


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_clear_cases_take_few_windows_and_are_recorded(
    careful: pytest.Pytester, workers: str
) -> None:
    run(careful, f"{SURE},{OVER}", workers).assert_outcomes(passed=1, failed=1)
    budget = budget_of(careful, "alpha-w4")
    lower, upper = budget.pop("lower"), budget.pop("upper")
    assert budget == {
        "test": f"{NODE}[alpha-w4]",
        "metric": "kl.mean",
        "value": 0.01,
        "op": "<=",
        "budget": 0.02,
        "ok": True,
        "outcome": "pass",
        "windows": 16,
    }
    assert lower < 0.01 < upper <= 0.02
    budget = budget_of(careful, "alpha-w2")
    assert (budget["outcome"], budget["ok"], budget["windows"]) == ("fail", False, 16)
    assert budget["lower"] > 0.02
    drawn = [note for note in notes_of(careful) if "windows" in note]
    assert sorted(drawn) == ["alpha-w2 on 16 windows", "alpha-w4 on 16 windows"]


def test_a_failure_says_what_it_rests_on(careful: pytest.Pytester) -> None:
    result = run(careful, OVER)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       assert quantized.kl.mean.within(0.02)",
            "E       assert <FAIL: kl.mean of alpha-w2 = 0.04 nats, at least *",
            "E*  kl.mean of alpha-w2 = 0.04 nats  budget <= 0.02  (over by 0.02, +100%)",
            "E*  at least 0.0* with 0.95 confidence, after look 1 of 3, 16 of 64 windows",
            "E*  one line of detail",
            "E*  1600 samples, 16 documents, convention spread512",
        ]
    )


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
@pytest.mark.parametrize(
    ("policy", "outcomes", "tag", "ok"),
    [
        ("fail", {"failed": 1}, "failure", False),
        ("warn", {"passed": 1, "warnings": 1}, None, True),
        ("xfail", {"xfailed": 1}, "skipped", True),
    ],
)
def test_doubt_is_what_the_run_makes_of_it(
    careful: pytest.Pytester,
    policy: str,
    outcomes: dict[str, int],
    tag: str | None,
    ok: bool,
    workers: str,
) -> None:
    result = run(careful, OPEN, f"--qlab-inconclusive={policy}", workers)
    result.assert_outcomes(**outcomes)
    assert result.ret == (1 if policy == "fail" else 0)
    budget = budget_of(careful, "beta-w4")
    assert (budget["outcome"], budget["ok"]) == ("inconclusive", ok)
    assert budget["windows"] == 64
    assert budget["lower"] < 0.02 < budget["upper"]
    if policy != "xfail":
        result.stdout.fnmatch_lines(["*windows would decide it*--qlab-max-windows=*"])
    (case,) = ElementTree.parse(careful.path / "junit.xml").getroot().iter("testcase")
    inner = [child for child in case if child.tag != "properties"]
    assert [child.tag for child in inner] == ([] if tag is None else [tag])
    if inner:
        assert "kl.mean of beta-w4" in f"{inner[0].get('message')}{inner[0].text}"
        assert "INCONCLUSIVE" in f"{inner[0].get('message')}{inner[0].text}"
    values = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert values["qlab.kl.mean"] == "0.019"
    drawn = [note for note in notes_of(careful) if "windows" in note]
    assert drawn == [f"beta-w4 on {count} windows" for count in (16, 32, 64)]


def test_what_is_surely_over_fails_under_every_policy(careful: pytest.Pytester) -> None:
    for policy in ("warn", "xfail"):
        run(careful, OVER, f"--qlab-inconclusive={policy}").assert_outcomes(failed=1)


def test_the_confidence_can_be_chosen_for_a_run_and_for_an_assertion(
    careful: pytest.Pytester,
) -> None:
    run(careful, OPEN, "--qlab-confidence=0.6").assert_outcomes(passed=1)
    budget = budget_of(careful, "beta-w4")
    assert (budget["outcome"], budget["windows"]) == ("pass", 64)
    careful.makepyfile(
        test_it="""
        def test_careful(quantized):
            decision = quantized.kl.mean.within(0.02, confidence=0.99)
            assert decision.confidence == 0.99
            assert decision
        """
    )
    run(careful, OPEN, "--qlab-confidence=0.6").assert_outcomes(failed=1)


def test_words_of_ones_own_stand_above(careful: pytest.Pytester) -> None:
    careful.makepyfile(
        test_it="""
        def test_careful(quantized):
            assert quantized.kl.mean.within(0.02), "ask the numerics team"
        """
    )
    result = run(careful, OVER)
    result.stdout.fnmatch_lines(
        ["E*AssertionError: ask the numerics team", "E*kl.mean of alpha-w2 = 0.04 nats  budget*"]
    )


def test_an_assertion_about_something_else_is_left_alone(careful: pytest.Pytester) -> None:
    careful.makepyfile(
        test_it="""
        def test_careful(quantized):
            if not quantized.kl.mean.within(0.02):
                assert 1 == 2
        """
    )
    result = run(careful, OVER)
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("E*budget*")


def test_a_branch_that_was_not_taken_is_no_missed_budget(careful: pytest.Pytester) -> None:
    careful.makepyfile(
        test_it="""
        def test_careful(quantized):
            assert quantized.kl.mean.within(0.01) or quantized.kl.mean.within(0.1)
        """
    )
    run(careful, OVER).assert_outcomes(passed=1)
    assert budget_of(careful, "alpha-w2")["budget"] == 0.1


def test_a_plain_comparison_after_it_uses_all_windows(careful: pytest.Pytester) -> None:
    careful.makepyfile(
        test_it="""
        def test_careful(quantized):
            assert quantized.kl.mean.within(0.02)
            assert quantized.kl.mean < 0.02
        """
    )
    run(careful, SURE).assert_outcomes(passed=1)
    (row,) = results_of(careful)["candidates"]
    assert [(b["op"], b["outcome"], b["windows"]) for b in row["budgets"]] == [
        ("<=", "pass", 16),
        ("<", "", None),
    ]
    assert row["measures"]["kl.mean"]["clusters"] == 64
    drawn = [note for note in notes_of(careful) if "windows" in note]
    assert drawn == ["alpha-w4 on 16 windows", "alpha-w4 on 64 windows"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("at_least(0.02)", "lower is better for kl.mean"),
        ("within(float('nan'))", "the budget has to be a finite number"),
        ("within(0.02, confidence=95)", "at least 0.5 and less than 1, such as 0.95"),
    ],
)
def test_a_mistake_is_one_paragraph(careful: pytest.Pytester, call: str, message: str) -> None:
    careful.makepyfile(
        test_it=f"""
        def test_careful(quantized):
            assert quantized.kl.mean.{call}
        """
    )
    result = run(careful, SURE)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*{message}*"])
    result.stdout.no_fnmatch_line("*decision.py*")
    assert not [note for note in notes_of(careful) if "windows" in note]
