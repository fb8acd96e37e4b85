"""Memory of candidates: of what runs, of a token after others, and of a process of its own."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab import testing
from pytest_qlab.candidate import Candidate
from pytest_qlab.checkpoint import Checkpoint
from pytest_qlab.errors import MetricError, ModelError, QlabError
from pytest_qlab.kernels import choose
from pytest_qlab.kernels.packed import PackedModule
from pytest_qlab.kernels.real import KernelLinear, has_operator
from pytest_qlab.lab import Lab
from pytest_qlab.machine import peak_resident_bytes
from pytest_qlab.measuring import runnable
from pytest_qlab.measuring.alone import load_alone, load_as_run
from pytest_qlab.measuring.generating import generate
from pytest_qlab.measuring.runnable import packed_job
from pytest_qlab.metrics.memory import peak_temporary_bytes, resident_bytes
from pytest_qlab.models.structure import all_linears
from tests.architectures import ARCHITECTURES, VOCABULARY
from tests.lab.tiny import tiny_lab

needs_kernels = pytest.mark.skipif(
    not has_operator("aten", "_weight_int4pack_mm_for_cpu")
    or not has_operator("onednn", "qlinear_prepack"),
    reason="this build of torch has no int4 and int8 kernels for CPUs",
)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with instructions for it."""
    monkeypatch.setattr(runnable, "speed_dtype", lambda dtype, device: torch.bfloat16)


def lab_of(store: Path, hidden: int = 64, intermediate: int = 128, layers: int = 2) -> Lab:
    """Of a Llama whose matrices have widths that are whole groups, so that all run on int4."""
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": VOCABULARY}
    return tiny_lab(store, model=testing.tiny_model(num_hidden_layers=layers, **shape))


def crossing_at(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "crossover", lambda module: rows)


def block_matrices(lab: Lab) -> list[tuple[int, int]]:
    return [(site.out_features, site.in_features) for site in all_linears(lab.base_model)]


@needs_kernels
def test_resident_are_the_kernels_bits_and_two_bytes_for_everything_else(tmp_path: Path) -> None:
    """By hand: half a byte a weight and four bytes a row, of which each has one group."""
    lab = lab_of(tmp_path)
    shapes = block_matrices(lab)
    weights, rows = sum(m * n for m, n in shapes), sum(m for m, _ in shapes)
    buffers = sum(each.nbytes for each in lab.base_model.buffers())
    others = sum(each.numel() for each in lab.base_model.parameters()) - weights
    plain, packed = lab.baseline.memory, lab.candidate("rtn").memory
    assert plain.resident == 2 * (weights + others) + buffers
    assert packed.resident == weights / 2 + 4 * rows + 2 * others + buffers
    assert packed.resident - 2 * others - buffers < 0.4 * 2 * weights
    assert plain.resident == resident_bytes(lab.speed_base)
    config = lab.base_model.config
    width = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 2
    assert packed.kv_per_token == plain.kv_per_token == cache
    assert not packed.peak.simulated
    assert packed.resident < packed.decode_peak < packed.peak


@needs_kernels
def test_layers_that_dequantize_make_it_simulated(tmp_path: Path) -> None:
    """Of each of the two blocks, down_proj has 48 inputs: no whole group of 32."""
    memory = tiny_lab(tmp_path).candidate("rtn").memory
    assert memory.peak.simulated
    assert memory.decode_peak.simulated
    assert not memory.resident.simulated
    runs = "bfloat16, int4pack 12, dequantize-matmul 2"
    assert memory.decode_peak.convention.startswith(f"{runs}, decode after 47 tokens")


@needs_kernels
def test_the_peak_is_of_the_crossovers_that_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossing_at(256, monkeypatch)
    whole = lab_of(tmp_path / "whole").candidate("rtn").memory
    crossing_at(4, monkeypatch)
    tiled = lab_of(tmp_path / "tiled").candidate("rtn").memory
    assert whole.peak.convention == "bfloat16, int4pack 14, forward of 48 tokens"
    assert (
        tiled.peak.convention == "bfloat16, int4pack 14, forward of 48 tokens, 14 layers in tiles"
    )
    assert tiled.decode_peak == whole.decode_peak
    # One tile of the widest matrix, in bfloat16, whose inputs and outputs live in both.
    assert tiled.peak > whole.peak
    assert tiled.peak - whole.peak >= 64 * 128 * 2

    shutil.rmtree(tmp_path / "tiled" / "v1" / "memory")
    crossing_at(256, monkeypatch)
    again = lab_of(tmp_path / "tiled").candidate("rtn").memory
    assert again.peak == tiled.peak
    assert again.peak.convention == tiled.peak.convention
    shutil.rmtree(tmp_path / "tiled" / "v1" / "kernels")
    anew = lab_of(tmp_path / "tiled").candidate("rtn").memory
    assert anew.peak == whole.peak, "the memory of other kernels was read"


def test_what_is_known_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is made, and no kernel timed."""
    found = tiny_lab(tmp_path).candidate("rtn").memory
    again = tiny_lab(tmp_path)
    assert again.candidate("rtn").memory.resident == found.resident
    assert again.store.built == {}
    assert again.forwards == 0
    assert "runnable" not in again.candidate("rtn").__dict__
    assert "speed_base" not in again.__dict__


def test_decoding_holds_the_cache_and_little_else(tmp_path: Path) -> None:
    """The cache of all tokens but one; a step adds that one, and temporaries of a single row."""
    lab = tiny_lab(tmp_path)
    memory = lab.baseline.memory
    tokens = max(len(window.ids) for window in lab.eval_data.windows)
    cache = memory.kv_per_token * tokens
    runs = "bfloat16, torch.nn.functional.linear 14"
    assert memory.decode_peak.convention == f"{runs}, decode after {tokens - 1} tokens"
    assert memory.resident + cache < memory.decode_peak < memory.peak
    # One layer's keys and values in two lengths, its mask, and rows of at most the vocabulary.
    layers = lab.base_model.config.num_hidden_layers
    width = max(lab.base_model.config.intermediate_size, lab.base_model.config.vocab_size)
    assert memory.decode_peak - memory.resident - cache < cache / layers + 4 * 20 * width
    assert memory.named("memory.decode_peak") == memory.decode_peak
    assert not memory.decode_peak.simulated
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


def job_of(candidate: Candidate) -> dict[str, Any]:
    """What the process of `memory.rss_peak` is told, but for the configuration, which is gone."""
    with packed_job(candidate) as job:
        return job


@needs_kernels
@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *itertools.product(
            ["llama", "mixtral", "gpt2", "gemma"], ["none", "rtn", "dynamic:bits=8", "gguf:Q4_K_M"]
        ),
        ("llama", "quarot+rtn"),
    ],
)
def test_by_itself_it_runs_on_the_same_kernels(
    tmp_path: Path, architecture: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of `memory.peak` to the bit, kernel by kernel; they are not checked or timed."""
    lab = tiny_lab(tmp_path, architecture)
    candidate = lab.candidate(method)
    model, job = candidate.speed_model, job_of(candidate)
    for name in ("largest_error", "crossover", "slowdown"):
        monkeypatch.delattr(choose, name)
    alone = load_as_run(job, lab.base_model.config)
    ids = torch.tensor([list(lab.eval_data.windows[0].ids)])
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits, model(input_ids=ids).logits)
    kinds = [
        {name: (type(m), getattr(m, "most_rows", None)) for name, m in each.named_modules()}
        for each in (alone, model)
    ]
    assert kinds[0].keys() == kinds[1].keys()
    packed = (KernelLinear, PackedModule)
    for name, kind in kinds[1].items():
        if issubclass(kind[0], packed):
            assert kinds[0][name] == kind, name
    assert resident_bytes(alone) == resident_bytes(model)


@needs_kernels
@pytest.mark.parametrize("method", ["none", "rtn"])
def test_layers_are_loaded_one_at_a_time(tmp_path: Path, method: str) -> None:
    """Of its 56 layers one is also there as it is stored, or as codes in bytes and words."""
    lab = lab_of(tmp_path, 128, 256, 8)
    candidate, config = lab.candidate(method), lab.base_model.config
    job, kept = job_of(candidate), list[Any]()
    peak = peak_temporary_bytes(lambda: kept.append(load_as_run(job, config)))
    layer = 128 * 256
    both = {"none": 4 * layer, "rtn": 12 * layer}[method] + 2**14
    assert peak < resident_bytes(kept[0]) + both
    stored = sum(each.nbytes for each in candidate.checkpoint.size.layers)
    assert both < stored


def test_a_checkpoint_that_lacks_a_parameter_is_an_error(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    checkpoint = lab.candidate("rtn").checkpoint

    class Lacking(Checkpoint):
        def each_other(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            found = super().each_other(dtype)
            return ((k, v) for k, v in found if k != "model.norm.weight")

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
    candidate = tiny_lab(tmp_path).candidate("rtn")
    found = candidate.memory.rss_peak
    assert found.unit == "bytes"
    assert found.convention == f"bfloat16, {candidate.kernels}, prompt of 56, 8 generated"
    assert found.simulated
    idle = int(found.detail.split()[0].replace(",", ""))
    assert 50e6 < idle < found < 4e9
    assert "memory.rss_peak" in candidate.measured
    again = tiny_lab(tmp_path)
    assert again.candidate("rtn")["memory.rss_peak"] == found
    assert "process_memory" not in again.store.built


@needs_kernels
@pytest.mark.slow
def test_the_process_holds_packed_bits_once_and_no_dense_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 28 million weights, int4 saves 1.5 bytes each beside the process of a plain model."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back at once
    lab = lab_of(tmp_path, 1024, 2048, 3)
    for parameter in lab.base_model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    packed, plain = lab.candidate("rtn"), lab.baseline
    saved = plain.memory.resident - packed.memory.resident
    assert saved > 1.4 * sum(m * n for m, n in block_matrices(lab))
    slack = 8 * 2**20  # a piece that is packed, a tile, and a process's own differences
    assert abs(plain.memory.rss_peak - packed.memory.rss_peak - saved) < slack
    assert slack < packed.memory.resident / 1.5 < saved / 2


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
