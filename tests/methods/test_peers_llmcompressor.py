"""The same weights through compressed-tensors, the same model through llm-compressor.

compressed-tensors is in tox's `peers`. llm-compressor wants an older transformers than
`constraints.txt` pins, so its tests run in the environment of `benchmarks/requirements-peers.txt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pytest_qlab import Lab
from pytest_qlab.formats import MicroscaledFloat4
from pytest_qlab.formats.activations import (
    PerBlockMxfp4,
    PerBlockNvfp4,
    PerTokenFloat8,
    PerTokenSymmetric,
)
from pytest_qlab.formats.float8 import ScaledFloat8
from pytest_qlab.methods.dynamic import Dynamic
from pytest_qlab.methods.fp8 import Fp8
from pytest_qlab.methods.microscaled import Mxfp4, Nvfp4
from pytest_qlab.models.structure import all_linears
from pytest_qlab.solvers.grid import GridRule, round_to_nearest
from tests.architectures import character_tokenizer
from tests.lab.tiny import documents, saved_tiny_model
from tests.toy import toy_weight

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

REASON = "compressed-tensors is no dependency: tox -e peers, or pip install compressed-tensors"
REASON_MODEL = (
    "llmcompressor is no dependency and wants an older transformers: it needs an environment of "
    "its own, from benchmarks/requirements-peers.txt"
)


def weights() -> dict[str, Tensor]:
    """Bell-shaped, heavy-tailed, small, often halfway between two points, with rows of zeros."""
    normal = torch.randn(96, 512, generator=torch.Generator().manual_seed(0))
    zeros = normal.clone()
    zeros[[3, 50]] = 0
    return {
        "normal": normal,
        "heavy": normal**3,
        "like a model's": 0.02 * normal + 0.001,
        "bfloat16": normal.bfloat16().float(),
        "toy": toy_weight(),
        "zeros": zeros,
    }


WEIGHTS = weights()
named = pytest.mark.parametrize("name", WEIGHTS)


class Theirs(NamedTuple):
    """What compressed-tensors makes of a matrix; `codes` are the numbers that scales multiply."""

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    scheme: Any


def theirs(weight: Tensor, scheme: str) -> Theirs:
    """Scales and codes of one of its presets, from the ranges of rows or groups."""
    library = pytest.importorskip("compressed_tensors.quantization", reason=REASON)
    tools = pytest.importorskip("compressed_tensors.quantization.utils", reason=REASON)
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    preset = library.preset_name_to_scheme(scheme, ["Linear"])
    args = preset.weights
    groups = weight.view(len(weight), -1, args.group_size or weight.shape[1])
    low, high = groups.amin(-1), groups.amax(-1)
    tensor_scale = tools.generate_gparam(low.amin(), high.amax()) if "NV" in scheme else None
    scales, zero = tools.calculate_qparams(low, high, args, tensor_scale)
    codes = forward.quantize(weight.clone(), scales, zero, args, global_scale=tensor_scale)
    return Theirs(codes, scales, tensor_scale, preset)


def packed(weight: Tensor, found: Theirs, module: str, name: str) -> dict[str, Tensor]:
    """The tensors that it writes to a checkpoint."""
    compressor = getattr(pytest.importorskip(module, reason=REASON), name)
    state = {"weight": weight.clone(), "weight_scale": found.scales}
    if found.tensor_scale is not None:
        state["weight_global_scale"] = found.tensor_scale
    made: dict[str, Tensor] = compressor.compress(state, found.scheme)
    return made


def inputs_of(x: Tensor, scheme: str, seen: float | None = None) -> Tensor:
    """A layer's inputs as it rounds them at run time, after calibration has seen magnitudes."""
    library = pytest.importorskip("compressed_tensors.quantization", reason=REASON)
    tools = pytest.importorskip("compressed_tensors.quantization.utils", reason=REASON)
    args = library.preset_name_to_scheme(scheme, ["Linear"]).input_activations
    value = x.unsqueeze(0)
    above = None
    if seen is not None:
        above = tools.generate_gparam(torch.tensor(-seen), torch.tensor(seen))
    module = torch.nn.Identity()
    scale, zero = tools.compute_dynamic_scales_and_zp(value, args, module, global_scale=above)
    rounded: Tensor = library.fake_quantize(value, scale, zero, args, global_scale=above)[0]
    return rounded


# Weights


@named
def test_w8a8_weights(name: str) -> None:
    """Every code on the same float32 grids; stored, ours round scales to float16 first."""
    weight = WEIGHTS[name]
    codes, scales, _, _ = theirs(weight, "W8A8")
    exact = round_to_nearest(weight, GridRule(8, symmetric=True, scale_dtype=torch.float32), -1)
    filled = (weight != 0).any(1)
    assert torch.equal(exact.codes.float() - 128, codes)
    assert torch.equal(exact.grid.scale[filled], scales[filled])
    stored = Dynamic().quantize(weight, None).weight.dequantize()
    expected = codes * scales
    assert not stored[~filled].any()
    assert not expected[~filled].any()
    # float16 keeps 11 bits: the largest code, 127, moves by a sixteenth of a step at most.
    step = scales.expand_as(weight)
    off = ((stored - expected) / step)[filled].abs()
    assert float(off.amax()) <= 1 + 128 * 2**-11
    assert float((off > 0.5).float().mean()) < 0.03
    errors = [float((each - weight).norm()) for each in (stored, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)


@named
def test_fp8_weights(name: str) -> None:
    """Every code and scale."""
    weight = WEIGHTS[name]
    codes, scales, _, _ = theirs(weight, "FP8_DYNAMIC")
    ours = Fp8().quantize(weight, None).weight
    assert isinstance(ours, ScaledFloat8)
    filled = (weight != 0).any(1)
    stored = ours.tensors()
    assert torch.equal(stored["codes"].view(torch.float8_e4m3fn).float(), codes)
    assert torch.equal(stored["scales"][filled], scales[filled])


@named
def test_nvfp4_weights(name: str) -> None:
    """Codes and scales, but where its block scales leave E4M3 downwards.

    Those become 1/8 there, 64 times E4M3's least number, so that the block is rounded to zero.
    """
    weight = WEIGHTS[name]
    found = theirs(weight, "NVFP4A16")
    assert found.tensor_scale is not None
    made = packed(weight, found, "compressed_tensors.compressors.nvfp4", "NVFP4PackedCompressor")
    ours = Nvfp4().quantize(weight, None).weight
    assert isinstance(ours, MicroscaledFloat4)
    assert ours.tensor_scale is not None
    assert float(ours.tensor_scale) == pytest.approx(1 / float(found.tensor_scale), rel=1e-6)
    largest = weight.view(len(weight), -1, 16).abs().amax(-1)
    kept = largest / 6 * found.tensor_scale >= 2.0**-9
    scales = made["weight_scale"].float()
    assert torch.equal(ours.scales.float()[kept], scales[kept])
    unequal = ours.tensors()["codes"] != made["weight_packed"]
    assert float(unequal[kept.repeat_interleave(8, 1)].float().mean()) < 1e-4
    assert kept.float().mean() > 0.97


def test_nvfp4_keeps_blocks_that_compressed_tensors_loses() -> None:
    weight = WEIGHTS["normal"].clone()
    weight[:, :16] *= 1e-7
    found = theirs(weight, "NVFP4A16")
    assert (found.scales[:, 0] == 0.125).all()
    assert not found.codes[:, :16].any()
    assert found.codes[:, 16:].any()
    weight[:, :16] *= 5e3  # a quarter of 2**-9, E4M3's least number, and below
    lost = theirs(weight, "NVFP4A16").scales[:, 0] == 0.125
    ours = Nvfp4().quantize(weight, None).weight.dequantize()
    assert lost.any()
    assert ours[lost, :16].any()


@named
def test_mxfp4_weights(name: str) -> None:
    """Every byte of scales and codes."""
    weight = WEIGHTS[name]
    made = packed(
        weight,
        theirs(weight, "MXFP4A16"),
        "compressed_tensors.compressors.mxfp4",
        "MXFP4PackedCompressor",
    )
    ours = Mxfp4(scale="even").quantize(weight, None).weight
    assert isinstance(ours, MicroscaledFloat4)
    assert torch.equal(ours.scales, made["weight_scale"])
    assert torch.equal(ours.tensors()["codes"], made["weight_packed"])


# Inputs


@named
def test_fp8_inputs(name: str) -> None:
    x = WEIGHTS[name]
    assert torch.equal(PerTokenFloat8()(x), inputs_of(x, "FP8_DYNAMIC"))


@named
def test_int8_inputs(name: str) -> None:
    """Its step is max|x| / 127.5, ours max|x| / 127, so that the largest input is held."""
    x = WEIGHTS[name]
    found, expected = PerTokenSymmetric(8)(x), inputs_of(x, "W8A8")
    largest = x.abs().amax(1, keepdim=True)
    limit = largest / 127.5
    codes = (x / limit.clamp(min=1e-30)).round().clamp(-128, 127)
    torch.testing.assert_close(expected, codes * limit, rtol=1e-6, atol=0)
    # Half a step of difference between the two roundings, and what the steps differ by.
    assert bool(((found - expected).abs() <= 1.01 * limit + largest / 127 / 255).all())
    errors = [float((each - x).norm()) for each in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@named
def test_mxfp4_inputs(name: str) -> None:
    x = WEIGHTS[name]
    assert torch.equal(PerBlockMxfp4("even")(x), inputs_of(x, "MXFP4"))


@named
@pytest.mark.parametrize("share", [1.0, 0.25, 4.0])
def test_nvfp4_inputs(name: str, share: float) -> None:
    """Calibration has seen all of the range, a quarter of it, or more: what is beyond saturates.

    Blocks whose scale leaves E4M3 downwards are rounded to zero there, as those of weights are.
    """
    x = WEIGHTS[name]
    seen = share * float(x.abs().max())
    found, expected = PerBlockNvfp4.from_largest(seen)(x), inputs_of(x, "NVFP4", seen)
    largest = x.view(len(x), -1, 16).abs().amax(-1)
    kept = (largest / 6 * (448 * 6 / seen) >= 2.0**-9).repeat_interleave(16, 1)
    assert float(kept.float().mean()) > 0.97
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-6, atol=0)
    assert float(found.abs().max()) <= seen * (1 + 1e-6)


# A model


def smoothed_by_them(directory: Path, sequences: Any, alpha: float) -> tuple[Any, Any]:
    """A saved model before and after llm-compressor's SmoothQuant on these calibration tokens."""
    library = pytest.importorskip("llmcompressor", reason=REASON_MODEL)
    modifiers = pytest.importorskip(
        "llmcompressor.modifiers.transform.smoothquant", reason=REASON_MODEL
    )
    datasets = pytest.importorskip("datasets", reason=REASON_MODEL)
    from transformers import AutoModelForCausalLM

    from benchmarks.peer_llmcompressor import without_pinned_memory

    before, model = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2)
    )
    without_pinned_memory(torch)
    rows = [list(ids) for ids in sequences]
    library.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict(
            {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
        ),
        recipe=[modifiers.SmoothQuantModifier(smoothing_strength=alpha)],
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    return before, model


def lab_of(directory: Path, store: Path) -> Lab:
    return Lab(
        str(directory),
        tokenizer=character_tokenizer(),
        evaluation=documents(4, seed=1),
        calibration=documents(8, seed=2),
        window_length=48,
        calibration_length=32,
        threads=1,
        store=store,
    )


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant(alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers behind the same norms; scales that differ by its reading of |x|.

    It takes (max x - min x)^alpha / (2 max|W|)^(1 - alpha) where the paper has max|x| and max|W|:
    what differs for a channel is how far its range is from symmetric, and a constant.
    """
    monkeypatch.chdir(tmp_path)  # where it writes its logs
    directory = saved_tiny_model(tmp_path / "model")
    lab = lab_of(directory, tmp_path / "store")
    before, after = smoothed_by_them(directory, lab.calibration.sequences, alpha)
    ours = lab.candidate(f"smooth:alpha={alpha}+none").checkpoint.scales()
    known = lab.statistics(gram=False)
    changed = set()
    for site in all_linears(before):
        made = after.get_submodule(site.name).weight
        if torch.equal(made, site.weight()):
            continue
        changed.add(site.name)
        their_scale = (made / site.weight()).detach().median(0).values
        index = int(site.name.split(".")[2])
        seen = known(index)[site.name]
        span = seen.maximum - seen.minimum
        largest = torch.maximum(seen.maximum, -seen.minimum)
        ratio = span**alpha / 2 ** (1 - alpha) / largest**alpha
        torch.testing.assert_close(
            their_scale / ours[site.name]["column"], ratio, rtol=1e-4, atol=0
        )
        # A range is one to two times the largest magnitude.
        assert bool((ratio <= 2 ** (2 * alpha - 1) * 1.0001).all())
        assert bool((ratio >= 2 ** (alpha - 1) * 0.9999).all())
        norm = "input_layernorm" if "self_attn" in site.name else "post_attention_layernorm"
        old, new = (
            each.get_submodule(f"model.layers.{index}.{norm}").weight for each in (before, after)
        )
        torch.testing.assert_close(new * their_scale, old, rtol=1e-5, atol=0)
    assert changed == set(ours)


def test_smoothquant_rounds_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W8A8 of the model that llm-compressor has smoothed: the codes of `dynamic` on it."""
    monkeypatch.chdir(tmp_path)
    directory = saved_tiny_model(tmp_path / "model")
    lab = lab_of(directory, tmp_path / "store")
    _, after = smoothed_by_them(directory, lab.calibration.sequences, 0.5)
    library = pytest.importorskip("llmcompressor", reason=REASON_MODEL)
    quantization = pytest.importorskip("llmcompressor.modifiers.quantization")
    library.oneshot(
        model=after,
        recipe=[
            quantization.QuantizationModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"])
        ],
    )
    from benchmarks.peer_llmcompressor import weights_of

    rule = GridRule(8, symmetric=True, scale_dtype=torch.float32)
    rounded = weights_of(after, before=False)
    sites = all_linears(after)
    assert {f"{site.name}.weight" for site in sites} == set(rounded)
    for site in sites:
        expected = rounded[f"{site.name}.weight"]
        exact = round_to_nearest(site.weight(), rule, -1)
        assert torch.equal((exact.codes.float() - 128) * exact.grid.scale, expected)
        stored = Dynamic().quantize(site.weight(), None).weight.dequantize()
        errors = [float((each - site.weight()).norm()) for each in (stored, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)
