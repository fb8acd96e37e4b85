"""No row mixes two models or texts, and no run without a test is green."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_qlab.running.collector import Collector
from pytest_qlab.running.subjects import Subjects
from tests.plugin.fakes import results_of


def payload(model: str, evaluation: str, name: str = "embedded") -> dict[str, Any]:
    return {
        "description": {
            "model": {"id": model, "name": "m"},
            "evaluation": {"id": evaluation, "name": name},
            "calibration": {"id": "c", "name": "c"},
        }
    }


def test_what_most_tests_are_about_has_plain_rows() -> None:
    subjects = Subjects(
        {
            "a": payload("1", "text"),
            "b": payload("1", "text"),
            "c": payload("2", "text"),
            "d": payload("1", "other", "wikitext2"),
            "e": {"description": {}},
        }
    )
    assert subjects.named("a", "rtn-w4") == "rtn-w4"
    assert subjects.named("c", "rtn-w4") == "rtn-w4 @ model m 2"
    assert subjects.named("d", "rtn-w4") == "rtn-w4 @ evaluation wikitext2"
    assert subjects.named("e", "rtn-w4") == "rtn-w4"
    assert subjects.named("unknown", "rtn-w4") == "rtn-w4"
    assert subjects.main["model"]["id"] == "1"
    assert Subjects({}).main == {}


def report(name: str, outcome: str, subject: dict[str, Any], ok: bool = True) -> Any:
    class Report:
        nodeid, when, duration = name, "call", 0.0
        failed, skipped, passed = outcome == "failed", False, outcome == "passed"
        longrepr = ""

    Report.outcome = outcome  # type: ignore[attr-defined]
    Report.qlab = {  # type: ignore[attr-defined]
        "v": 1,
        "group": "rtn-w4",
        "fragments": [
            {
                "id": "rtn-w4",
                "method": "rtn",
                "measures": {"perplexity": {"value": float(len(name))}},
            }
        ],
        "comparisons": [
            {
                "candidate": "rtn-w4",
                "metric": "perplexity",
                "value": 1.0,
                "op": "<",
                "budget": 2.0,
                "ok": ok,
            }
        ],
        "counters": {"process": "main", "built": {}, "reused": 0, "forwards": 0},
        **subject,
    }
    return Report()


def test_rows_of_other_inputs_are_rows_of_their_own() -> None:
    collector = Collector()
    collector.add(report("test_one", "passed", payload("1", "t")))
    collector.add(report("test_two", "passed", payload("1", "t")))
    collector.add(report("sub/test_other", "passed", payload("2", "t")))
    results = collector.results({}, ["rtn-w4"])
    rows = {row.id: row for row in results.candidates}
    assert list(rows) == ["rtn-w4", "rtn-w4 @ model m 2"]
    assert rows["rtn-w4"].measures["perplexity"].value == len("test_two")
    other = rows["rtn-w4 @ model m 2"]
    assert other.measures["perplexity"].value == len("sub/test_other")
    assert [budget.test for budget in other.budgets] == ["sub/test_other"]
    assert results.model["id"] == "1"


@pytest.mark.parametrize(("outcome", "kept"), [("passed", 0), ("failed", 1)])
def test_a_branch_that_was_not_taken_is_no_missed_budget(outcome: str, kept: int) -> None:
    collector = Collector()
    collector.add(report("test_one", outcome, payload("1", "t"), ok=False))
    (row,) = collector.results({}, []).candidates
    assert len(row.budgets) == kept


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
@pytest.mark.parametrize("selection", [(), ("-k", "only")])
def test_a_run_without_any_test_left_is_not_green(
    project: pytest.Pytester, workers: str, selection: tuple[str, ...]
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.qlab(methods=["beta"])
        def test_only(quantized):
            assert quantized.perplexity_delta < 1
        """
    )
    if selection:
        project.makepyfile(test_others="def test_all(quantized):\n    pass\n")
    arguments = ("--qlab-methods=alpha", "-p", "no:cacheprovider", workers, *selection)
    result = project.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = " ".join([*result.outlines, *result.errlines])
    assert "no test is left for the methods of this run" in text


def test_a_run_with_some_test_left_is_green(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.qlab(methods=["beta"])
        def test_only(quantized):
            pass

        def test_all(quantized):
            assert quantized.perplexity_delta < 1
        """
    )
    arguments = (
        "--qlab-methods=alpha",
        "-p",
        "no:cacheprovider",
        "-n2",
        "--qlab-json=results.json",
    )
    result = project.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.OK
    assert [row["id"] for row in results_of(project)["candidates"]] == ["alpha-w4"]
