"""The models that speed and memory are measured on: what runs them, says, and is remembered."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_qlab.checkpoint import instantiate
from pytest_qlab.kernels import choose, int4
from pytest_qlab.kernels.choose import LayerKernel
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import CrossedLinear, KernelLinear, has_operator
from pytest_qlab.measuring import runnable, speed
from pytest_qlab.measuring.runnable import KernelUse, speed_base, speed_dtype, speed_model
from pytest_qlab.metrics import latency
from tests.architectures import ARCHITECTURES, token_ids
from tests.lab.tiny import tiny_lab

needs_kernels = pytest.mark.skipif(
    not has_operator("aten", "_weight_int4pack_mm_for_cpu")
    or not has_operator("onednn", "qlinear_prepack"),
    reason="this build of torch has no int4 and int8 kernels for CPUs",
)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with instructions for it."""
    monkeypatch.setattr(runnable, "speed_dtype", lambda dtype, device: torch.bfloat16)


@needs_kernels
def test_layers_are_counted_by_what_runs_them(tmp_path: Path) -> None:
    """Of each of the two blocks, down_proj alone has 48 inputs: no whole group of 32."""
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("rtn")
    assert candidate.fragment().kernel == ""
    assert str(candidate.kernels) == "int4pack 12, dequantize-matmul 2"
    assert candidate.kernels.simulated
    assert candidate.kernels.dequantizing == 2
    assert candidate.kernels.wanted == ("W4 matmul on affine-groups",)
    assert 0 < candidate.kernels.rounding < 2**-8
    shapes = {"int4pack 16x32", "int4pack 32x32", "int4pack 48x32"}
    assert set(candidate.kernels.most_rows) == shapes
    kinds = [type(each) for each in speed_model(candidate).modules()]
    assert sum(issubclass(kind, KernelLinear) for kind in kinds) == 12
    assert sum(kind is PackedLinear for kind in kinds) == 2
    assert speed_model(candidate) is candidate.speed_model
    candidate.checkpoint  # noqa: B018
    assert candidate.fragment().kernel == "int4pack 12, dequantize-matmul 2"
    assert candidate.fragment().simulated

    again = tiny_lab(tmp_path).candidate("rtn")
    assert again.kernels == candidate.kernels
    assert "runnable" not in again.__dict__, "a model was made to know what is known"


@needs_kernels
def test_a_candidate_whose_layers_all_run_is_not_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 0.0)
    candidate = tiny_lab(tmp_path, simulated_latency="fail").candidate("dynamic:bits=8")
    assert candidate.latency.p50 > 0
    assert not candidate.latency.p50.simulated
    assert not candidate.latency.ratio.simulated
    fragment = candidate.fragment()
    assert fragment.kernel == "onednn-int8 14"
    assert not fragment.simulated


@needs_kernels
def test_a_kernel_that_fails_its_check_makes_it_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = int4.multiply_cpu
    monkeypatch.setattr(int4, "multiply_cpu", lambda *given: right(*given) * 1.1)
    candidate = tiny_lab(tmp_path).candidate("rtn")
    assert str(candidate.kernels) == "dequantize-matmul 14"
    off = [count for reason, count in candidate.kernels.reasons.items() if "off by" in reason]
    assert sum(off) == 12


@needs_kernels
@pytest.mark.parametrize("spec", ["rtn", "rtn:bits=8:group_size=-1:symmetric=true", "gptq", "none"])
def test_it_says_what_the_dequantized_model_says(spec: str, tmp_path: Path, bfloat16: None) -> None:
    """Oracle: the same packed layers in the same bfloat16 model, without kernels."""
    lab = tiny_lab(tmp_path)
    candidate, ids = lab.candidate(spec), token_ids(20)
    with torch.no_grad():
        expected = instantiate(candidate.checkpoint, lab.speed_base)(input_ids=ids).logits
        found = candidate.speed_model(input_ids=ids).logits
        exact = candidate.model(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    size = exact.norm()
    assert (found.float() - expected.float()).norm() < 0.03 * size
    assert (found.float() - exact).norm() < 0.03 * size


@needs_kernels
@pytest.mark.parametrize("spec", ["rtn", "dynamic:bits=8", "gguf:Q4_K_M", "ggml:F16"])
def test_what_was_chosen_is_built_again(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bfloat16: None
) -> None:
    """As by a process that finds it in the store; crossovers there count, not what a clock says."""
    monkeypatch.setattr(choose, "crossover", lambda module: 3)
    first = tiny_lab(tmp_path).candidate(spec)
    counts, ids = first.kernels.counts, token_ids(20)
    for name in ("crossover", "slowdown", "largest_error"):
        monkeypatch.delattr(choose, name)
    again = tiny_lab(tmp_path).candidate(spec)
    with torch.no_grad():
        assert torch.equal(again.speed_model(input_ids=ids).logits, first.speed_model(ids).logits)
    runs = [m for m in again.speed_model.modules() if isinstance(m, KernelLinear | PackedLinear)]
    assert Counter(each.kernel for each in runs) == counts
    assert {m.most_rows for m in runs if isinstance(m, CrossedLinear)} <= {3}


def test_layers_in_tiles_are_those_with_more_rows_than_their_kernel_takes() -> None:
    limits = {"a": None, "b": 0, "c": 4, "d": 256}
    use = KernelUse({}, layers={name: LayerKernel("k", rows) for name, rows in limits.items()})
    assert [use.in_tiles(rows) for rows in (1, 4, 5, 256, 257)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_the_base_is_a_copy_in_bfloat16(architecture: str, bfloat16: None) -> None:
    base: Any = ARCHITECTURES[architecture]()
    before = {name: each.detach().clone() for name, each in base.named_parameters()}
    copy = speed_base(base)
    assert not copy.training
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, before[name].to(torch.bfloat16)), name
    assert all(torch.equal(each, before[name]) for name, each in base.named_parameters())
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert (copy.get_input_embeddings().weight is copy.get_output_embeddings().weight) == tied
    for old, new in zip(base.buffers(), copy.buffers(), strict=True):
        assert torch.equal(old, new)
        assert old.dtype == new.dtype
    assert speed_base(copy) is copy


def test_it_computes_in_bfloat16_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert speed_dtype(torch.float32, torch.device("cuda")) == torch.bfloat16
    assert speed_dtype(torch.float16, torch.device("mps")) == torch.float16
    monkeypatch.setattr(runnable, "has_operator", lambda space, name: False)
    assert speed_dtype(torch.float32, cpu) == torch.float32
    assert speed_dtype(torch.bfloat16, cpu) == torch.bfloat16


def test_what_runs_is_plain_json_and_named_with_its_numbers() -> None:
    layers = {"up": LayerKernel("int4pack", 4), "down": LayerKernel("a")}
    counts, rows = {"b": 1, "int4pack": 40, "a": 1}, {"int4pack 8x8": 4}
    use = KernelUse(counts, ("W4",), {"why": 2}, 0.5, rows, layers)
    assert json.loads(json.dumps(use.to_dict())) == use.to_dict()
    assert KernelUse.from_dict(use.to_dict()) == use
    assert str(use) == "int4pack 40, a 1, b 1"
