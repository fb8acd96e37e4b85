"""Measuring block by block gives the bits that measuring in memory gives, and loads no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from pytest_qlab import Lab
from pytest_qlab.checkpoint import Checkpoint, instantiate, open_checkpoint, save_checkpoint
from pytest_qlab.errors import MetricError, ModelError
from pytest_qlab.kernels import choose
from pytest_qlab.kernels.packed import PackedModule, set_materialized
from pytest_qlab.measuring import loadtimes
from pytest_qlab.measuring.parts import PackedParts
from pytest_qlab.methods.pipeline import quantize_model
from pytest_qlab.specs import parse_specs
from tests.architectures import ARCHITECTURES, character_tokenizer
from tests.lab.tiny import documents, saved_tiny_model

FEW = ("llama", "gpt2", "gemma2", "mixtral")
SPECS = ("none", "rtn:bits=3", "awq", "gguf:Q4_K_M")
MEASURED = ("reference", "fidelity", "noise_floor", "layers")


def lab(model: Path, store: Path, **options: Any) -> Lab:
    given: dict[str, Any] = {
        "evaluation": documents(4, seed=1),
        "calibration": documents(6, seed=2),
        "window_length": 48,
        "calibration_length": 32,
        "threads": 1,
        **options,
    }
    return Lab(str(model), store=store, **given)


def entries(made: Lab) -> dict[str, bytes]:
    """The bytes of all that was measured, by kind, key and name."""
    root = made.store.root / "v1"
    return {
        f"{kind}/{entry.name}/{file.name}": file.read_bytes()
        for kind in MEASURED
        for entry in (root / kind).iterdir()
        if entry.is_dir()
        for file in entry.iterdir()
        if file.name != "manifest.json"
    }


def measured(made: Lab, spec: str) -> dict[str, bytes]:
    """The same after measuring damage, its floor, and layers."""
    candidate = made.candidate(spec)
    assert candidate["kl.mean"].floor is not None or spec == "none"
    assert made.noise_floor.path
    assert candidate.layer_error is not None
    return entries(made)


def check(model: Path, place: Path, spec: str, **options: Any) -> None:
    whole = lab(model, place / "whole", stream="never", **{**options, "threads": 1})
    streamed = lab(model, place / "streamed", stream="always", **options)
    expected = measured(whole, spec)
    assert {kind for kind in MEASURED if any(n.startswith(kind) for n in expected)} == {*MEASURED}
    assert measured(streamed, spec) == expected
    assert not streamed.model.is_loaded
    assert streamed.forwards == whole.forwards


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("architecture", FEW)
def test_the_bits_are_the_same(tmp_path: Path, architecture: str, spec: str) -> None:
    check(saved_tiny_model(tmp_path / "model", architecture), tmp_path, spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(FEW)))
def test_the_bits_are_the_same_everywhere(tmp_path: Path, architecture: str, spec: str) -> None:
    check(saved_tiny_model(tmp_path / "model", architecture), tmp_path, spec)


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [
        ("llama", "quarot+rtn:bits=4"),
        ("llama", "smoothquant"),
        ("llama-tied", "gguf:Q4_K_M"),
        ("gemma", "gguf:Q4_K_M"),
        ("phi", "gguf:Q4_K_M"),
    ],
)
def test_rotations_rounded_inputs_and_packed_heads(
    tmp_path: Path, architecture: str, spec: str
) -> None:
    check(saved_tiny_model(tmp_path / "model", architecture), tmp_path, spec)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_threads_dtypes_and_windows_of_different_lengths(tmp_path: Path, dtype: str) -> None:
    model = tmp_path / "model"
    ARCHITECTURES["llama"]().bfloat16().save_pretrained(model, max_shard_size="10KB")
    character_tokenizer().save_pretrained(model)
    texts = [*documents(3, seed=1), *documents(2, seed=3, length=37)]
    made = lab(model, tmp_path / "lengths", evaluation=texts)
    assert len({len(window.ids) for window in made.eval_data.windows}) > 1
    check(model, tmp_path, "rtn:bits=3", dtype=dtype, threads=3, evaluation=texts)


def test_what_was_measured_in_memory_is_used(tmp_path: Path) -> None:
    model = saved_tiny_model(tmp_path / "model")
    expected = measured(lab(model, tmp_path / "store", stream="never"), "rtn:bits=3")
    again = lab(model, tmp_path / "store", stream="always")
    assert measured(again, "rtn:bits=3") == expected
    assert again.store.built == {}


def test_logits_that_hidden_states_do_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaForCausalLM.forward

    def odd(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.abs().sqrt()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", odd)
    model = saved_tiny_model(tmp_path / "model")
    check(model, tmp_path, "rtn:bits=3")
    assert not lab(model, tmp_path / "streamed", stream="always").reference.exact


def altered(place: Path, model: Path, spec: str) -> tuple[Lab, Checkpoint]:
    """A checkpoint that has changed every parameter that it does not pack."""
    made = lab(model, place / "altered", stream="never")
    base, method = made.base_model, parse_specs([spec])[0].method
    quantized = quantize_model(base, method, [], None)
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight" for name in (*quantized.layers, *quantized.embeddings)}
    quantized.changed = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in base.named_parameters()
        if name not in weights
    }
    (place / "checkpoint").mkdir()
    save_checkpoint(place / "checkpoint", quantized, made.loaded)
    return made, open_checkpoint(place / "checkpoint")


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers that are there, and the weights that packed modules make."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            found[f"{name}.weight"] = module.weight
    return {name: each for name, each in found.items() if not each.is_meta}


@pytest.mark.parametrize("spec", ["rtn", "gguf:Q4_K_M"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_parts_hold_what_the_whole_candidate_holds(
    tmp_path: Path, architecture: str, spec: str
) -> None:
    model = saved_tiny_model(tmp_path / "model", architecture)
    made, checkpoint = altered(tmp_path, model, spec)
    whole = instantiate(checkpoint, made.base_model)
    set_materialized(whole, True)
    expected = held(whole)
    parts = PackedParts(made.model.lazy, checkpoint)
    empty = held(parts.model)
    seen: dict[str, torch.Tensor] = {}
    for part in (parts.embedding(), parts.head(), parts.rest(), *map(parts.block, range(2))):
        with part:
            seen.update(held(parts.model))
        assert held(parts.model).keys() == empty.keys(), "a part is let go of"
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_one_block_is_there_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(saved_tiny_model(tmp_path / "model"), tmp_path / "store", stream="always")
    _ = made.candidate("rtn").checkpoint
    _ = made.reference.predictions()
    present: list[set[str]] = []
    block = PackedParts.block

    @contextmanager
    def watched(self: PackedParts, index: int) -> Iterator[None]:
        with block(self, index):
            present.append(
                set(re.findall(r"layers\.\d+|embed|lm_head", " ".join(held(self.model))))
            )
            yield

    monkeypatch.setattr(PackedParts, "block", watched)
    _ = made.candidate("rtn").fidelity
    passes = len(made.looks)
    assert present == [{"embed", "layers.0"}, {"layers.1"}] * passes, "each look is one pass"


def test_blocks_that_pass_on_more_than_hidden_states_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_tiny_model(tmp_path / "model")
    forward, first = LlamaDecoderLayer.forward, list[torch.Tensor]()

    def sharing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx == 0:
            first[:] = [output]
            return output
        return output + first[0][:, :1]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", sharing)
    with pytest.raises(ModelError, match=r"cannot be measured block by block: its blocks pass on"):
        _ = lab(model, tmp_path / "store", stream="always").candidate("rtn").fidelity


def test_models_that_look_ahead_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_tiny_model(tmp_path / "model")
    forward = LlamaDecoderLayer.forward

    def looking(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, hidden_states, *args, **kwargs)
        return output + output.mean(1, keepdim=True)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", looking)
    for stream in ("always", "never"):
        with pytest.raises(ModelError, match=r"not a causal language model: its prediction"):
            _ = lab(model, tmp_path / stream, stream=stream).candidate("rtn").fidelity


def test_code_that_fails_without_its_embedding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_tiny_model(tmp_path / "model")
    forward = LlamaModel.forward

    def strict(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if not self.embed_tokens(input_ids).any():
            raise RuntimeError("no embedding")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", strict)
    with pytest.raises(ModelError, match=r"its code fails then \(no embedding\).*stream=never"):
        _ = lab(model, tmp_path / "store", stream="always").candidate("rtn").fidelity


@pytest.mark.parametrize(
    "metric", ["latency.p50", "throughput.decode", "memory.resident", "memory.rss_peak"]
)
def test_measures_of_the_whole_model_say_so_before_they_load_it(
    tmp_path: Path, metric: str
) -> None:
    made = lab(saved_tiny_model(tmp_path / "model"), tmp_path / "store", stream="always")
    candidate = made.candidate("rtn")
    with pytest.raises(MetricError, match=r"of speed and memory .*as --qlab-stream=always says"):
        _ = float(candidate[metric])
    assert not made.model.is_loaded


@pytest.mark.slow
def test_load_times_load_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPEATS", "MEDIAN_SAMPLES"):
        monkeypatch.setattr(f"pytest_qlab.measuring.loadtimes.{name}", 1)
    made = lab(saved_tiny_model(tmp_path / "model"), tmp_path / "store", stream="always")
    assert float(made.candidate("none")["load.warm"]) > 0
    assert not made.model.is_loaded


def test_attribution_and_whole_models_say_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_qlab.streaming.exceeds_memory", lambda nbytes: True)
    made = lab(saved_tiny_model(tmp_path / "model"), tmp_path / "store")
    candidate = made.candidate("rtn:bits=3")
    _ = candidate.fidelity, candidate.layer_error
    asked: dict[str, Callable[[], object]] = {
        "Attributions": lambda: candidate.attribution,
        "Quantized models": lambda: candidate.model,
        "Base models": lambda: made.base_model,
    }
    for what, ask in asked.items():
        with pytest.raises(
            MetricError, match=rf"^{what} .*since two copies of it do not fit in memory"
        ):
            ask()
    assert candidate.affordable_attribution() is None, "a message loads no model"
    assert not made.model.is_loaded


def test_facts_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    model = saved_tiny_model(tmp_path / "model", "llama-tied")
    made = lab(model, tmp_path / "store", stream="always")
    _ = made.candidate("none").fidelity
    facts = made.describe()["model"]
    loaded = ARCHITECTURES["llama-tied"]()
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == sum(each.numel() for each in loaded.parameters())
    assert facts["bytes"] == sum(each.nbytes for each in loaded.parameters())


@pytest.mark.parametrize("spec", ["none", "rtn", "dynamic"])
@pytest.mark.parametrize("architecture", FEW)
def test_loads_are_of_the_kernels_that_would_be_chosen_in_memory(
    architecture: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[dict[str, Any]] = []

    def answer(candidate: str, job: dict[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        return {"load": 1.0, "first": 0.1, "steady": [0.01], "token": 1}

    monkeypatch.setattr(loadtimes, "_loaded", answer)
    monkeypatch.setattr(choose, "crossover", lambda module: 8)  # found by timing
    model = saved_tiny_model(tmp_path, architecture)
    whole, streamed = (lab(model, tmp_path / each, stream=each) for each in ("never", "always"))
    candidates = [each.candidate(spec) for each in (whole, streamed)]
    expected, found = (candidate.load.warm for candidate in candidates)
    assert found.convention == expected.convention
    assert found.simulated == expected.simulated
    assert candidates[0].kernels == candidates[1].kernels
    assert [jobs[0][key] for key in ("dtype", "layers")] == [
        jobs[-1][key] for key in ("dtype", "layers")
    ]
    assert not streamed.model.is_loaded
