"""Whole pytest runs over a tiny saved model: one process, two workers, killed ones, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qlab.data.windows import looks_of
from pytest_qlab.store import MANIFEST
from tests.lab.tiny import documents, saved_tiny_model

TEST = """
def test_quality(quantized):
    assert quantized.perplexity_ratio < 2
    assert quantized.layer_error < 1

def test_size(quantized):
    assert quantized.compression_ratio > 0.9
"""
METHODS = "none,rtn,gptq:bits=3,awq:bits=3,static"


class Project:
    """A user's repository with a model, texts and one test module."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        saved_tiny_model(directory / "model")
        for name, seed in (("evaluation", 1), ("calibration", 2)):
            (directory / name).mkdir()
            for number, document in enumerate(documents(6, seed)):
                (directory / name / f"{number}.txt").write_text(document.text, encoding="utf-8")
        (directory / "test_model.py").write_text(TEST, encoding="utf-8")
        (directory / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")

    def command(self, *arguments: str, store: Path | None = None) -> list[str]:
        return [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--qlab-model=model",
            "--qlab-eval=evaluation",
            "--qlab-calibration=calibration",
            "--qlab-window-length=48",
            "--qlab-calibration-length=32",
            f"--qlab-store={store or self.store}",
            *arguments,
        ]

    def environment(self) -> dict[str, str]:
        left_out = ("PYTEST_XDIST", "PYTEST_CURRENT", "PYTEST_ADDOPTS", "QLAB_STORE", "GITHUB_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str, store: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, store=store),
            cwd=self.directory,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def results(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / name).read_text(encoding="utf-8"))
        return found

    def entries(self, kind: str) -> list[Path]:
        return [path.parent for path in self.store.glob(f"v1/{kind}/*/{MANIFEST}")]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def quality(results: dict[str, Any]) -> dict[str, Any]:
    return {row["id"]: (row["measures"], row["layers"]) for row in results["candidates"]}


@pytest.mark.slow
def test_two_workers_build_once_and_give_the_same_bits(project: Project) -> None:
    one = project.run(f"--qlab-methods={METHODS}", "-n0", "--qlab-json=one.json")
    assert one.returncode == 0, one.stdout + one.stderr
    other = project.directory / "other-store"
    two = project.run(f"--qlab-methods={METHODS}", "-n2", "--qlab-json=two.json", store=other)
    assert two.returncode == 0, two.stdout + two.stderr
    first, second = project.results("one.json"), project.results("two.json")
    assert len(first["candidates"]) == 5
    assert quality(first) == quality(second)
    assert set(second["built"].values()) == {1}
    kinds = [key.split("/")[0] for key in second["built"]]
    assert kinds.count("quantized") == 5
    looks = len(looks_of(first["evaluation"]["windows"]))  # Each is an entry of its own.
    assert looks == 2
    assert kinds.count("reference") == looks
    assert kinds.count("fidelity") == 5 * looks
    assert kinds.count("noise_floor") == 1
    assert sorted(first["built"]) == sorted(second["built"])
    assert first["forwards"] == second["forwards"] > 0

    again = project.run(f"--qlab-methods={METHODS}", "-n2", "--qlab-json=again.json", store=other)
    assert again.returncode == 0
    third = project.results("again.json")
    assert third["built"] == {}
    assert third["forwards"] == 0
    assert quality(third) == quality(second)


def test_a_streamed_run_has_the_table_of_one_in_memory(project: Project) -> None:
    found, tables = {}, []
    for stream in ("never", "always"):
        done = project.run(
            "--qlab-methods=none,rtn,gptq:bits=3",
            f"--qlab-stream={stream}",
            f"--qlab-json={stream}.json",
            "-n0",
            store=project.directory / stream,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found[stream] = project.results(f"{stream}.json")
        lines = done.stdout.splitlines()
        table = [line.split() for line in lines if line.startswith(("candidate ", "rtn-", "gptq-"))]
        assert len(table) == 3, done.stdout
        assert "KL" in table[0], done.stdout
        tables.append(table)
    assert tables[0] == tables[1]
    assert quality(found["always"]) == quality(found["never"])
    for part in ("model", "evaluation", "forwards"):
        assert found["always"][part] == found["never"][part]


SLOW_METHOD = """
import os, pathlib, time
from pytest_qlab import Method, QuantizedLayer, register_method
from pytest_qlab.formats.plain import PlainWeight

@register_method
class Slow(Method):
    name = "slow"
    summary = "waits, so that it can be killed"
    cost = 100.0

    def quantize(self, weight, statistics, *, name=""):
        marker = pathlib.Path(__file__).with_name("pid")
        if not marker.exists():
            marker.write_text(str(os.getpid()))
            time.sleep(120)
        return QuantizedLayer(PlainWeight(weight))
"""


@pytest.mark.slow
def test_a_killed_worker_loses_only_its_build_and_is_never_green(project: Project) -> None:
    (project.directory / "conftest.py").write_text(SLOW_METHOD, encoding="utf-8")
    arguments = ("--qlab-methods=slow,rtn,static", "-n2", "--qlab-json=killed.json")
    with subprocess.Popen(
        project.command(*arguments),
        cwd=project.directory,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        marker, deadline = project.directory / "pid", time.monotonic() + 120
        while not (marker.exists() and marker.read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, "the slow method was never reached"
            assert running.poll() is None, "the run ended before"
            time.sleep(0.1)
        os.kill(int(marker.read_text(encoding="utf-8")), signal.SIGKILL)
        output, _ = running.communicate(timeout=200)
    assert running.returncode != 0, output
    results = project.results("killed.json")
    rows = {row["id"]: row for row in results["candidates"]}
    for name in ("rtn-w4g128", "static-w8a8"):
        assert set(rows[name]["tests"].values()) == {"passed"}, output
        assert rows[name]["measures"]["perplexity"]["value"] > 0
    assert "crashed" in output

    after = project.run(*arguments[:1], "-n0", "--qlab-json=after.json")
    assert after.returncode == 0, after.stdout + after.stderr
    rebuilt = [key for key in project.results("after.json")["built"] if "quantized" in key]
    assert len(rebuilt) <= 1
    partial = [path for path in project.store.rglob(".*") if path.is_dir()]
    assert partial == []


def expect_failure(
    found: subprocess.CompletedProcess[str], message: str, status: tuple[int, ...]
) -> None:
    text = " ".join((found.stdout + found.stderr).split())
    assert found.returncode in status, text
    assert message in text, text
    assert "Traceback" not in text, text
    assert "INTERNALERROR" not in text, text


def test_unknown_method_and_option(project: Project) -> None:
    expect_failure(project.run("--qlab-methods=gptg"), "Did you mean 'gptq'", (4,))
    expect_failure(project.run("--qlab-methods=gptq:bit=3"), "Did you mean 'bits'", (4,))
    expect_failure(project.run("--qlab-methods=gptq:bits=5"), "2, 3, 4 or 8", (4,))


def test_empty_text(project: Project) -> None:
    (project.directory / "empty.txt").write_text("", encoding="utf-8")
    found = project.run("--qlab-methods=rtn", "--qlab-eval=empty.txt", "-k", "quality")
    expect_failure(found, "empty.txt", (1,))


def test_a_model_directory_without_configuration(project: Project) -> None:
    (project.directory / "model" / "config.json").unlink()
    expect_failure(project.run("--qlab-methods=rtn", "-k", "size"), "config.json", (1,))


def test_nan_weights_in_the_model(project: Project) -> None:
    file = project.directory / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    found = project.run("--qlab-methods=rtn", "-k", "size")
    expect_failure(found, "NaN", (1,))
    assert project.entries("quantized") == []


def test_a_damaged_artefact(project: Project) -> None:
    assert project.run("--qlab-methods=rtn", "-k", "size").returncode == 0
    (entry,) = project.entries("quantized")
    file = entry / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0xFF
    file.write_bytes(bytes(data))
    found = project.run("--qlab-methods=rtn", "-k", "size")
    expect_failure(found, "is damaged", (1,))
    assert "Delete that directory" in " ".join((found.stdout + found.stderr).split())


def test_no_space_left(project: Project) -> None:
    (project.directory / "conftest.py").write_text(
        "import errno\n"
        "import pytest_qlab.checkpoint as checkpoint\n"
        "def write_tensors(path, tensors):\n"
        "    path.write_bytes(b'half')\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "checkpoint.write_tensors = write_tensors\n",
        encoding="utf-8",
    )
    found = project.run("--qlab-methods=rtn", "-k", "size")
    expect_failure(found, "No space is left", (1,))
    assert project.entries("quantized") == []
    assert not list(project.store.rglob("model.safetensors"))
