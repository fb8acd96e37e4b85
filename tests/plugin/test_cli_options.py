from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.fakes import QUALITY, notes_of

PRINT_SETTINGS = """
import pytest
from pytest_qlab.running.run import run_of

def test_settings(pytestconfig):
    settings = run_of(pytestconfig).settings
    with open("settings.txt", "w") as stream:
        for name, value in vars(settings).items():
            print(name, value, sep="=", file=stream)
"""


def settings_of(pytester: pytest.Pytester, *arguments: str) -> dict[str, str]:
    pytester.makepyfile(PRINT_SETTINGS)
    pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments).assert_outcomes(passed=1)
    lines = (pytester.path / "settings.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_defaults(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLAB_STORE", str(pytester.path / "kept"))
    found = settings_of(pytester)
    assert found["model"] == "embedded"
    assert found["evaluation"] == "('embedded',)"
    assert found["dtype"] == "float32"
    assert found["store"] == str(pytester.path / "kept")
    assert int(found["threads"]) >= 1
    assert found["json"] == "None"


def test_the_command_line_wins_over_ini_and_that_over_the_table(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml(
        """
        [tool.pytest.ini_options]
        qlab_seed = "2"
        qlab_window_length = "64"
        qlab_eval = ["prose", "code"]
        qlab_require_all = true
        [tool.qlab]
        seed = 3
        window_length = 32
        max_windows = 7
        select = ["rtn"]
        trust_remote_code = true
        """
    )
    found = settings_of(pytester, "--qlab-seed=1", "--qlab-store=here")
    assert found["seed"] == "1"
    assert found["window_length"] == "64"
    assert found["max_windows"] == "7"
    assert found["evaluation"] == "('prose', 'code')"
    assert found["methods"] == "('rtn',)"
    assert found["trust_remote_code"] == "True"
    assert found["require_all"] == "True"
    assert found["store"] == str(pytester.path / "here")


def test_how_careful_a_run_is_can_be_said_anywhere(pytester: pytest.Pytester) -> None:
    careful = ("sampling", "inconclusive", "confidence")
    found = settings_of(pytester)
    assert [found[name] for name in careful] == ["spread", "fail", "0.95"]
    assert found["budgets"] == "()"
    pytester.makepyprojecttoml(
        """
        [tool.pytest.ini_options]
        qlab_confidence = "0.9"
        [tool.qlab]
        sampling = "contiguous"
        inconclusive = "xfail"
        confidence = 0.8
        [tool.qlab.budgets]
        "*" = { "kl.mean" = 0.02 }
        """
    )
    found = settings_of(pytester)
    assert [found[name] for name in careful] == ["contiguous", "xfail", "0.9"]
    assert "pattern='*', metric='kl.mean', value=0.02" in found["budgets"]
    given = ("--qlab-sampling=spread", "--qlab-inconclusive=warn", "--qlab-confidence=0.5")
    found = settings_of(pytester, *given)
    assert [found[name] for name in careful] == ["spread", "warn", "0.5"]


def test_a_list_may_be_given_in_pieces(pytester: pytest.Pytester) -> None:
    found = settings_of(pytester, "--qlab-methods=rtn,none", "--qlab-methods", "rtn:bits=3")
    assert found["methods"] == "('rtn', 'none', 'rtn:bits=3')"


def test_a_path_is_kept_when_a_test_changes_directory(pytester: pytest.Pytester) -> None:
    (pytester.path / "prose").mkdir()
    text = pytester.path / "texts" / "a.txt"
    text.parent.mkdir()
    text.write_text("words", encoding="utf-8")
    found = settings_of(pytester, "--qlab-eval=texts/a.txt,prose", "--qlab-model=who/what")
    assert found["evaluation"] == repr((str(text), "prose"))
    assert found["model"] == "who/what"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--qlab-methods=gtpq", "*Unknown method 'gtpq'. Did you mean 'gptq'?*"),
        ("--qlab-methods=rtn:bist=3", "*no option 'bist'. Did you mean 'bits'?*"),
        ("--qlab-methods=rtn:bits=5", "*rtn*bits*5*"),
        ("--qlab-methods=none,!none", "*No method is left to run*"),
        ("--qlab-methods=,", "*--qlab-methods: the list is empty*"),
        ("--qlab-modle=x", "*unknown option --qlab-modle. Did you mean '--qlab-model'*"),
        ("--qlab-dtype=float31", "*--qlab-dtype*Did you mean 'float32'*"),
        ("--qlab-max-windows=many", "*--qlab-max-windows: expected a whole number, got 'many'*"),
        ("--qlab-window-length=1", "*--qlab-window-length: expected at least 2, got 1*"),
        ("--qlab-sampling=random", "*--qlab-sampling: 'random' is not one*spread*"),
        ("--qlab-inconclusive=pass", "*--qlab-inconclusive: 'pass' is not one*xfail*"),
        ("--qlab-confidence=95", "*--qlab-confidence: expected a number from 0.5 to below 1*'95'*"),
        ("--qlab-confidence=1", "*--qlab-confidence: expected a number from 0.5 to below 1*"),
        ("--qlab-confidence=0.05", "*--qlab-confidence: expected a number from 0.5 to below 1*"),
        ("--qlab-confidence=nan", "*--qlab-confidence: expected a number from 0.5 to below 1*"),
        ("--qlab-confidence=high", "*--qlab-confidence: expected a number from 0.5*'high'*"),
    ],
)
def test_a_mistake_on_the_command_line_is_a_usage_error(
    pytester: pytest.Pytester, argument: str, message: str
) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess(argument)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    assert len([line for line in result.stderr.lines if line.strip()]) == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[tool.qlab]\nmodle = 'x'", "*unknown key 'modle'*Did you mean 'model'*"),
        ("[tool.qlab]\nmethods = ['rtn']", "*tables of named configurations*select = *"),
        ("[tool.qlab]\nselect = ['gtpq']", "*Unknown method 'gtpq'*"),
        ("[tool.qlab]\nseed = 'one'", "*[[]tool.qlab] seed: expected a whole number, got 'one'*"),
        ("[tool.qlab]\nrequire_all = 'yes'", "*expected true or false*"),
        ("[tool.qlab]\nmodel = 3", "*expected text, got 3*"),
        ("[tool.qlab]\nconfidence = true", "*[[]tool.qlab] confidence: expected a number*True*"),
        ("[tool.qlab]\nbudgets = 0.02", "*[[]tool.qlab.budgets] must be a table such as*"),
        ('[tool.qlab.budgets]\nrtn = { "kl.maen" = 1 }', "*Did you mean 'kl.mean'*"),
        ("[tool.qlab.budgets]\nrnt = { size = 1 }", "*'rnt' matches no method of this run*'rtn'*"),
        ("[tool.qlab.budgets]\nrtn = { size = 1 }", None),
        ("[tool.qlab.methods.mine]\nbits = 3", None),
        ("[tool.pytest.ini_options]\nqlab_seed = 'x'", "*qlab_seed: expected a whole number*"),
    ],
)
def test_a_mistake_in_a_file_is_a_usage_error(
    pytester: pytest.Pytester, table: str, message: str | None
) -> None:
    pytester.makepyprojecttoml(table)
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess()
    if message is None:
        result.assert_outcomes(passed=1)
        return
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_a_mistake_is_found_before_any_worker_starts(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY)
    result = project.runpytest_subprocess("-n2", "--qlab-methods=alpah")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*Unknown method 'alpah'. Did you mean 'alpha'?*"])
    assert notes_of(project) == []


def test_methods_are_listed_with_options_and_defaults(project: pytest.Pytester) -> None:
    project.makepyprojecttoml('[tool.qlab.methods.tiny]\nmethod = "gptq"\nbits = 2')
    result = project.runpytest_subprocess("--qlab-list-methods", "-n2")
    assert result.ret == 0
    result.stdout.fnmatch_lines_random(
        ["alpha", "*a toy*", "*bits*2|4*default 4*", "tiny", "*method=gptq, bits=2*"]
    )
    result.stdout.no_fnmatch_line("*test session starts*")


def test_strict_mode_knows_our_markers_and_options(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\naddopts = --strict-markers --strict-config\nqlab_seed = 4")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.qlab(methods=["rtn"])
        @pytest.mark.qlab_exclusive
        def test_marked(): pass
        """
    )
    pytester.runpytest_inprocess("-m", "qlab and qlab_exclusive").assert_outcomes(passed=1)


def test_the_header_is_silent_unless_qlab_is_meant(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    pytester.runpytest_inprocess().stdout.no_fnmatch_line("qlab: *")
    pytester.runpytest_inprocess("-v").stdout.fnmatch_lines(["qlab: model=embedded*"])
    pytester.runpytest_inprocess("--qlab-methods=rtn").stdout.fnmatch_lines(["*methods=rtn*"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 4),
        (["--qlab-methods=rtn"], 1),
        (["--qlab-methods=rtn,none,gptq"], 3),
        (["--qlab-methods=all", "--qlab-threads=999"], 1),
    ],
)
def test_auto_starts_no_more_workers_than_methods(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: int,
) -> None:
    config = pytester.parseconfig(*arguments)
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "4")
    assert config.hook.pytest_xdist_auto_num_workers(config=config) == 4
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS")

    class Conftest:
        @staticmethod
        def pytest_xdist_auto_num_workers() -> int:
            return 4

    config.pluginmanager.register(Conftest())
    assert config.hook.pytest_xdist_auto_num_workers(config=config) == expected


def test_the_store_is_named_by_the_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pytest_qlab.store import default_store

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "pytest-qlab"


@pytest.mark.parametrize("option", ["eval", "calibration"])
def test_a_mistyped_text_is_one_error_before_anything_runs(
    project: pytest.Pytester, option: str
) -> None:
    project.makepyfile("def test_q(quantized):\n    pass\n")
    arguments = (f"--qlab-{option}=wikitext", "--qlab-methods=alpha,beta", "-p", "no:cacheprovider")
    result = project.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = "\n".join([*result.outlines, *result.errlines])
    assert text.count("Did you mean 'wikitext2'") == 1
    assert f"--qlab-{option}:" in text
