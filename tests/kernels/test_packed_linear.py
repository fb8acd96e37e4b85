"""The packed linear layer against an ordinary one with the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pytest_qlab.formats import ActivationQuantizer, PerTensorAffine, PerTokenSymmetric, PlainWeight
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.solvers.grid import GridRule, round_to_nearest


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "activation", [None, PerTokenSymmetric(8), PerTensorAffine.from_range(-4, 4, 8)]
)
def test_it_computes_with_the_dequantized_weight(
    weight: Tensor,
    inputs: Tensor,
    dtype: torch.dtype,
    with_bias: bool,
    activation: ActivationQuantizer | None,
) -> None:
    packed = round_to_nearest(weight, GridRule(4), 16).pack()
    bias = torch.arange(6).to(dtype) if with_bias else None
    module = PackedLinear(packed, bias, activation, dtype)
    x = inputs.to(dtype)
    rounded = x if activation is None else activation(x)
    expected = nn.functional.linear(rounded, packed.dequantize().to(dtype), bias)
    assert torch.equal(module(x), expected)
    assert (module.in_features, module.out_features) == (40, 6)


def test_its_buffers_are_the_packed_bytes_and_the_cache_is_none(
    weight: Tensor, inputs: Tensor
) -> None:
    packed = round_to_nearest(weight, GridRule(3), 16).pack()
    module = PackedLinear(packed, None, PerTensorAffine.from_range(-4, 4, 8), torch.float32)

    def resident() -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())

    assert resident() == packed.nbytes + 8
    before = module(inputs)
    set_materialized(nn.Sequential(module), True)
    assert module.weight is module.weight
    assert resident() == packed.nbytes + 8
    assert torch.equal(module(inputs), before)
    set_materialized(nn.Sequential(module), False)
    assert module.weight is not module.weight
    assert not list(module.parameters())


def test_it_follows_a_copy_and_a_state_dict(weight: Tensor, inputs: Tensor) -> None:
    packed = round_to_nearest(weight, GridRule(4), 16).pack()
    module = PackedLinear(packed, None, None, torch.float32)
    twin = copy.deepcopy(module)
    other = round_to_nearest(-weight, GridRule(4), 16).pack()
    twin.load_state_dict(PackedLinear(other, None, None, torch.float32).state_dict())
    assert torch.equal(twin(inputs), inputs @ other.dequantize().T)
    assert torch.equal(module(inputs), inputs @ packed.dequantize().T)
    assert torch.equal(module.packed.dequantize(), packed.dequantize())


def test_a_plain_weight_is_no_simulation(weight: Tensor, inputs: Tensor) -> None:
    plain = PackedLinear(PlainWeight(weight), None, None, torch.float32)
    assert torch.equal(plain(inputs), nn.functional.linear(inputs, weight))
    assert not plain.simulated
    assert plain.kernel == plain.wanted_kernel == "torch.nn.functional.linear"


def test_dequantizing_is_called_a_simulation_and_names_the_kernel(weight: Tensor) -> None:
    packed = round_to_nearest(weight, GridRule(8, symmetric=True), -1).pack()
    weights = PackedLinear(packed, None, None, torch.float32)
    both = PackedLinear(packed, None, PerTokenSymmetric(4), torch.float32)
    assert weights.simulated
    assert weights.kernel == both.kernel == "dequantize-matmul"
    assert weights.wanted_kernel.startswith("W8 ")
    assert both.wanted_kernel.startswith("W8A4 ")
    rounded_inputs = PackedLinear(PlainWeight(weight), None, PerTokenSymmetric(8), torch.float32)
    assert rounded_inputs.simulated
