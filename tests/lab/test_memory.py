"""Memory of candidates: of a token after others, and of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

import pytest
import torch

from pytest_qlab.checkpoint import Checkpoint, load_alone
from pytest_qlab.errors import MetricError, ModelError, QlabError
from pytest_qlab.lab import Lab
from pytest_qlab.machine import peak_resident_bytes
from pytest_qlab.measuring.generating import generate
from tests.architectures import ARCHITECTURES
from tests.lab.tiny import tiny_lab


def test_decoding_holds_the_cache_and_little_else(tmp_path: Path) -> None:
    """The cache of all tokens but one; a step adds that one, and temporaries of a single row."""
    lab = tiny_lab(tmp_path)
    memory = lab.baseline.memory
    tokens = max(len(window.ids) for window in lab.eval_data.windows)
    cache = memory.kv_per_token * tokens
    assert memory.decode_peak.convention == f"float32, decode after {tokens - 1} tokens"
    assert memory.resident + cache < memory.decode_peak < memory.peak
    # One layer's keys and values in two lengths, its mask, and rows of at most the vocabulary.
    layers = lab.base_model.config.num_hidden_layers
    width = max(lab.base_model.config.intermediate_size, lab.base_model.config.vocab_size)
    assert memory.decode_peak - memory.resident - cache < cache / layers + 4 * 20 * width
    assert memory.named("memory.decode_peak") == memory.decode_peak
    assert not memory.decode_peak.simulated
    assert lab.candidate("rtn").memory.decode_peak.simulated
    with pytest.raises(QlabError, match=r"no measure 'memory\.peek'.*'memory\.peak'"):
        lab.baseline["memory.peek"]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_packed_model_loads_without_its_base_model(
    tmp_path: Path, architecture: str, method: str
) -> None:
    lab = tiny_lab(tmp_path, architecture)
    candidate = lab.candidate(method)
    config = lab.base_model.config
    alone = load_alone(candidate.checkpoint, config, torch.float32)
    ids = torch.tensor([list(lab.eval_data.windows[0].ids)])
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits, candidate.model(input_ids=ids).logits)
    assert isinstance(torch.nn.Linear(2, 3).weight.data, torch.Tensor)
    assert not torch.nn.Linear(2, 3).weight.is_meta, "modules register parameters as before"


def test_a_checkpoint_that_lacks_a_parameter_is_an_error(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    checkpoint = lab.candidate("rtn").checkpoint

    class Lacking(Checkpoint):
        def others(self, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
            return {k: v for k, v in super().others(names).items() if k != "model.norm.weight"}

    with pytest.raises(ModelError, match=r"no model\.norm\.weight"):
        load_alone(
            Lacking(checkpoint.directory, checkpoint.index), lab.base_model.config, torch.float32
        )


def test_generation_is_greedy(tmp_path: Path) -> None:
    """As by whole forwards without a cache."""
    model = tiny_lab(tmp_path).candidate("rtn").model
    ids, expected = list(range(3, 20)), list[int]()
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *expected]])).logits
        expected.append(int(logits[0, -1].argmax()))
    assert generate(model, ids, 4) == expected


@pytest.mark.slow
def test_a_process_of_its_own_loads_the_model_and_generates(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    found = lab.candidate("rtn").memory.rss_peak
    assert found.unit == "bytes"
    assert found.convention == "float32, prompt of 56, 8 generated"
    idle = int(found.detail.split()[0].replace(",", ""))
    assert 50e6 < idle < found < 4e9
    assert "memory.rss_peak" in lab.candidate("rtn").measured
    again = tiny_lab(tmp_path)
    assert again.candidate("rtn")["memory.rss_peak"] == found
    assert "process_memory" not in again.store.built


def test_it_is_not_measured_unless_asked_for(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    _ = lab.candidate("rtn").memory
    assert "memory.rss_peak" not in lab.candidate("rtn").measured
    assert lab.candidate("rtn").measured.keys() >= {"memory.peak", "memory.decode_peak"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((1, "", "Traceback\nOSError: no config"), "ended with status 1: OSError: no config"),
        ((-9, "", ""), "ended with status -9: nothing was printed"),
        ((0, json.dumps({"peak": 0, "idle": 0}), ""), "this system does not say"),
    ],
)
def test_a_process_that_fails_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[int, str, str],
    words: str,
) -> None:
    def answering(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], *answer)

    monkeypatch.setattr(subprocess, "run", answering)
    candidate = lab_without_child(tmp_path).candidate("rtn")
    with pytest.raises(MetricError, match=words):
        candidate.memory.rss_peak  # noqa: B018


def lab_without_child(store: Path) -> Lab:
    lab = tiny_lab(store)
    _ = lab.candidate("rtn").checkpoint
    return lab


def test_a_process_knows_its_own_peak_and_not_its_parents() -> None:
    """This process holds 300 MB more than a bare child, which must not count them."""
    held = bytearray(300 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import types, importlib.util as u;"
        "s = u.spec_from_file_location('machine', sys.argv[2]); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); print(m.peak_resident_bytes())"
    )
    import pytest_qlab.machine

    path = str(pytest_qlab.machine.__file__)
    done = subprocess.run(
        [sys.executable, "-c", program, "", path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < len(held) < peak_resident_bytes()
    assert done.stdout.strip() != "0"
