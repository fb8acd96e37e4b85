"""Saved baselines in whole runs over a tiny model: what is saved, compared, and never green."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_qlab import Lab, MethodSpec
from pytest_qlab.gate.baselines import Baseline
from pytest_qlab.gate.record import record_of
from pytest_qlab.methods.rtn import Rtn
from tests.lab.tiny import documents, saved_tiny_model
from tests.plugin.fakes import results_of

DIRECTORY = "qlab-baselines"
TESTS = """
def test_size(quantized):
    assert quantized.size > 0

def test_quality(quantized):
    assert quantized.perplexity_ratio < 9

def test_again(quantized):
    assert quantized.kl.median < 9
"""
TABLE = """
[tool.qlab]
model = "{model}"
eval = ["{evaluation}"]
calibration = ["{calibration}"]
window_length = 48
calibration_length = 32
threads = 1
select = [{select}]
{more}
[tool.qlab.methods.small]
method = "rtn"
bits = {bits}
group_size = 16
[tool.qlab.methods.other]
method = "rtn"
bits = 8
group_size = 16
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, another model, texts, and a store that all runs share."""
    root = tmp_path_factory.mktemp("inputs")
    saved_tiny_model(root / "model")
    for name, seed in (("evaluation", 1), ("calibration", 2), ("elsewhere", 3)):
        (root / name).mkdir()
        for number, document in enumerate(documents(6, seed)):
            (root / name / f"{number}.txt").write_text(document.text, encoding="utf-8")
    return root


def lab_of(inputs: Path) -> Lab:
    return Lab(
        str(inputs / "model"),
        evaluation=str(inputs / "evaluation"),
        calibration=str(inputs / "calibration"),
        window_length=48,
        calibration_length=32,
        threads=1,
        store=inputs / "store",
    )


def small(inputs: Path, bits: int) -> Any:
    method = Rtn.model_validate({"bits": bits, "group_size": 16})
    return lab_of(inputs).candidate(MethodSpec(method, "small"))


@pytest.fixture(scope="module")
def release(inputs: Path) -> Baseline:
    """What a run with `small` at 4 bits saves."""
    return record_of(small(inputs, 4), evaluated=True)


class Project:
    """A project that compares `small`, at so many bits, with baselines in its directory."""

    def __init__(self, pytester: pytest.Pytester, inputs: Path) -> None:
        self.pytester = pytester
        self.inputs = inputs
        self.configure()
        pytester.makepyfile(test_it=TESTS)

    def configure(
        self, bits: int = 4, more: str = "", select: str = '"small"', **inputs: str
    ) -> None:
        names = {"model": "model", "evaluation": "evaluation", "calibration": "calibration"}
        paths = {key: (self.inputs / name).as_posix() for key, name in {**names, **inputs}.items()}
        self.pytester.makepyprojecttoml(TABLE.format(bits=bits, more=more, select=select, **paths))

    def write(self, text: str) -> None:
        self.pytester.makepyfile(test_it=text)

    def run(self, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
        run = (
            self.pytester.runpytest_subprocess if subprocess else self.pytester.runpytest_inprocess
        )
        return run("-p", "no:cacheprovider", "--qlab-json=results.json", *arguments)

    def row(self, name: str = "small") -> dict[str, Any]:
        rows = {row["id"]: row for row in results_of(self.pytester)["candidates"]}
        found: dict[str, Any] = rows[name]
        return found

    def changes(self) -> dict[str, dict[str, Any]]:
        return {change["metric"]: change for change in self.row()["changes"]}

    def file(self, name: str) -> Path:
        return self.pytester.path / DIRECTORY / f"{name}.json"


@pytest.fixture
def project(pytester: pytest.Pytester, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("QLAB_STORE", str(inputs / "store"))
    return Project(pytester, inputs)


@pytest.fixture
def released(project: Project, release: Baseline) -> Project:
    """With the baseline `v1`, and `small` at 3 bits since."""
    release.write(project.file("v1"))
    project.configure(bits=3)
    return project


def test_lines(result: pytest.RunResult) -> str:
    return " ".join("\n".join([*result.outlines, *result.errlines]).split())


test_lines.__test__ = False  # type: ignore[attr-defined]


# Saving


def test_a_green_run_saves_what_it_measured(project: Project, release: Baseline) -> None:
    result = project.run("--qlab-save=v1")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["qlab baseline: written qlab-baselines/v1.json (1 candidate, *kB)"]
    )
    found = Baseline.read(project.file("v1"))
    assert found.windows == release.windows
    assert found.candidates["small"].sums == release.candidates["small"].sums
    assert found.candidates["small"].options["bits"] == 4
    before = project.file("v1").read_bytes()
    project.run("--qlab-save=v1").stdout.fnmatch_lines(["*baseline: unchanged *v1.json*"])
    assert project.file("v1").read_bytes() == before
    project.configure(bits=3, select='"other"')
    project.run("--qlab-save=v1").stdout.fnmatch_lines(
        ["*baseline: replaced *v1.json (1 candidate*; no longer in it: small"]
    )
    assert list(Baseline.read(project.file("v1")).candidates) == ["other"]


def test_candidates_are_saved_whole_whatever_tests_asked_of_them(
    project: Project, release: Baseline
) -> None:
    """A size only, or a careful assertion that is decided after a few windows."""
    for test in (
        "assert quantized.size > 0",
        "assert quantized.kl.mean.within(9)",
        "other = quantized.lab.candidate('rtn:bits=2'); print(other.kl.mean)",
    ):
        project.write(f"def test_it(quantized):\n    {test}")
        assert project.run("--qlab-save=v1").ret == 0
        found = Baseline.read(project.file("v1")).candidates
        assert found["small"].sums == release.candidates["small"].sums
    assert found["rtn-w2g128"].sums is not None


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("assert quantized.size > 1e9", "*nothing was saved as *v1.json, because the run did not*"),
        (
            "import pytest; pytest.skip('no')",
            "nothing was saved as *: no test of a candidate passed*",
        ),
    ],
)
def test_nothing_is_saved_of_a_run_that_is_not_green(
    project: Project, test: str, reason: str
) -> None:
    project.write(f"def test_it(quantized):\n    {test}")
    result = project.run("--qlab-save=v1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([reason])
    assert not project.file("v1").exists()


def test_a_file_that_cannot_be_written_is_red(project: Project) -> None:
    project.file("v1").parent.write_text("in the way", encoding="utf-8")
    result = project.run("--qlab-save=v1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*nothing was saved as *v1.json: it cannot be written*"])
    assert results_of(project.pytester)["exit_status"] == 1


OVERRIDE = """
import pytest
from tests.architectures import ARCHITECTURES, character_tokenizer

@pytest.fixture(scope="session")
def base_model():
    return ARCHITECTURES["gpt2"]()

@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer()
"""


def test_tracebacks_are_as_without_us(project: Project) -> None:
    project.write("def test_it(quantized):\n    [].pop()")
    result = project.run("--qlab-save=v1")
    result.stdout.fnmatch_lines(["E * IndexError: pop from empty list"])
    result.stdout.no_fnmatch_line("*plugin.py*")


def test_two_models_in_a_run_are_an_error(project: Project, release: Baseline) -> None:
    sub = project.pytester.mkdir("sub")
    (sub / "conftest.py").write_text(OVERRIDE, encoding="utf-8")
    (sub / "test_sub.py").write_text(TESTS, encoding="utf-8")
    result = project.run("--qlab-save=v1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*measured several models or evaluation sets*separate runs*"])
    assert not project.file("v1").exists()
    release.write(project.file("v1"))
    result = project.run("--qlab-compare=v1")
    result.assert_outcomes(passed=3, failed=3)
    result.stdout.fnmatch_lines(["The baseline v1 is of another base model: model (*) there, *"])


# Comparing


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
    assert "may be worse by 0.002 nats: worse small: size" in test_lines(result)


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
    assert "is not decided: save and compare over more windows" in test_lines(result)


# Never green


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


# Files


FILES = 'compare = "v1"\ncompare_fail = ["kl.mean:0.002"]\nbaselines = "kept"'


def test_files_may_say_what_is_compared(released: Project, release: Baseline) -> None:
    released.configure(bits=3, more=FILES)
    release.write(released.pytester.path / "kept" / "v1.json")
    released.run().assert_outcomes(passed=2, failed=1)
    released.run("--qlab-compare=@none").assert_outcomes(passed=3)
    released.run("--qlab-compare-fail=kl.mean:9").assert_outcomes(passed=3)
    # What is meant to be is not held to what was before, unless that is asked for.
    released.run("--qlab-save=v2").assert_outcomes(passed=3)
    assert (released.pytester.path / "kept" / "v2.json").exists()
    result = released.run("--qlab-save=v3", "--qlab-compare")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["qlab baseline: v2 (kl.mean:0.002)", "*written kept/v3.json*"])
    result = released.run("--qlab-save=v4", "--qlab-compare=v1")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*nothing was saved as kept/v4.json, because the run did not*"])


def test_what_is_saved_is_said_on_the_command_line(project: Project) -> None:
    project.configure(more='save = "v1"')
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unknown key 'save' in [[]tool.qlab]*"])


def test_pages_show_what_has_changed(released: Project) -> None:
    from pytest_qlab.cli import main

    released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002", "--qlab-html=page.html")
    page = (released.pytester.path / "page.html").read_text(encoding="utf-8")
    assert "Against the baseline v1" in page
    assert "1 measure worse than saved" in page
    change = released.changes()["kl.mean"]
    assert f'data-c="difference" data-v="{change["difference"]!r}"' in page
    file = released.pytester.path / "results.json"
    for form, expected in (
        ("markdown", r"### Against the baseline v1\n\n- small: kl\.mean 0"),
        ("csv", r"kl\.mean\.saved,kl\.mean\.difference,kl\.mean\.outcome"),
    ):
        out = released.pytester.path / form
        assert main(["export", f"--format={form}", "-o", str(out), str(file)]) == 0
        assert re.search(expected, out.read_text(encoding="utf-8"))
    merged = released.pytester.path / "merged.json"
    assert main(["merge", str(file), str(file), f"--json={merged}"]) == 0
    (row,) = json.loads(merged.read_text(encoding="utf-8"))["candidates"]
    assert row["changes"] == list(released.changes().values())


# Processes


@pytest.mark.slow
def test_workers_save_the_same_bytes_and_compare_alike(project: Project) -> None:
    project.configure(select='"small", "other", "gptq:bits=3"')
    for name, workers in (("one", "-n0"), ("two", "-n2"), ("each", "-n2 --dist=load")):
        result = project.run(f"--qlab-save={name}", *workers.split(), subprocess=True)
        assert result.ret == 0, result.stdout.str()
    texts = {project.file(name).read_bytes() for name in ("one", "two", "each")}
    assert len(texts) == 1
    project.configure(bits=3, select='"small", "other", "gptq:bits=3"')
    arguments = ("--qlab-compare=one", "--qlab-compare-fail=kl.mean:0.002")
    found = []
    for workers in ("-n0", "-n2"):
        result = project.run(*arguments, workers, subprocess=True)
        result.assert_outcomes(passed=8, failed=1)
        result.stdout.fnmatch_lines(["FAILED *test_quality[[]small]*"])
        found.append([project.row(name)["changes"] for name in ("small", "other")])
    assert found[0] == found[1]


EMBEDDED = """
[tool.qlab]
eval = ["prose"]
max_windows = 8
select = ["release"]
[tool.qlab.methods.release]
method = "rtn"
bits = {bits}
"""


@pytest.mark.slow
def test_the_embedded_model_at_fewer_bits_is_a_regression(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLAB_STORE", str(tmp_path / "store"))
    pytester.makepyfile(
        test_it="def test_it(quantized):\n    assert quantized.top1_agreement > 0.1"
    )
    pytester.makepyprojecttoml(EMBEDDED.format(bits=4))
    arguments = ("-p", "no:cacheprovider", "--qlab-json=results.json")
    assert pytester.runpytest_inprocess("--qlab-save=v1", *arguments).ret == 0
    held = ("--qlab-compare=v1", "--qlab-compare-fail=kl.mean:10%,top1_agreement:0.005")
    assert pytester.runpytest_inprocess(*held, *arguments).ret == 0
    assert results_of(pytester)["forwards"] == 0
    pytester.makepyprojecttoml(EMBEDDED.format(bits=3))
    pytester.runpytest_inprocess(*held, *arguments).assert_outcomes(failed=1)
    (row,) = results_of(pytester)["candidates"]
    found = {change["metric"]: change for change in row["changes"]}
    lab = Lab("embedded", evaluation="prose", max_windows=8, store=tmp_path / "store")
    old, new = (lab.candidate(f"rtn:bits={bits}").fidelity.estimates() for bits in (4, 3))
    assert lab.forwards == 0
    for metric in ("kl.mean", "top1_agreement"):
        change = found[metric]
        assert change["outcome"] == "fail"
        assert change["saved"] == pytest.approx(float(old[metric]), rel=1e-5)
        assert change["difference"] == pytest.approx(float(new[metric] - old[metric]), rel=1e-4)
