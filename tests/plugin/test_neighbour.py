"""The plugin costs nothing, and changes nothing, where it is not used."""

from __future__ import annotations

import json

import pytest

from tests.plugin.fakes import QUALITY, add_to_conftest

HEAVY = """
import sys

def pytest_sessionfinish():
    heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
    assert not heavy, heavy
"""


def test_collecting_a_model_test_imports_no_torch(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(HEAVY)
    pytester.makepyfile(QUALITY)
    result = pytester.runpytest_subprocess("--collect-only", "-q")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*::test_quality[[]none]", "*::test_quality[[]gptq-w4g128]"])


def test_other_tests_do_not_even_import_pydantic(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(HEAVY.replace('"numpy"', '"numpy", "pydantic", "filelock"'))
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*qlab*")


@pytest.mark.usefixtures("autoload")
def test_it_can_be_switched_off(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(QUALITY)
    result = pytester.runpytest_subprocess("-p", "no:qlab")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'quantized' not found*"])


@pytest.mark.usefixtures("autoload")
@pytest.mark.parametrize(
    "without", [["xdist"], ["html"], ["xdist", "html", "cacheprovider", "capture"], ["terminal"]]
)
def test_it_works_without_other_plugins(project: pytest.Pytester, without: list[str]) -> None:
    project.makepyfile(QUALITY)
    arguments = [f"-pno:{name}" for name in without]
    result = project.runpytest_subprocess("--qlab-methods=alpha", *arguments)
    assert result.ret == 0
    if "terminal" not in without:
        result.stdout.fnmatch_lines(["*alpha-w4*"])


def test_fixtures_are_documented(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(QUALITY)
    result = pytester.runpytest_inprocess("--fixtures")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*fixtures defined from pytest_qlab.fixtures*",
            "quantized [[]session scope] *",
            "*--qlab-methods in turn*",
            "*assert quantized.perplexity_delta < 0.1",
            "base_model [[]session scope] *",
            "*--qlab-model*",
        ]
    )
    result.stdout.no_fnmatch_line("_qlab_default*")
    result.stdout.no_fnmatch_line("*not complete*")


@pytest.mark.usefixtures("autoload")
def test_a_neighbours_project_sees_nothing_of_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a(): pass\ndef test_b(): pass")
    result = pytester.runpytest_subprocess("-n2", "-W", "error")
    result.assert_outcomes(passed=2)
    assert not [line for line in result.outlines if "qlab" in line and "plugins:" not in line]


def test_the_last_failure_is_forgotten_before_the_next_model_is_made(
    project: pytest.Pytester,
) -> None:
    project.makepyfile(
        """
        import sys

        def test_first(quantized):
            assert quantized is None

        def test_second(baseline):
            names = ("last_type", "last_value", "last_traceback", "last_exc")
            assert not any(hasattr(sys, name) for name in names)
        """
    )
    add_to_conftest(
        project,
        """
@pytest.fixture(scope="session")
def baseline(qlab):
    import sys
    assert not hasattr(sys, "last_value")
    return qlab.baseline
""",
    )
    result = project.runpytest_subprocess("--qlab-methods=alpha", "-p", "no:xdist")
    result.assert_outcomes(failed=1, passed=1)


BENCHMARKED = """
import pytest

def test_model(benchmark, quantized):
    assert benchmark(quantized.model, [1, 2]) == 2

def test_measure(quantized):
    assert quantized.perplexity_delta < 0.1
"""


@pytest.fixture
def benchmarked(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project that hands a candidate's model to pytest-benchmark; the model counts tokens."""
    pytest.importorskip("pytest_benchmark")
    add_to_conftest(project, "FakeCandidate.model = property(lambda candidate: len)")
    project.makepyfile(BENCHMARKED)
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_qlab.plugin,xdist.plugin,pytest_benchmark.plugin")
    return project


@pytest.mark.parametrize("workers", [[], ["-n0"]])
def test_pytest_benchmark_times_a_candidates_model(
    benchmarked: pytest.Pytester, workers: list[str]
) -> None:
    result = benchmarked.runpytest_subprocess(
        "--qlab-methods=alpha,beta:bits=2",
        "--benchmark-max-time=0.01",
        "--benchmark-min-rounds=2",
        "--benchmark-json=out.json",
        *workers,
    )
    result.assert_outcomes(passed=4)
    timed = json.loads((benchmarked.path / "out.json").read_text(encoding="utf-8"))["benchmarks"]
    assert {each["param"] for each in timed} == {"alpha-w4", "beta-w2"}
    assert min(each["stats"]["rounds"] for each in timed) >= 2


def test_pytest_benchmark_only_calls_the_model_under_xdist(benchmarked: pytest.Pytester) -> None:
    result = benchmarked.runpytest_subprocess("--qlab-methods=alpha", "-n2", "-W", "ignore")
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*OPS*")
