"""`--qlab-candidate=NAME=FILE`: finished models beside methods, or alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.fakes import QUALITY

COLLECT = ("--collect-only", "-q", "-p", "no:cacheprovider")


@pytest.fixture
def file(pytester: pytest.Pytester) -> Path:
    """A file that is there; nothing reads it while tests are collected."""
    pytester.makepyfile(QUALITY)
    path = pytester.path / "models" / "release.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    return path


def collected(pytester: pytest.Pytester, *arguments: str) -> list[str]:
    lines = pytester.runpytest_inprocess(*COLLECT, *arguments).outlines
    return [line.partition("[")[2].rstrip("]") for line in lines if "::" in line]


def test_a_file_alone_and_beside_methods(pytester: pytest.Pytester, file: Path) -> None:
    given = "--qlab-candidate=release=models/release.gguf"
    assert collected(pytester, given) == ["release"]
    assert collected(pytester, given, "--qlab-methods=rtn,none") == [
        "rtn-w4g128",
        "none",
        "release",
    ]
    assert collected(pytester, given, f"--qlab-candidate=old-1.0={file}") == ["release", "old-1.0"]
    assert collected(pytester, given, "--qlab-methods=rtn,!rel*") == ["rtn-w4g128"]


def test_files_say_it_too(pytester: pytest.Pytester, file: Path) -> None:
    pytester.makepyprojecttoml(
        """
        [tool.qlab]
        candidate = ["release=models/release.gguf"]
        select = ["rtn", "table"]
        [tool.qlab.methods.table]
        method = "gguf_file"
        path = "models/release.gguf"
        """
    )
    expected = ["rtn-w4g128", "table", "release"]
    assert collected(pytester) == expected
    below = pytester.mkdir("below")
    assert collected(pytester, f"--rootdir={pytester.path}", "-c", "pyproject.toml") == expected
    assert below.is_dir()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("release", "*expected NAME=path/to/model.gguf*got 'release'*"),
        ("=models/release.gguf", "*expected NAME=path/to/model.gguf*"),
        ("a b=models/release.gguf", "*expected NAME=path/to/model.gguf*"),
        ("release=", "*expected NAME=path/to/model.gguf*"),
        ("release=models/other.gguf", "*there is no file*other.gguf*"),
        ("release=models", "*there is no file*models*"),
        ("gptq=models/release.gguf", "*that name is taken by a method*"),
        ("a=models/release.gguf,a=models/release.gguf", "*that name is taken*"),
    ],
)
def test_mistakes_are_usage_errors(
    pytester: pytest.Pytester, file: Path, given: str, message: str
) -> None:
    result = pytester.runpytest_inprocess(*COLLECT, f"--qlab-candidate={given}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
