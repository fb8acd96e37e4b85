"""Saving a baseline in whole runs over a tiny model: what is saved, and when nothing is."""

from __future__ import annotations

import pytest

from pytest_qlab.gate.baselines import Baseline
from tests.plugin.baselines.project import TESTS, Project
from tests.plugin.fakes import results_of


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
