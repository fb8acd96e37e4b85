"""SmoothQuant's scales against the formula written out, and what they do to a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab import Lab
from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.errors import MethodError
from pytest_qlab.formats.activations import PerTokenSymmetric
from pytest_qlab.kernels.real import has_operator
from pytest_qlab.methods.blocks import BlockContext
from pytest_qlab.methods.gptq import Gptq
from pytest_qlab.methods.pipeline import quantize_model
from pytest_qlab.methods.smoothquant import Smooth, SmoothQuant
from pytest_qlab.models.structure import all_linears
from pytest_qlab.solvers.grid import GridRule, fake_quantize
from pytest_qlab.solvers.smooth import smoothing_scale
from tests.architectures import ARCHITECTURES, character_tokenizer, token_ids
from tests.lab.tiny import documents, tiny_lab
from tests.methods.test_methods import context, fold_of, statistics_of, unreached


def by_formula(weights: list[Tensor], inputs: Tensor, alpha: float) -> list[float]:
    """Equation 4 with the reference's least values, number by number."""
    found = []
    for j in range(inputs.shape[1]):
        act = max(abs(float(token[j])) for token in inputs)
        col = max(abs(float(row[j])) for weight in weights for row in weight)
        found.append(max(act**alpha / max(col, 1e-5) ** (1 - alpha), 1e-5))
    return found


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.0, 0.25, 0.5, 0.85, 1.0]))
@settings(deadline=None, max_examples=40)
def test_is_the_formula(columns: int, layers: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(columns * 10 + layers)
    inputs = torch.randn(7, columns, generator=generator) * 10
    inputs[:, 0] = 0
    weights = [torch.randn(n + 1, columns, generator=generator) for n in range(layers)]
    if layers == 1:
        weights[0][:, -1] = 0
    found = smoothing_scale(weights, inputs.abs().amax(0), alpha)
    expected = torch.tensor(by_formula(weights, inputs, alpha))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_ends_make_one_side_even() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(50, 8, generator=generator), torch.randn(5, 8, generator=generator)
    inputs[:, 3] *= 100
    largest = inputs.abs().amax(0)
    moved = smoothing_scale([weight], largest, 1.0)
    torch.testing.assert_close((inputs / moved).abs().amax(0), torch.ones(8))
    kept = smoothing_scale([weight], largest, 0.0)
    torch.testing.assert_close((weight * kept).abs().amax(0), torch.ones(8))
    half = smoothing_scale([weight], largest, 0.5)
    torch.testing.assert_close((inputs / half).abs().amax(0), (weight * half).abs().amax(0))


def smoothed(*layers: Any, kind: str = "norm", alpha: float = 0.5) -> list[Tensor]:
    """The scales that a fold of these layers gets."""
    fold, fake = fold_of(list(layers))
    fake.kind = kind  # type: ignore[attr-defined]
    Smooth(alpha=alpha).transform_block(BlockContext(0, list(layers), [fold]))
    return fake.applied


def test_norms_are_smoothed_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 16, generator=generator)
    weights = [torch.randn(4, 16, generator=generator) for _ in range(3)]
    known = statistics_of(inputs)
    pair = [context(f"w{n}", weight, known) for n, weight in enumerate(weights[:2])]
    other = context("w2", weights[2], known)
    (norm, fake), (linear, left_alone) = fold_of(pair), fold_of([other])
    fake.kind, left_alone.kind = "norm", "linear"  # type: ignore[attr-defined]
    Smooth(alpha=0.25).transform_block(BlockContext(0, [*pair, other], [linear, norm]))
    assert left_alone.applied == []
    assert torch.equal(other.site.weight(), weights[2])
    (found,) = fake.applied
    expected = torch.tensor(by_formula(weights[:2], inputs, 0.25))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for each, weight in zip(pair, weights, strict=False):
        assert torch.equal(each.site.weight(), weight * found)
        assert each.statistics is not None
        torch.testing.assert_close(each.statistics.maximum, inputs.amax(0) / found)


def test_a_block_without_such_norms_is_refused() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MethodError, match=r"no norm in block 0.*to smooth\. Take .* dynamic"):
        smoothed(context("w", weight, statistics_of(weight.clone())), kind="linear")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_that_add_one_are_refused_in_16_bits_and_why(dtype: str, tmp_path: Path) -> None:
    """1 + weight over a scale, less 1, is near -1: what is stored of it is off by some percent."""
    ARCHITECTURES["gemma"]().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    lab = Lab(
        str(tmp_path / "model"),
        dtype=dtype,
        evaluation=documents(2, seed=1),
        calibration=documents(4, seed=2),
        calibration_length=32,
        store=tmp_path / "store",
        threads=1,
    )
    with pytest.raises(MethodError, match=rf"1 \+ weight.* in {dtype}.*--qlab-dtype=float32"):
        lab.checkpoint(lab.candidate("smooth+rtn").method)


def test_experts_count_by_the_most_that_any_of_them_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 16, generator=generator)
    weights = [torch.randn(4, 16, generator=generator) for _ in range(3)]
    experts = [
        context("w1", weights[0], statistics_of(inputs[:8])),
        context("w2", weights[1], statistics_of(inputs[8:])),
        context("idle", weights[2], unreached(16)),
    ]
    (found,) = smoothed(*experts)
    expected = torch.tensor(by_formula(weights, inputs, 0.5))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert smoothed(context("idle", weights[2], unreached(16))) == []


def test_statistics_that_are_missing_or_not_finite_are_refused() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    broken = statistics_of(weight.clone())
    broken.maximum[2] = torch.inf
    missing: Any = None
    for known, message in ((broken, "w1 contain NaN"), (missing, "needs the range.*w1")):
        with pytest.raises(MethodError, match=message):
            smoothed(context("w1", weight, known))


def test_smoothquant_rounds_weights_per_row_and_inputs_per_token() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    found = SmoothQuant(bits=4).quantize(weight, unreached(40))
    assert isinstance(found.activation, PerTokenSymmetric)
    assert found.activation.bits == 8
    assert torch.equal(
        found.weight.dequantize(), fake_quantize(weight, GridRule(4, symmetric=True), -1)
    )
    assert SmoothQuant().id == "smoothquant-w8a8"
    assert SmoothQuant().stream == "original"


# On a model


def norm_inputs(model: Any, name: str, sequences: Any) -> Tensor:
    """Greatest magnitudes of a layer's inputs, from plain forwards."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_model_computes_the_same(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture)
    candidate = lab.candidate("smooth+none")
    scales = candidate.checkpoint.scales()
    assert scales
    assert all(set(each) == {"column"} for each in scales.values())
    behind = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc2")
    assert not any(name.endswith(behind) for name in scales)
    ids = token_ids(24)
    with torch.no_grad():
        expected = lab.base_model(input_ids=ids).logits
        found = candidate.model(input_ids=ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_scales_are_those_of_the_calibration_text(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    scales = lab.candidate("smoothquant:alpha=0.75").checkpoint.scales()
    base = lab.base_model
    for index in range(2):
        prefix = f"model.layers.{index}"
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            part = "self_attn" if "q_proj" in names else "mlp"
            full = [f"{prefix}.{part}.{name}" for name in names]
            weights = [base.get_submodule(name).weight for name in full]
            inputs = norm_inputs(base, full[0], lab.calibration.sequences)
            expected = torch.tensor(by_formula(weights, inputs, 0.75))
            for name in full:
                torch.testing.assert_close(scales[name]["column"], expected, rtol=1e-4, atol=0)


def with_outliers() -> Any:
    """A Llama whose norms make two channels a hundred times as large as the weights undo."""
    model = ARCHITECTURES["llama"]()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight[[3, 20]] *= 100
                for name in readers:
                    parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                    getattr(parent, name).weight[:, [3, 20]] /= 100
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_outlier_channels_cost_less(bits: int, tmp_path: Path) -> None:
    lab = Lab(
        with_outliers(),
        tokenizer=character_tokenizer(),
        evaluation=documents(6, seed=1),
        calibration=documents(8, seed=2),
        window_length=48,
        calibration_length=32,
        threads=1,
        store=tmp_path,
    )
    options = f"bits=8:activation_bits={bits}"
    plain, even = (
        float(lab.candidate(f"{m}:{options}").kl.mean) for m in ("dynamic", "smoothquant")
    )
    assert even < 0.3 * plain


def test_gptq_calibrates_on_smoothed_inputs(tmp_path: Path) -> None:
    """GPTQ on a model whose norms and readers were smoothed by hand gives the same codes."""
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("smooth+gptq:bits=3:group_size=8")
    scales = candidate.checkpoint.scales()
    model = copy.deepcopy(lab.base_model)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for norm, part in (
                ("input_layernorm", "q_proj"),
                ("post_attention_layernorm", "up_proj"),
            ):
                where = "self_attn" if part == "q_proj" else "mlp"
                scale = scales[f"model.layers.{index}.{where}.{part}"]["column"]
                getattr(layer, norm).weight /= scale
        for site in all_linears(model):
            if site.name in scales:
                site.set_weight(site.weight() * scales[site.name]["column"])
    expected = quantize_model(model, Gptq(bits=3, group_size=8), lab.calibration.sequences, None)
    packed = candidate.checkpoint.layers()
    for name, layer in expected.layers.items():
        assert torch.equal(packed[name].weight.dequantize(), layer.weight.dequantize()), name
    assert candidate.checkpoint.index["forwards"] == len(lab.calibration.sequences)


@pytest.mark.skipif(
    not has_operator("onednn", "qlinear_prepack"), reason="this build of torch has no int8 kernel"
)
def test_runs_on_the_kernels_of_dynamic(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    assert str(lab.candidate("smoothquant").kernels) == str(lab.candidate("dynamic").kernels)
    assert not lab.candidate("smoothquant").kernels.simulated
    assert "onednn-int8 14" in str(lab.candidate("smoothquant").kernels)


@pytest.mark.parametrize("method", ["rtn", "awq", "static", "gguf:Q4_0:imatrix", "dynamic"])
def test_any_method_can_follow(method: str, tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path, max_windows=2).candidate(f"smooth+{method}")
    assert candidate.checkpoint.scales()
    assert 0 < float(candidate.kl.mean) < 1


def test_statistics_follow_the_scale() -> None:
    """What a calibrated method after it is given describes the smoothed inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 16, generator=generator)
    layer = context("w", torch.randn(4, 16, generator=generator), statistics_of(inputs))
    (scale,) = smoothed(layer)
    expected = statistics_of(inputs / scale)
    found = layer.statistics
    assert isinstance(found, LayerStatistics)
    for key, value in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[key], value, rtol=1e-4, atol=1e-5)
