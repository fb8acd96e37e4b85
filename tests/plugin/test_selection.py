from __future__ import annotations

import pytest

from tests.plugin.fakes import QUALITY

SELECTED = """
import pytest

{marker}
def test_q(quantized):
    pass
"""


def collected(result: pytest.RunResult) -> list[str]:
    return [line.split("::")[1] for line in result.outlines if "::" in line]


@pytest.mark.parametrize(
    ("methods", "marker", "expected"),
    [
        ("none,rtn:bits=3,rtn", "", ["test_q[none]", "test_q[rtn-w3g128]", "test_q[rtn-w4g128]"]),
        ("none,rtn:bits=3,rtn", '@pytest.mark.qlab(methods=["none"])', ["test_q[none]"]),
        ("none,rtn:bits=3,rtn", '@pytest.mark.qlab(methods="rtn-w3*")', ["test_q[rtn-w3g128]"]),
        ("none,rtn:bits=3", '@pytest.mark.qlab(methods=["rtn:bits=3"])', ["test_q[rtn-w3g128]"]),
        ("rtn", "@pytest.mark.qlab(exclusive=True)", ["test_q[rtn-w4g128]"]),
        ("rtn", '@pytest.mark.parametrize("quantized", [1, 2])', ["test_q[1]", "test_q[2]"]),
    ],
)
def test_one_test_for_each_method(
    pytester: pytest.Pytester, methods: str, marker: str, expected: list[str]
) -> None:
    pytester.makepyfile(SELECTED.format(marker=marker))
    result = pytester.runpytest_inprocess("--collect-only", "-q", f"--qlab-methods={methods}")
    assert collected(result) == expected


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('methods=["gtpq"]', "*test_q*unknown method 'gtpq'. Did you mean 'gptq'*"),
        ('methods=["rtn:bist=3"]', "*no option 'bist'*"),
        ("methods=[]", "*names no method*"),
        ('method=["rtn"]', "*takes methods=*given method*"),
        ('methods=["gptq"]', "*no test is left*needs one of gptq; this run compares rtn-w4g128*"),
    ],
)
def test_a_marker_that_selects_nothing_is_a_usage_error(
    pytester: pytest.Pytester, marker: str, message: str
) -> None:
    pytester.makepyfile(SELECTED.format(marker=f"@pytest.mark.qlab({marker})"))
    result = pytester.runpytest_inprocess("--qlab-methods=rtn")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_a_wrong_marker_is_no_green_run_under_workers_either(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY + SELECTED.format(marker='@pytest.mark.qlab(methods=["alpah"])'))
    result = project.runpytest_subprocess("-n1", "--qlab-methods=alpha")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*unknown method 'alpah'. Did you mean 'alpha'*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_test_left_without_method_is_skipped_in_plain_sight(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY + SELECTED.format(marker='@pytest.mark.qlab(methods=["beta"])'))
    result = project.runpytest_subprocess("--qlab-methods=alpha", "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*needs one of beta; this run compares alpha-w4*"])
    result.stdout.no_fnmatch_line("none *")  # no row for a method that nobody has asked for
    project.makeini("[pytest]\nqlab_require_all = true")
    result = project.runpytest_subprocess("--qlab-methods=alpha")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*--qlab-require-all: 1 tests of quantized models were skipped*"])


def test_asking_for_the_fixture_by_name_at_run_time_is_explained(project: pytest.Pytester) -> None:
    project.makepyfile("def test_q(request): request.getfixturevalue('quantized')")
    result = project.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*Name it as an argument of the test*"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("def quantized(quantized): return quantized", ["test_q[rtn-w4g128]"]),
        ("def quantized(request): return request.param", ["test_q[rtn-w4g128]"]),
        ("def quantized(): return 'mine'", ["test_q"]),
        ("def quantized(pytestconfig): return 'mine'", ["test_q"]),
    ],
)
def test_an_override_of_quantized_decides_whether_it_takes_methods(
    pytester: pytest.Pytester, override: str, expected: list[str]
) -> None:
    pytester.makeconftest(f"import pytest\n@pytest.fixture(scope='session')\n{override}")
    pytester.makepyfile("def test_q(quantized): pass")
    result = pytester.runpytest_inprocess("--collect-only", "-q", "--qlab-methods=rtn")
    assert collected(result) == expected


def test_an_override_with_parameters_of_its_own_keeps_them(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import pytest\n@pytest.fixture(params=['x', 'y'])\ndef quantized(request): return 1"
    )
    pytester.makepyfile("def test_q(quantized): pass")
    result = pytester.runpytest_inprocess("--collect-only", "-q")
    assert collected(result) == ["test_q[x]", "test_q[y]"]
