"""The training script: from text files to a model that loads; interrupted and resumed alike."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
TRAINING = Path(__file__).parents[2] / "training"
TEXT = Path(__file__).parents[2] / "pytest_qlab" / "embedded" / "text"
MANIFEST = """
[[source]]
name = "prose"
domain = "prose"
reader = "lines"
paths = ["prose.txt"]
weight = 0.4
held_out = 0.5

[[source]]
name = "chat"
domain = "chat"
reader = "lines"
paths = ["chat.txt"]
weight = 0.2
held_out = 0.5

[[source]]
name = "code"
domain = "code"
reader = "python"
root = "python"
paths = ["asyncio"]
weight = 0.4
held_out = 0.2
"""
FEW = (
    "--no-compile",
    "--threads=1",
    "--layers=1",
    "--seq-len=64",
    "--batch-tokens=256",
    "--micro-tokens=256",
    "--eval-steps=2",
    "--eval-tokens=4096",
    "--warmup-steps=1",
)


def run(*arguments: str | Path) -> None:
    found = subprocess.run(
        [sys.executable, str(TRAINING / "train_embedded.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("training")
    (directory / "manifest.toml").write_text(MANIFEST, encoding="utf-8")
    for domain in ("prose", "chat"):
        files = sorted(TEXT.glob(f"*/{domain}/*.txt"))
        lines = [file.read_text("utf-8").replace("\n", " ") for file in files]
        (directory / f"{domain}.txt").write_text("\n".join(lines), encoding="utf-8")
    run(
        "prepare",
        f"--manifest={directory / 'manifest.toml'}",
        f"--data-root={directory}",
        f"--python-root={Path(asyncio.__file__).parents[1]}",
        f"--out={directory}",
    )
    return directory / "corpus"


def weights(out: Path, corpus: Path) -> dict[str, torch.Tensor]:
    run("export", f"--out={out}", f"--corpus={corpus}", f"--to={out / 'model'}", "--force")
    return load_file(out / "model" / "model.safetensors")


def test_a_resumed_run_is_the_run_that_was_not_interrupted(corpus: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run("train", f"--out={whole}", f"--corpus={corpus}", *FEW, "--max-steps=4")
    run("train", f"--out={halves}", f"--corpus={corpus}", *FEW, "--max-steps=2")
    run("train", f"--out={halves}", f"--corpus={corpus}", *FEW, "--max-steps=4", "--resume")
    first, second = weights(whole, corpus), weights(halves, corpus)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    other = tmp_path / "other"
    run("train", f"--out={other}", f"--corpus={corpus}", *FEW, "--max-steps=4", "--seed=2")
    assert any(not torch.equal(t, first[name]) for name, t in weights(other, corpus).items())


def test_the_exported_directory_is_a_model(corpus: Path, tmp_path: Path) -> None:
    from pytest_qlab.models.load import load_model

    run("train", f"--out={tmp_path}", f"--corpus={corpus}", *FEW, "--max-steps=2")
    weights(tmp_path, corpus)
    loaded = load_model(str(tmp_path / "model"))
    assert set(loaded.storage_dtypes.values()) == {torch.bfloat16}
    assert loaded.tokenizer("a")["input_ids"][0] == loaded.tokenizer.bos_token_id
    facts = json.loads((tmp_path / "model" / "training_facts.json").read_text(encoding="utf-8"))
    assert facts["steps"] == 2
