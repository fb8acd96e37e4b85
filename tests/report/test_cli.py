"""The console script: what it writes, prints and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qlab.cli import main
from pytest_qlab.errors import SpecError
from pytest_qlab.methods import registry
from pytest_qlab.methods.base import Method
from pytest_qlab.report.methods import describe_methods
from pytest_qlab.results import Results


@pytest.fixture
def shards(document: Results, tmp_path: Path) -> list[Path]:
    """The document's candidates, spread over two files; the second broke a budget."""
    paths = []
    for place in range(2):
        shard = document.model_copy(deep=True)
        shard.candidates = shard.candidates[place::2]
        keys = {key for row in shard.candidates for key in row.keys.values()}
        shard.built = {key: count for key, count in shard.built.items() if key in keys}
        shard.summary = {"passed": 3 + place}
        shard.exit_status = 0
        paths.append(tmp_path / f"shard-{place}.json")
        shard.write(paths[-1])
    return paths


def test_merge_joins_shards(
    document: Results, shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("json", "html", "markdown", "csv")
    out = {name: tmp_path / "deep" / f"out.{name}" for name in names}
    options = [f"--{name}={path}" for name, path in out.items()]
    assert main(["merge", *map(str, shards), *options]) == 0
    merged = Results.read(out["json"])
    assert {row.id for row in merged.candidates} == {row.id for row in document.candidates}
    assert merged.built == document.built
    assert merged.reused == 2 * document.reused
    assert merged.summary == {"passed": 7}
    printed = capsys.readouterr().out
    for row in document.candidates:
        assert row.id in printed
        for name in names:
            assert row.id.replace("-", "\\-" if name == "markdown" else "-") in out[name].read_text(
                encoding="utf-8"
            )


def test_merge_fails_on_failure_only_when_asked(shards: list[Path], tmp_path: Path) -> None:
    files = [str(path) for path in shards]
    assert main(["merge", *files]) == 0
    assert main(["merge", *files, "--fail-on-failure"]) == 1
    good = Results.read(shards[0])
    good.candidates = [row for row in good.candidates if row.id in ("none", "gptq-w4g128")]
    path = tmp_path / "good.json"
    good.write(path)
    assert main(["merge", str(path), "--fail-on-failure"]) == 0
    for change in ({"exit_status": 3}, {"summary": {"failed": 1}}):
        good.model_copy(update=change).write(path)
        assert main(["merge", str(path), "--fail-on-failure"]) == 1


def test_merge_refuses_other_models(
    document: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    document.write(one)
    document.model_copy(update={"model": {"id": "other", "name": "other"}}).write(two)
    assert main(["merge", str(one), str(two)]) == 2
    assert "different models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "not a results document"),
        (b"{]", "not a results document"),
        (b"[]", "not a results document"),
        (b'{"schema_version": 99}', "not a results document"),
        (b"\xff\xfe\x00", "not a results document"),
    ],
)
@pytest.mark.parametrize("command", [["show"], ["merge"], ["export", "--format=csv"]])
def test_bad_files_are_explained_in_one_paragraph(
    content: bytes | None,
    message: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    assert main([*command, str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qlab: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_explained(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--html", "--json"):
        target = tmp_path / "file" / "out"
        assert main(["merge", str(shards[0]), option, str(target)]) == 2
        assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["export", "x.json"], ["merge"]])
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_show_keeps_to_the_width(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(shards[0]), "--width=72"]) == 0
    printed = capsys.readouterr().out
    assert "gptq-w4g128" in printed
    assert max(map(len, printed.splitlines())) <= 72


@pytest.mark.parametrize("form", ["csv", "markdown", "html", "pytest-benchmark"])
def test_export_writes_the_same_to_a_file_and_to_the_screen(
    form: str, shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", f"--format={form}", str(shards[0])]) == 0
    assert main(["export", f"--format={form}", "-o", str(out), str(shards[0])]) == 0
    text = out.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "gptq" in text


def test_export_help_says_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "not_measured" in capsys.readouterr().out


def test_pytest_benchmark_reads_the_export(shards: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "0001_qlab.json"
    assert main(["export", "--format=pytest-benchmark", "-o", str(out), str(shards[0])]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(out), "--columns=median,rounds"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "latency[gptq-w4g128]" in done.stdout


class Toy(Method):
    """A method with an option of every kind."""

    name = "toy"
    summary = "does nothing, slowly"
    needs = frozenset({"gram"})
    bits: int = 4
    symmetric: bool = False
    limit: float | None = None


def test_methods_are_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_BUILTIN", {"gone": "nowhere.at_all:Gone"})
    monkeypatch.setattr(registry, "_registered", {"toy": Toy})
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert printed == describe_methods()
    assert "does nothing, slowly" in printed
    assert "needs from calibration: gram" in printed
    for line in ("bits int default 4", "symmetric true|false default false"):
        assert line in " ".join(printed.split())
    assert "limit float|none default None" in " ".join(printed.split())
    assert "not available: The method 'gone' cannot be imported" in " ".join(printed.split())
    with pytest.raises(SpecError):
        registry.find_method("gone")


def test_named_configurations_are_listed() -> None:
    text = describe_methods({"small": {"method": "gptq", "bits": 3, "symmetric": True}})
    assert "[tool.qlab.methods.small]: method=gptq, bits=3, symmetric=true" in text


def test_nothing_heavy_is_imported(shards: list[Path]) -> None:
    code = (
        "import sys, json; from pytest_qlab.cli import main; "
        f"path = {str(shards[0])!r}; main(['show', path]); main(['export', '--format=html', path]);"
        "heavy = {'torch', 'transformers', 'numpy', 'pytest'} & set(sys.modules); "
        "print(json.dumps(sorted(heavy)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) == []
