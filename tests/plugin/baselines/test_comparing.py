"""Comparing with a baseline in whole runs: which test fails for what, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qlab.gate.baselines import Baseline
from tests.plugin.baselines.project import TESTS, Project, lines_of, small
from tests.plugin.fakes import results_of


def test_an_unchanged_candidate_costs_nothing_and_passes(
    project: Project, release: Baseline
) -> None:
    release.write(project.file("v1"))
    project.run().assert_outcomes(passed=3)  # The store has what these tests need now.
    result = project.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0,top1_agreement:0,size:0")
    result.assert_outcomes(passed=3)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "qlab baseline: v1 (kl.mean:0, top1_agreement:0, size:0)",
            "  small: as saved (held to it: *",
            "qlab baseline: compared with qlab-baselines/v1.json",
        ]
    )
    found = results_of(project.pytester)
    assert (found["forwards"], found["baseline"]) == (0, "v1")
    assert {change["difference"] for change in project.changes().values()} == {0}


def test_a_regression_fails_the_test_that_measured_it(released: Project, inputs: Path) -> None:
    result = released.run("--qlab-compare=v1", "--qlab-compare-fail=kl.mean:0.002,size:0")
    result.assert_outcomes(passed=2, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["FAILED test_it.py::test_quality[[]small] - *RegressionError*"])
    before, now = (small(inputs, bits).fidelity.kl.mean for bits in (4, 3))
    change = released.changes()["kl.mean"]
    assert (change["saved"], change["value"]) == pytest.approx((before, now), rel=1e-5)
    assert change["difference"] == pytest.approx(now - before, rel=1e-5)
    assert change["margin"] == 0.002 < change["lower"] < now - before < change["upper"]
    message = next(line for line in result.outlines if line.startswith("kl.mean of small was"))
    for part in (
        f"was {change['saved']:.6g} nats in the baseline v1 and is {change['value']:.6g} nats now",
        f"a difference of {change['difference']:+.4g}, from {change['lower']:+.4g} to",
        "paired over 18 windows. It may be worse by 0.002 (--qlab-compare-fail=kl.mean:0.002)",
    ):
        assert part in message
    assert released.changes()["size"]["outcome"] == "pass"
    assert "may be worse by 0.002 nats: worse small: size" in lines_of(result)


def test_without_thresholds_changes_are_only_shown(released: Project) -> None:
    result = released.run("--qlab-compare")
    result.assert_outcomes(passed=3)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["against the baseline v1:", "  small: kl.mean *"])
    assert {change["outcome"] for change in released.changes().values()} == {""}


def test_a_test_fails_for_what_it_made_known_or_compared(released: Project) -> None:
    """Not for what another has measured before it."""
    released.write(
        """
        def test_first(quantized): print(quantized.snr_db)
        def test_unrelated(quantized): assert quantized.cosine > 0
        def test_compares(quantized): assert quantized.kl.mean < 9
        def test_other(quantized): assert quantized.kl.median < 9
        """
    )
    result = released.run("--qlab-compare-fail=kl.mean:0.002")  # Against the last there is.
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["FAILED *test_first*", "FAILED *test_compares*"])


def test_all_windows_are_compared_after_an_early_decision(released: Project, inputs: Path) -> None:
    released.write("def test_it(quantized):\n    assert quantized.kl.mean.within(9)")
    result = released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002")
    result.assert_outcomes(failed=1)
    now = small(inputs, 3).fidelity.kl.mean
    assert released.changes()["kl.mean"]["value"] == pytest.approx(now, rel=1e-5)


def test_a_test_that_failed_says_what_it_failed_over(released: Project) -> None:
    released.write("def test_it(quantized):\n    assert quantized.kl.mean < 0.001")
    result = released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*kl.mean of small = *budget < 0.001*"])
    result.stdout.no_fnmatch_line("*It may be worse by*")
    assert released.changes()["kl.mean"]["outcome"] == "fail"


RERUN = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        item._initrequest()
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            item.ihook.pytest_runtest_logreport(report=report)
    return True
"""


def test_a_rerun_is_judged_again(released: Project) -> None:
    released.pytester.makeconftest(RERUN)
    released.write(f"{TESTS}\ndef test_last(): pass")  # After which all that was made is let go.
    released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002").assert_outcomes(
        passed=6, failed=2
    )


@pytest.mark.parametrize(
    ("policy", "outcomes"),
    [
        ("fail", {"failed": 1, "passed": 2}),
        ("warn", {"passed": 3}),
        ("xfail", {"xfailed": 1, "passed": 2}),
    ],
)
def test_what_is_not_decided_goes_by_the_policy(
    released: Project, policy: str, outcomes: dict[str, int]
) -> None:
    released.run("--qlab-compare")
    margin = released.changes()["kl.mean"]["difference"]
    result = released.run(
        f"--qlab-compare-fail=kl.mean:{margin!r}",
        f"--qlab-inconclusive={policy}",
        "-rxX",
        "-Wdefault",
    )
    result.assert_outcomes(**outcomes)
    assert result.ret == (policy == "fail")
    assert "is not decided: save and compare over more windows" in lines_of(result)
