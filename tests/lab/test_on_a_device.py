"""A whole lab on the stand-in for a CUDA device: every number is the one of the CPU, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_qlab import Lab
from pytest_qlab.gate.record import record_of
from pytest_qlab.kernels.packed import PackedModule
from pytest_qlab.machine import processor_name, processor_of
from pytest_qlab.measuring import attribution, endtoend, speed
from pytest_qlab.measuring.runnable import kernel_use_parts
from pytest_qlab.measuring.speed import PHASES, PREFILL, prompt, timed_call
from pytest_qlab.measuring.swapped import swapped
from pytest_qlab.metrics import latency, throughput
from tests.lab.test_streaming import contents
from tests.lab.tiny import documents, saved_tiny_model, tiny_lab
from tests.standin import NAME, StandInDevice

pytestmark = pytest.mark.usefixtures("cuda")


def labs(directory: Path, architecture: str = "llama", **options: Any) -> tuple[Lab, Lab]:
    """One on the CPU, and one on the device, whose windows and layers run in two threads."""
    given: dict[str, Any] = {
        "evaluation": documents(2, seed=1, length=40),
        "calibration": documents(2, seed=2, length=40),
        "window_length": 24,
        **options,
    }
    here = tiny_lab(directory / "here", architecture, **given)
    there = tiny_lab(
        directory / "there", architecture, **{**given, "device": "cuda:0", "threads": 2}
    )
    return here, there


def row(lab: Lab, spec: str) -> tuple[Any, ...]:
    """All measures of a candidate but durations, and every layer's errors."""
    candidate = lab.candidate(spec)
    layers = [(each.name, each.snr_db, each.output_error) for each in candidate.layers]
    assert candidate.fidelity.estimates()
    return candidate.fragment().measures, layers


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [
        ("llama", "rtn"),
        ("llama", "gptq:bits=3"),
        ("llama-tied", "gguf:Q4_K_M"),
        ("qwen2", "quarot+dynamic"),
        ("opt", "smoothquant"),
        ("gpt2", "static"),
        ("gemma2", "awq:n_grid=4"),
        ("mixtral", "rtn:bits=3"),
    ],
)
def test_a_row_is_the_cpus(tmp_path: Path, architecture: str, spec: str) -> None:
    """Statistics, folds, rotations, experts, embeddings, biases, inputs that are rounded."""
    here, there = labs(tmp_path, architecture)
    measures, layers = row(here, spec)
    assert len(measures) > 10
    assert row(there, spec) == (measures, layers)
    model = there.candidate(spec).model
    assert all(each.is_cuda for each in (*model.parameters(), *model.buffers()))


def test_gradients_and_the_noise_floor_are_the_cpus(tmp_path: Path) -> None:
    here, there = labs(tmp_path)
    assert there.noise_floor == here.noise_floor
    assert here.noise_floor.path
    expected, found = here.gradients()(1), there.gradients()(1)
    assert expected.keys() == found.keys()
    for name, squares in expected.items():
        assert bool(squares.any())
        assert torch.equal(found[name], squares), name


@pytest.mark.parametrize(
    ("architecture", "spec"), [("llama", "gptq"), ("mixtral", "rtn"), ("gemma2", "gguf:Q4_K_M")]
)
def test_a_model_that_is_read_block_by_block(tmp_path: Path, architecture: str, spec: str) -> None:
    model = saved_tiny_model(tmp_path / "model", architecture)
    found = []
    for device, stream in (("cpu", "never"), ("cuda:0", "always")):
        lab = Lab(
            str(model),
            evaluation=documents(1, seed=1, length=40),
            calibration=documents(2, seed=2, length=40),
            calibration_length=32,
            store=tmp_path / device.partition(":")[0],
            device=device,
            stream=stream,
            threads=2,
        )
        found.append(contents(lab.checkpoint(lab.candidate(spec).method)))
    assert found[1] == found[0]


def test_memory_is_what_is_counted_on_the_cpu(tmp_path: Path) -> None:
    """The allocator's peak there, the tensors of all operations here.

    Codes of 3 bits have no kernel on either, so that the same operations run; in bfloat16 on both.
    """
    both = labs(tmp_path, dtype="bfloat16")
    here, there = (each.candidate("rtn:bits=3").memory for each in both)
    for name in ("resident", "peak", "decode_peak"):
        assert float(getattr(there, name)) == float(getattr(here, name)) > 0


def test_what_is_timed_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: StandInDevice
) -> None:
    """A forward and a step of decoding; and the candidate beside the base model."""
    _, there = labs(tmp_path)
    candidate = there.candidate("rtn")
    for phase in (PREFILL, PHASES["decode"]):
        call = timed_call(candidate.speed_model, prompt(there, 12), phase)
        for _ in range(2):
            call.prepare()
            before = cuda.synchronized
            call.run()
            assert cuda.synchronized == before + 1
    monkeypatch.setattr(speed, "ROUNDS", 4)
    monkeypatch.setattr(speed, "FLOOR_ROUNDS", 4)
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 0.0)
    before = cuda.synchronized
    assert candidate.latency.p50 > 0
    assert cuda.synchronized - before >= 2 * 4 + 2 * 4
    saved = record_of(candidate, evaluated=False).candidates[candidate.id].latency
    assert saved is not None
    assert saved.processor == f"{processor_name()}, {NAME}"


def test_throughput_runs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that are generated are the CPU's."""
    monkeypatch.setattr(throughput, "QUIET_CPU_SHARE", 0.0)
    monkeypatch.setattr(endtoend, "ROUNDS", 6)
    monkeypatch.setattr(endtoend, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(endtoend, "NEW_TOKENS", 3)
    here, there = labs(tmp_path)
    assert there.candidate("rtn").throughput.decode > 0
    ids = torch.tensor([[5, 9, 40, 7]])
    expected, found = (
        lab.base_model.generate(ids.to(lab.model.device), max_new_tokens=5, do_sample=False)
        for lab in (here, there)
    )
    assert found.is_cuda
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("spec", ["rtn", "smoothquant", "quarot+dynamic"])
def test_the_damage_of_single_layers_is_the_cpus(
    tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a layer multiplies by is dequantized once, on the device that it runs on."""
    made = []

    def noting(*args: Any) -> torch.nn.Module:
        made.append(swapped(*args))
        return made[-1]

    here, there = labs(tmp_path)
    expected = here.candidate(spec).attribution
    assert expected.total > 0
    monkeypatch.setattr(attribution, "swapped", noting)
    assert there.candidate(spec).attribution == expected
    packed = [
        each for module in made for each in module.modules() if isinstance(each, PackedModule)
    ]
    assert len(packed) == 14
    assert all(each.materialized and each.weight.is_cuda for each in packed)


def test_a_speed_is_of_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of one machine share a store, but no latencies and no choice of kernels."""
    _, there = labs(tmp_path)
    assert processor_of("cpu") == processor_name()
    assert processor_of("cuda:0") == f"{processor_name()}, {NAME}"
    keys = []
    for name in ("one", "another"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        keys.append((speed.conditions(there, 0), kernel_use_parts(there.candidate("rtn"))))
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] != keys[1][1]
    assert there.describe()["environment"]["processor"] == f"{processor_name()}, another"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processor_of("cuda:0") == processor_name()
