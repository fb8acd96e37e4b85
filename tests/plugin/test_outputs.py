from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_qlab.running.collector import Collector
from pytest_qlab.xdist.integrity import Integrity
from tests.plugin.fakes import QUALITY, add_to_conftest, results_of

HTML = ("-p", "pytest_metadata.plugin", "-p", "pytest_html.plugin")


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_subprocess(
        "-p", "no:cacheprovider", "--qlab-json=results.json", *arguments
    )


def test_budgets_of_passing_tests_are_recorded_too(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY)
    run(project, "--qlab-methods=alpha").assert_outcomes(passed=1)
    (row,) = results_of(project)["candidates"]
    (budget,) = row["budgets"]
    assert budget == {
        "test": "test_budgets_of_passing_tests_are_recorded_too.py::test_quality[alpha-w4]",
        "metric": "perplexity_delta",
        "value": 0.05,
        "op": "<",
        "budget": 0.1,
        "ok": True,
        "outcome": "",  # which a plain comparison has not
        "lower": None,
        "upper": None,
        "windows": None,
    }
    assert row["measures"]["perplexity_delta"]["clusters"] == 30
    document = results_of(project)
    assert document["built"] == {"fidelity/alpha-w4": 1}
    assert document["summary"] == {"passed": 1}
    assert document["model"]["name"] == "fake"
    assert document["exit_status"] == 0


def test_a_candidate_that_a_test_makes_itself_has_a_row(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        from pytest_qlab.specs import parse_specs

        def test_q(qlab):
            (spec,) = parse_specs(["beta:bits=2"])
            assert qlab.candidate(spec).perplexity_delta < 1
        """
    )
    run(project, "--qlab-methods=alpha").assert_outcomes(passed=1)
    rows = {row["id"]: row for row in results_of(project)["candidates"]}
    assert rows["beta-w2"]["measures"]["perplexity_delta"]["value"] == 0.0
    assert rows["beta-w2"]["budgets"][0]["ok"] is True


def test_rows_are_in_the_order_in_which_methods_were_named(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY)
    run(project, "--qlab-methods=beta,alpha,beta:bits=2")
    found = [row["id"] for row in results_of(project)["candidates"]]
    assert found == ["beta-w4", "alpha-w4", "beta-w2"]


def test_an_error_of_ours_is_one_paragraph_without_traceback(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BREAKS", "beta-w4")
    project.makepyfile(
        test_it=QUALITY
        + """
def test_more(quantized): pass

def test_raises(baseline):
    from pytest_qlab.errors import DataError
    raise DataError("The file is empty. Give one with text.") from ValueError("inner")
"""
    )
    result = run(project, "--qlab-methods=alpha,beta")
    result.assert_outcomes(passed=2, errors=2, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["The weights of layer 3 are not finite. Check*"])
    result.stdout.fnmatch_lines(["The file is empty. Give one with text."])
    result.stdout.fnmatch_lines(["FAILED*::test_raises*The file is*"])
    for traceback in ("*fakes*", "*raise DataError*", "*conftest.py:*", "*inner*"):
        result.stdout.no_fnmatch_line(traceback)
    rows = {row["id"]: row for row in results_of(project)["candidates"]}
    assert rows["beta-w4"]["error"].startswith("The weights of layer 3")
    assert set(rows["beta-w4"]["tests"].values()) == {"error"}


def test_pages_are_written_where_asked(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = project.path / "step.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    project.makepyfile(QUALITY)
    run(
        project,
        "--qlab-methods=alpha",
        "--qlab-html=out/page.html",
        "--qlab-markdown=page.md",
        *HTML,
        "--html=report.html",
        "--self-contained-html",
    ).assert_outcomes(passed=1)
    for name in ("out/page.html", "page.md", "report.html"):
        assert "alpha" in (project.path / name).read_text(encoding="utf-8")
    report = (project.path / "report.html").read_text(encoding="utf-8")
    assert "perplexity_delta" in report
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert "alpha" in text


def test_a_page_that_cannot_be_made_costs_nothing_else(project: pytest.Pytester) -> None:
    add_to_conftest(
        project,
        """
import pytest_qlab.report.html as page
import pytest_qlab.report.terminal as terminal

def broken(*arguments):
    raise KeyError("column")

page.render_page = page.render_section = terminal.render_terminal = broken
""",
    )
    project.makepyfile(QUALITY)
    result = run(
        project, "--qlab-methods=alpha", "--qlab-html=page.html", *HTML, "--html=report.html"
    )
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*could not write*page.html: KeyError: 'column'"])
    result.stdout.fnmatch_lines(["*the table could not be made: KeyError*"])
    assert [row["id"] for row in results_of(project)["candidates"]] == ["alpha-w4"]
    assert (project.path / "report.html").exists()


def test_results_that_cannot_be_collected_fail_the_test(project: pytest.Pytester) -> None:
    add_to_conftest(
        project,
        """
def broken(self):
    raise RuntimeError("no fragment")

FakeCandidate.fragment = broken
""",
    )
    project.makepyfile(QUALITY)
    result = run(project, "--qlab-methods=alpha")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*could not collect what this test measured*no fragment*"])


def test_a_test_that_vanishes_is_never_green(project: pytest.Pytester) -> None:
    add_to_conftest(
        project,
        """
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    return True if "beta" in item.nodeid else None
""",
    )
    project.makepyfile(QUALITY)
    result = run(project, "--qlab-methods=alpha,beta")
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR
    result.stdout.fnmatch_lines(["*1 of 2 tests were scheduled but never reported*beta-w4*"])
    assert results_of(project)["exit_status"] == 3


def report(name: str, when: str, outcome: str, **more: Any) -> Any:
    fields = {"nodeid": name, "when": when, "outcome": outcome, "duration": 1.0, **more}
    fields |= {kind: outcome == kind for kind in ("passed", "failed", "skipped")}
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([("setup", "passed"), ("call", "passed"), ("teardown", "passed")], "passed"),
        ([("setup", "passed"), ("call", "failed"), ("teardown", "passed")], "failed"),
        ([("setup", "skipped"), ("teardown", "passed")], "skipped"),
        ([("setup", "failed"), ("teardown", "passed")], "error"),
        ([("setup", "passed"), ("call", "passed"), ("teardown", "failed")], "error"),
        ([("setup", "passed"), ("call", "rerun"), ("call", "passed")], "passed"),
    ],
)
def test_outcomes(phases: list[tuple[str, str]], expected: str) -> None:
    from pytest_qlab.xdist.plan import PlanEntry

    collector = Collector()
    for when, outcome in phases:
        collector.add(report("t.py::q[a]", when, outcome))
    results = collector.results({"t.py::q[a]": PlanEntry(group="a", method="m")}, ["a"])
    (row,) = results.candidates
    assert row.tests == {"t.py::q[a]": expected}
    assert results.summary == {expected: 1}


@pytest.mark.parametrize(
    ("status", "stopped", "ran", "expected"),
    [
        (0, False, True, 3),
        (5, False, True, 3),
        (1, False, True, 1),
        (2, False, True, 2),
        (0, True, True, 0),
        (0, False, False, 0),
    ],
)
def test_exit_status_when_tests_were_lost(
    status: int, stopped: bool, ran: bool, expected: int
) -> None:
    integrity = Integrity()
    integrity.expect(["a", "b"], ["a"])
    integrity.report(report("a", "teardown", "passed"))
    session: Any = SimpleNamespace(shouldstop=stopped, shouldfail=False)
    assert integrity.judge(session, status, ran=ran) == expected
    assert bool(integrity.problems) == (ran and not stopped and status != 2)


def test_plain_tests_that_were_lost_are_not_our_business() -> None:
    integrity = Integrity()
    integrity.expect(["a"], [])
    session: Any = SimpleNamespace(shouldstop=False, shouldfail=False)
    assert integrity.judge(session, 0, ran=True) == 0


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    collector = Collector()
    collector.results({}, [])
    settings: Any = SimpleNamespace(json=tmp_path / "file" / "x.json", html=None, markdown=None)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.warns(pytest.PytestWarning, match=r"could not write .*x\.json"):
        collector.finish(settings, 0, 1)


NOT_MEASURED = """
    from pytest_qlab.errors import NotMeasuredError

    def test_speed(quantized):
        raise NotMeasuredError("another process held the CPU")
"""


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_what_could_not_be_measured_is_neither_passed_nor_failed(
    project: pytest.Pytester, workers: str
) -> None:
    project.makepyfile(NOT_MEASURED)
    result = run(project, "--qlab-methods=alpha", workers, "-rs")
    result.assert_outcomes(skipped=1)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*SKIPPED*another process held the CPU*"])
    (row,) = results_of(project)["candidates"]
    assert set(row["tests"].values()) == {"skipped"}
    strict = run(project, "--qlab-methods=alpha", workers, "--qlab-require-all")
    assert strict.ret == pytest.ExitCode.TESTS_FAILED
