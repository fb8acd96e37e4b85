"""Budgets given once in pyproject.toml, and the tests that come with the plugin to enforce them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.fakes import QUALITY, add_to_conftest, notes_of, results_of
from tests.plugin.looking import LOOKING
from tests.plugin.test_overrides import OVERRIDE

GATES = ("--pyargs", "pytest_qlab.gates")
BUDGETS = """
[tool.qlab]
select = ["alpha", "alpha:bits=2", "beta"]

[tool.qlab.budgets]
"alpha*" = { "kl.mean" = 0.02, size = 1000 }
beta = { "top1_agreement" = 0.95 }
"""


@pytest.fixture
def gated(project: pytest.Pytester) -> pytest.Pytester:
    """A project with budgets and without a test."""
    add_to_conftest(project, LOOKING)
    project.makepyprojecttoml(BUDGETS)
    return project


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_subprocess(
        "-p", "no:cacheprovider", "--qlab-json=results.json", *arguments
    )


def outcomes(project: pytest.Pytester) -> dict[str, str]:
    return {
        name.partition("::")[2]: outcome
        for row in results_of(project)["candidates"]
        for name, outcome in row["tests"].items()
    }


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_every_budget_of_every_method_is_one_test(gated: pytest.Pytester, workers: str) -> None:
    result = run(gated, *GATES, workers)
    result.assert_outcomes(passed=3, failed=2)
    assert outcomes(gated) == {
        "test_budget[alpha-w4-kl.mean]": "passed",
        "test_budget[alpha-w4-size]": "passed",
        "test_budget[alpha-w2-kl.mean]": "failed",
        "test_budget[alpha-w2-size]": "passed",
        "test_budget[beta-w4-top1_agreement]": "failed",
    }
    result.stdout.fnmatch_lines(
        ["qlab budgets: alpha-w4 2, alpha-w2 2, beta-w4 1", "*kl.mean of alpha-w2 = 0.04*"]
    )
    rows = {row["id"]: row for row in results_of(gated)["candidates"]}
    held = [(b["metric"], b["op"], b["budget"], b["outcome"]) for b in rows["alpha-w4"]["budgets"]]
    assert sorted(held) == [("kl.mean", "<=", 0.02, "pass"), ("size", "<=", 1000, "pass")]
    (budget,) = rows["beta-w4"]["budgets"]
    assert (budget["op"], budget["outcome"], budget["ok"]) == (">=", "fail", False)


def test_they_can_be_imported_into_a_module_of_ones_own(gated: pytest.Pytester) -> None:
    gated.makepyfile(test_mine="from pytest_qlab.gates import test_budget  # noqa: F401")
    result = run(gated, "--qlab-methods=alpha:bits=2")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*test_mine.py::test_budget[[]alpha-w2-kl.mean]*", "*1 failed, 1 passed*"]
    )


def test_a_run_may_be_narrowed_to_some_methods(gated: pytest.Pytester) -> None:
    run(gated, *GATES, "--qlab-methods=alpha").assert_outcomes(passed=2)
    assert {name.split("[")[1][:8] for name in outcomes(gated)} == {"alpha-w4"}


def test_narrowed_to_methods_without_budgets_there_is_nothing_to_be_green_about(
    gated: pytest.Pytester,
) -> None:
    result = run(gated, *GATES, "--qlab-methods=none")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no method of this run has a budget: it compares none*"])


def test_latency_is_measured_alone(gated: pytest.Pytester) -> None:
    gated.makepyprojecttoml('[tool.qlab.budgets]\nalpha = { "latency.p50" = 0.1, size = 1000 }')
    add_to_conftest(
        gated,
        """
def pytest_collection_finish(session):
    for item in session.items:
        note(f"{item.name} {item.get_closest_marker('qlab_exclusive') is not None}")
""",
    )
    run(gated, *GATES, "--qlab-methods=alpha").assert_outcomes(passed=2)
    noted = notes_of(gated)
    assert "test_budget[alpha-w4-latency.p50] True" in noted
    assert "test_budget[alpha-w4-size] False" in noted


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_without_budgets_gates_are_an_error(project: pytest.Pytester, workers: str) -> None:
    result = run(project, *GATES, "--qlab-methods=alpha", workers)
    assert result.ret != pytest.ExitCode.OK
    text = f"{result.stdout.str()}{result.stderr.str()}"
    assert "there are no budgets to hold methods to" in text
    assert "[tool.qlab.budgets]" in text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('aplha = { "kl.mean" = 0.02 }', "*'aplha' matches no method of this run*'alpha'*"),
        ('alpha = { "kl.maen" = 0.02 }', "*pyproject.toml: *Did you mean 'kl.mean'*"),
        ('alpha = { "kl.mean" = nan }', "*the budget has to be a finite number*"),
        ('alpha = { "kl.max" = 1 }', "*no interval*Use kl.p99.within*"),
        ("alpha = {}", "*'alpha' has no budgets*"),
        ('"kl.mean" = 0.02', '*write "[*]" = { "kl.mean" = 0.02 }*'),
    ],
)
def test_a_mistake_in_the_table_ends_any_run(
    gated: pytest.Pytester, table: str, message: str
) -> None:
    gated.makepyprojecttoml(f'[tool.qlab]\nselect = ["alpha"]\n[tool.qlab.budgets]\n{table}')
    gated.makepyfile("def test_nothing(): pass")
    result = run(gated)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_a_pattern_for_a_method_that_another_shard_runs_is_no_mistake(
    gated: pytest.Pytester,
) -> None:
    run(gated, *GATES, "--qlab-methods=beta").assert_outcomes(failed=1)
    gated.makepyprojecttoml("[tool.qlab.budgets]\naplha = { size = 1 }\nbeta = { size = 1000 }")
    result = run(gated, *GATES, "--qlab-methods=beta")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*'aplha' matches no method*"])


def test_budgets_alone_are_no_tests(gated: pytest.Pytester) -> None:
    gated.makepyfile(QUALITY)
    run(gated, "--qlab-methods=alpha").assert_outcomes(passed=1)


def test_an_override_in_the_root_conftest_holds_for_them(gated: pytest.Pytester) -> None:
    add_to_conftest(gated, OVERRIDE)
    run(gated, *GATES, "--qlab-methods=alpha").assert_outcomes(passed=2)
    assert "alpha-w4 size ['model']" in notes_of(gated)


def below(gated: pytest.Pytester, text: str) -> Path:
    directory = gated.mkdir("tests")
    (directory / "conftest.py").write_text(text, encoding="utf-8")
    return directory


def test_an_override_that_they_would_not_see_is_refused(gated: pytest.Pytester) -> None:
    below(gated, OVERRIDE)
    result = run(gated, *GATES, "--qlab-methods=alpha")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*tests/conftest.py overrides 'base_model'*from pytest_qlab.gates import test_budget*"]
    )
    assert "alpha-w4 size []" not in notes_of(gated)


def test_beside_the_override_they_see_it(gated: pytest.Pytester) -> None:
    directory = below(gated, OVERRIDE)
    (directory / "test_gates.py").write_text(
        "from pytest_qlab.gates import test_budget", encoding="utf-8"
    )
    run(gated, "--qlab-methods=alpha").assert_outcomes(passed=2)
    assert "alpha-w4 size ['model']" in notes_of(gated)


def test_a_fixture_that_makes_one_model_cannot_stand_for_all_methods(
    gated: pytest.Pytester,
) -> None:
    add_to_conftest(
        gated,
        """
@pytest.fixture(scope="session")
def quantized(qlab):
    return qlab.baseline
""",
    )
    result = run(gated, *GATES, "--qlab-methods=alpha")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*'quantized' is overridden here by a fixture that takes no*"])


def test_a_fixture_that_passes_the_method_on_may_stand_for_them(gated: pytest.Pytester) -> None:
    add_to_conftest(
        gated,
        """
@pytest.fixture(scope="session")
def quantized(quantized):
    note(f"warmed up {quantized.id}")
    return quantized
""",
    )
    run(gated, *GATES, "--qlab-methods=alpha").assert_outcomes(passed=2)
    assert "warmed up alpha-w4" in notes_of(gated)


def test_the_policy_for_doubt_holds_for_them(gated: pytest.Pytester) -> None:
    gated.makepyprojecttoml(
        '[tool.qlab]\ninconclusive = "xfail"\n[tool.qlab.budgets]\nbeta = { "kl.mean" = 0.02 }'
    )
    run(gated, *GATES, "--qlab-methods=beta").assert_outcomes(xfailed=1)
    run(gated, *GATES, "--qlab-methods=beta", "--qlab-inconclusive=fail").assert_outcomes(failed=1)
