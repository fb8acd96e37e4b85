"""Distributed runs: nothing is lost, nothing looks green that is not."""

from __future__ import annotations

import pytest

from tests.plugin.fakes import QUALITY, add_to_conftest, notes_of, results_of

SUITE = (
    QUALITY
    + """
def test_other(quantized):
    assert quantized.perplexity_delta > -1

def test_speed(quantized):
    assert quantized.latency < 1

def test_base(baseline):
    assert baseline.perplexity_delta < 0.1

def test_plain():
    pass
"""
)


def comparable(document: dict[str, object]) -> dict[str, object]:
    """The parts of a results document that do not say when and how fast."""
    left_out = ("created", "seconds", "environment", "built")
    return {key: value for key, value in document.items() if key not in left_out}


def test_results_equal_those_of_one_process(project: pytest.Pytester) -> None:
    project.makepyfile(SUITE)
    arguments = ("--qlab-methods=beta,alpha", "-q", "-p", "no:cacheprovider")
    one = project.runpytest_subprocess(*arguments, "-n0", "--qlab-json=one.json")
    two = project.runpytest_subprocess(*arguments, "-n2", "--qlab-json=two.json")
    for result in (one, two):
        result.assert_outcomes(passed=7, failed=1)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(
            [
                "*perplexity_delta of beta-w4 = 0.2345  budget < 0.1  (over by 0.1345, +134%)",
                "*beta-w4*0.234*",
                "*alpha-w4*0.050*",
            ]
        )
    assert comparable(results_of(project, "one.json")) == comparable(
        results_of(project, "two.json")
    )
    assert results_of(project, "two.json")["environment"]["workers"] == 2


@pytest.mark.parametrize("dist", [(), ("--dist=load",)])
def test_tests_of_latency_run_alone(project: pytest.Pytester, dist: tuple[str, ...]) -> None:
    project.makepyfile(
        """
        import os, time
        import pytest

        def note(what):
            with open("order.txt", "a") as stream:
                stream.write(f"{what} {os.getpid()}\\n")

        @pytest.mark.parametrize("number", range(3))
        def test_busy(quantized, number):
            note("start")
            time.sleep(0.2)
            note("end")

        def test_timed(quantized):
            note("start-alone")
            quantized.latency
            time.sleep(0.2)
            note("end-alone")
        """
    )
    result = project.runpytest_subprocess("-n2", "--qlab-methods=alpha,beta", *dist)
    result.assert_outcomes(passed=8)
    lines = (project.path / "order.txt").read_text(encoding="utf-8").splitlines()
    running = set()
    for line in lines:
        what, process = line.split()
        running.add(process) if what.startswith("start") else running.remove(process)
        assert len(running) == 1 if "alone" in what and "start" in what else True
        if what == "end-alone":
            assert not running
    if not dist:
        assert [line.split()[0] for line in lines[-4:]] == ["start-alone", "end-alone"] * 2


def test_a_killed_worker_loses_its_test_only_and_is_never_green(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import os, signal
        from pathlib import Path

        def test_first(quantized):
            if quantized.id == "alpha-w4":
                os.kill(os.getpid(), signal.SIGKILL)

        def test_second(quantized):
            assert quantized.perplexity_delta < 1
        """
    )
    result = project.runpytest_subprocess(
        "-n2", "--qlab-methods=alpha,beta", "--qlab-json=results.json"
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3, failed=1)
    rows = {row["id"]: row for row in results_of(project)["candidates"]}
    assert "crashed while running" in rows["alpha-w4"]["error"]
    assert sorted(rows["alpha-w4"]["tests"].values()) == ["error", "passed"]
    assert sorted(rows["beta-w4"]["tests"].values()) == ["passed", "passed"]


def test_a_killed_worker_that_is_not_replaced_is_never_green(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import os, signal

        def test_first(quantized):
            os.kill(os.getpid(), signal.SIGKILL)

        def test_second(quantized):
            pass
        """
    )
    result = project.runpytest_subprocess("-n1", "--qlab-methods=alpha", "--max-worker-restart=0")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*1 of 2 tests were scheduled but never reported*test_second*"])


def test_an_internal_error_of_a_worker_is_never_green(project: pytest.Pytester) -> None:
    add_to_conftest(
        project,
        """
def pytest_runtest_logreport(report):
    if report.when == "call" and os.environ.get("PYTEST_XDIST_WORKER"):
        raise RuntimeError("broken hook")
""",
    )
    project.makepyfile("def test_q(quantized): pass")
    result = project.runpytest_subprocess("-n1", "--qlab-methods=alpha")
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR


def test_recorded_numbers_of_any_type_break_no_worker(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import enum, pathlib
        import numpy

        class Colour(enum.IntEnum):
            RED = 3

        def test_q(quantized, record_property):
            record_property("estimate", quantized.perplexity_delta)
            record_property("numpy", numpy.float32(0.5))
            record_property("array", numpy.zeros(3))
            record_property("path", pathlib.Path("a"))
            record_property("colour", Colour.RED)
        """
    )
    result = project.runpytest_subprocess("-n1", "--qlab-methods=alpha", "--junit-xml=junit.xml")
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    xml = (project.path / "junit.xml").read_text(encoding="utf-8")
    assert '<property name="estimate" value="0.05"' in xml
    assert '<property name="numpy" value="0.5"' in xml
    assert '<property name="qlab.perplexity_delta" value="0.05"' in xml


def test_what_workers_say_about_long_work_is_shown(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import time
        from pytest_qlab.running.run import run_of

        def test_q(quantized, pytestconfig):
            run_of(pytestconfig).progress("gptq: layer 7/24")
            time.sleep(1.0)
        """
    )
    result = project.runpytest_subprocess("-n1", "--qlab-methods=alpha")
    result.stdout.fnmatch_lines(["*[[]gw0] gptq: layer 7/24"])
    result = project.runpytest_subprocess("--qlab-methods=alpha")
    result.stdout.fnmatch_lines(["*qlab: gptq: layer 7/24"])


def test_failing_at_the_first_failure_is_not_called_a_loss(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY + "\ndef test_later(quantized): pass")
    result = project.runpytest_subprocess("-x", "-n1", "--qlab-methods=beta,alpha")
    assert result.ret != 0
    result.stdout.no_fnmatch_line("*not complete*")
    assert "lab " in notes_of(project)
