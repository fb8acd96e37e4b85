"""`mxfp4` and `nvfp4` with their inputs rounded, too: options, calibration, a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_qlab import Lab
from pytest_qlab.errors import MethodError, SpecError
from pytest_qlab.formats import PerBlockMxfp4, PerBlockNvfp4
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.methods.microscaled import Mxfp4, Nvfp4
from pytest_qlab.specs import parse_specs
from tests.lab.tiny import tiny_lab
from tests.methods.test_methods import layer, unreached

RULES: tuple[Any, ...] = ("floor", "ceil", "even")


@pytest.mark.parametrize("rule", RULES)
def test_inputs_of_mxfp4_follow_the_rule_of_its_weights(rule: Any) -> None:
    weight, _ = layer()
    both, alone = (
        Mxfp4(scale=rule, activations=each).quantize(weight, None) for each in (True, False)
    )
    assert alone.activation is None
    assert isinstance(both.activation, PerBlockMxfp4)
    assert torch.equal(both.weight.dequantize(), alone.weight.dequantize())
    # Blocks of weights and of inputs are rounded alike.
    assert torch.equal(both.activation(weight), both.weight.dequantize())
    assert Mxfp4(activations=True).stream == "none"


def test_inputs_of_nvfp4_get_the_range_of_calibration() -> None:
    weight, statistics = layer()
    method = Nvfp4(activations=True)
    assert method.wanted_statistics == frozenset({"channels"})
    assert method.stream == "original"
    both, alone = method.quantize(weight, statistics), Nvfp4().quantize(weight, None)
    assert alone.activation is None
    assert torch.equal(both.weight.dequantize(), alone.weight.dequantize())
    assert isinstance(both.activation, PerBlockNvfp4)
    seen = max(abs(float(statistics.minimum.min())), abs(float(statistics.maximum.max())))
    assert both.activation.largest == pytest.approx(seen, rel=1e-6)
    assert float(both.activation(torch.tensor([3 * seen]))) == pytest.approx(seen, rel=1e-6)


def test_nvfp4_rounds_its_own_weights_as_inputs_of_that_range() -> None:
    weight, _ = layer()
    inputs = PerBlockNvfp4.from_largest(float(weight.abs().max()))
    assert torch.equal(inputs(weight), Nvfp4().quantize(weight, None).weight.dequantize())


def test_a_layer_that_no_token_reached_has_the_range_of_each_token() -> None:
    weight, _ = layer()
    found = Nvfp4(activations=True).quantize(weight, unreached(64)).activation
    assert isinstance(found, PerBlockNvfp4)
    assert found.tensor_scale is None


def test_nvfp4_without_the_inputs_range_says_what_is_missing() -> None:
    weight, _ = layer()
    with pytest.raises(MethodError, match=r"'nvfp4' needs the range of the inputs of block\.up"):
        Nvfp4(activations=True).quantize(weight, None, name="block.up")


def test_ids() -> None:
    specs = parse_specs(
        ["nvfp4:activations=true,nvfp4:activations:four_over_six,mxfp4:activations"]
    )
    expected = ["nvfp4-activations", "nvfp4-activations-four_over_six", "mxfp4-activations"]
    assert [spec.id for spec in specs] == expected


def largest_inputs(lab: Lab) -> dict[str, float]:
    """The largest magnitude that each linear layer of the blocks reads in calibration."""
    found: dict[str, float] = {}
    model = lab.base_model

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), float(given[0].abs().max()))

        return hook

    handles = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    ]
    with torch.inference_mode():
        for ids in lab.calibration.sequences:
            model(torch.as_tensor(ids).view(1, -1))
    for handle in handles:
        handle.remove()
    return found


def test_every_layer_of_a_model_keeps_the_range_it_saw_and_is_read_again(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    expected = largest_inputs(lab)
    for spec, kind in (("nvfp4:activations", PerBlockNvfp4), ("mxfp4:activations", PerBlockMxfp4)):
        for each in (lab, tiny_lab(tmp_path)):
            candidate = each.candidate(spec)
            rounds = {
                name: module.activation
                for name, module in candidate.model.named_modules()
                if isinstance(module, PackedLinear)
            }
            assert rounds.keys() == expected.keys()
            assert all(type(activation) is kind for activation in rounds.values())
            for name, activation in rounds.items():
                if isinstance(activation, PerBlockNvfp4):
                    assert activation.largest == pytest.approx(expected[name], rel=1e-5)
        assert 0 < float(lab.candidate(spec).kl.mean) < 1


def test_rounded_inputs_cost_more_than_weights_alone_and_a_few_bytes(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    for name, more in (("mxfp4", 0), ("nvfp4", 4)):
        alone, both = (lab.candidate(f"{name}{option}") for option in ("", ":activations"))
        assert 0 < float(alone.kl.mean) < float(both.kl.mean)
        layers = len(both.checkpoint.layers())
        sizes = [sum(layer_bytes(each).values()) for each in (alone, both)]
        assert sizes[1] - sizes[0] == more * layers


def layer_bytes(candidate: Any) -> dict[str, int]:
    """Bytes of the buffers of every packed layer: codes, scales, and those of inputs."""
    return {
        name: sum(buffer.nbytes for buffer in module.buffers())
        for name, module in candidate.model.named_modules()
        if isinstance(module, PackedLinear)
    }


def test_without_a_gpu_it_is_simulated_and_says_what_would_be_needed(tmp_path: Path) -> None:
    kernels = tiny_lab(tmp_path).candidate("nvfp4:activations").kernels
    assert str(kernels) == "dequantize-matmul 14"
    assert kernels.wanted == ("W4A4 matmul on microscaled-float4",)


def test_mxfp4_follows_a_rotation_and_nvfp4_says_why_it_cannot(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    assert 0 < float(lab.candidate("quarot+mxfp4:activations").kl.mean) < 1
    with pytest.raises(SpecError, match="calibrates on the original model's inputs"):
        lab.candidate("quarot+nvfp4:activations")
