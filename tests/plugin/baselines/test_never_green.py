"""What must not look green: regressions that are hidden, comparisons that cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qlab.gate.baselines import Baseline
from pytest_qlab.gate.record import record_of
from tests.plugin.baselines.project import TESTS, Project, lab_of
from tests.plugin.fakes import results_of


@pytest.mark.parametrize("mark", ["@pytest.mark.xfail", "@pytest.mark.xfail(strict=True)"])
def test_an_expected_failure_does_not_hide_a_regression(released: Project, mark: str) -> None:
    released.write(f"import pytest\n{mark}\ndef test_it(quantized):\n    print(quantized.snr_db)")
    result = released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002")
    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("end", ["pytest.skip('enough')", "pytest.xfail('known')"])
def test_what_only_a_skipped_test_measured_is_red(released: Project, end: str) -> None:
    released.write(
        f"import pytest\ndef test_it(quantized):\n    print(quantized.snr_db)\n    {end}"
    )
    result = released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*only by tests that were skipped or expected*kl.mean of small*"])
    released.write(
        f"import pytest\ndef test_it(quantized):\n    print(quantized.snr_db)\n    {end}\n"
        "def test_next(quantized): pass"
    )
    result = released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002")
    result.stdout.fnmatch_lines(["FAILED *test_next*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--qlab-compare=v2"], "there is no baseline 'v2' in *Did you mean 'v1'*"),
        (["--qlab-compare=v2", "-n2"], "there is no baseline 'v2' in *"),
        (["--qlab-compare", "test_it.py"], "there is no baseline 'test_it.py' in *"),
        (["--qlab-compare", "--qlab-baselines=none"], "there is no baseline in *--qlab-save=NAME*"),
        (["--qlab-compare="], "*--qlab-compare: expected text*"),
        (["--qlab-compare=a/b"], "*--qlab-compare: expected a name of letters*"),
        (["--qlab-save=@last"], "*--qlab-save: expected a name of letters*"),
        (
            ["--qlab-compare", "--qlab-methods=other,none"],
            "*v1 has no candidate of this run*it has small*this run has other, none*",
        ),
        (
            ["--qlab-compare-fail=memory.peak:5%"],
            "*v1 has no memory.peak of small*--qlab-save=v1*",
        ),
        (["--qlab-compare-fail=kl.mean[[]code]:1"], "*no domain 'code'*Valid: evaluation*"),
        (["--qlab-compare-fail=kl.mean"], "*expected MEASURE:AMOUNT*"),
        (["--qlab-compare-fail=kl.maen:1"], "*Did you mean 'kl.mean'*"),
        (["--qlab-compare=@none", "--qlab-compare-fail=kl.mean:1"], "*contradict each other*"),
    ],
)
def test_a_comparison_that_cannot_be_made_ends_the_run_before_it_begins(
    released: Project, arguments: list[str], message: str
) -> None:
    released.write("open('ran', 'w')\n" + TESTS)
    result = released.run(*(each.replace("[[]", "[") for each in arguments))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{message}" if message[0] != "*" else message])
    assert not (released.pytester.path / "ran").exists()


def test_a_damaged_file_ends_the_run_before_it_begins(released: Project) -> None:
    path = released.file("v1")
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    result = released.run("--qlab-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*v1.json is not JSON*Restore it from version control*"])


@pytest.mark.parametrize(
    ("arguments", "others", "message"),
    [
        ([], {"evaluation": "elsewhere"}, "*measured on other windows*"),
        (["--qlab-max-windows=12"], {}, "*18 windows of evaluation*12 windows of evaluation*"),
        (["--qlab-dtype=bfloat16"], {}, "*computed in float32*give --qlab-dtype=float32*"),
    ],
)
def test_a_baseline_of_something_else_is_red(
    released: Project, arguments: list[str], others: dict[str, str], message: str
) -> None:
    released.configure(bits=4, **others)
    result = released.run("--qlab-compare", *arguments)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([message])


def test_a_threshold_that_nothing_was_held_to_is_red(released: Project) -> None:
    released.write("def test_it(quantized):\n    assert quantized.size > 0")
    result = released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:9,size:9")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["--qlab-compare-fail=kl.mean:9 was held against nothing*small*"])
    result.stdout.no_fnmatch_line("*size:9 was held*")
    assert results_of(released.pytester)["exit_status"] == 1


@pytest.mark.parametrize("test", ["def test_it(quantized): pass", "def test_it(): pass"])
def test_a_baseline_that_nothing_was_compared_with_is_red(released: Project, test: str) -> None:
    released.write(test)
    result = released.run("--qlab-compare")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*the baseline v1 was compared with nothing*"])


def test_candidates_of_one_side_only_are_named(released: Project, inputs: Path) -> None:
    saved = Baseline.read(released.file("v1"))
    saved.merge(record_of(lab_of(inputs).candidate("rtn:bits=3"), evaluated=True))
    saved.write(released.file("v1"))
    result = released.run("--qlab-methods=small,other", "--qlab-compare=v1")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["*compared with qlab-baselines/v1.json; only there: rtn-w3g128; only here: other"]
    )
