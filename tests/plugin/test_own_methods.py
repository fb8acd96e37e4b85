"""Methods of one's own: by decorator, by hook and by entry point; mistakes in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.fakes import add_to_conftest

METHOD = """
from pytest_qlab.methods.base import Method

class Mine(Method):
    name = "mine"
    summary = "does nothing yet"
"""
DECORATED = METHOD.replace("class", "@register_method\nclass").replace(
    "import Method", "import Method\nfrom pytest_qlab.methods.registry import register_method"
)
PREPROCESSING = """
from pytest_qlab.methods.preprocessing import Preprocessing

class First(Preprocessing):
    name = "first"
    summary = "changes nothing"

    def transform_block(self, block): pass
"""
HOOKED = f"{METHOD}\ndef pytest_qlab_methods(config):\n    return [Mine]\n"


@pytest.mark.parametrize("conftest", [DECORATED, HOOKED], ids=["decorator", "hook"])
@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_a_conftest_brings_a_method(pytester: pytest.Pytester, conftest: str, workers: str) -> None:
    pytester.makeconftest(conftest)
    pytester.makepyfile("def test_mine(quantized): pass")
    listed = pytester.runpytest_subprocess("--qlab-list-methods")
    listed.stdout.fnmatch_lines(["mine", "  does nothing yet"])
    found = pytester.runpytest_subprocess("--qlab-methods=mine", workers, "--co", "-q")
    found.stdout.fnmatch_lines(["*test_mine?mine?"])


def test_a_hook_may_return_one_class(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(HOOKED.replace("[Mine]", "Mine"))
    pytester.makepyfile("def test_mine(quantized): pass")
    found = pytester.runpytest_subprocess("--qlab-methods=mine", "--co", "-q")
    found.stdout.fnmatch_lines(["*test_mine?mine?"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[Mine, 'mine']", "*pytest_qlab_methods returned 'mine'; expected subclasses*"),
        ("[type('Rtn', (Method,), {'name': 'rtn', 'summary': ''})]", "*'rtn': that name is taken*"),
    ],
    ids=["no method", "taken"],
)
def test_what_a_hook_returns_is_checked(
    pytester: pytest.Pytester, returned: str, message: str
) -> None:
    pytester.makeconftest(HOOKED.replace("[Mine]", returned))
    found = pytester.runpytest_subprocess("--co")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines([message])
    assert "Traceback" not in found.stderr.str()


def test_a_hook_may_bring_a_preprocessing(pytester: pytest.Pytester) -> None:
    text = HOOKED.replace("[Mine]", "[Mine, First]") + PREPROCESSING
    pytester.makeconftest(text)
    pytester.makepyfile("def test_mine(quantized): pass")
    found = pytester.runpytest_subprocess("--qlab-methods=first+mine", "--co", "-q")
    found.stdout.fnmatch_lines(["*test_mine?first+mine?"])


def test_a_package_brings_a_method(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_package.py").write_text(METHOD, encoding="utf-8")
    info = tmp_path / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest_qlab.methods]\nmine = my_package:Mine\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    pytester.makepyfile("def test_mine(quantized): pass")
    found = pytester.runpytest_subprocess("--qlab-methods=mine", "-n1", "--co", "-q")
    found.stdout.fnmatch_lines(["*test_mine?mine?"])


def test_workers_know_methods_of_hooks(project: pytest.Pytester) -> None:
    add_to_conftest(project, HOOKED)
    project.makepyfile("def test_mine(quantized): assert quantized.id == 'mine'")
    found = project.runpytest_subprocess("--qlab-methods=mine,alpha", "-n2", "-q")
    found.assert_outcomes(passed=1, failed=1)  # alpha's id is another
