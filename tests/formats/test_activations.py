"""Activation quantizers against plain loops, and on inputs that invite mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import (
    PerTensorAffine,
    PerTokenFloat8,
    PerTokenSymmetric,
    load_activation,
)
from tests.formats.test_float8 import e4m3, nearest


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("bits", [4, 8])
def test_per_token_rounds_each_token_on_its_own_grid(inputs: Tensor, bits: int) -> None:
    result = PerTokenSymmetric(bits)(inputs)
    for token, found in zip(inputs.view(-1, 24), result.view(-1, 24), strict=True):
        step = max(abs(float(value)) for value in token) / (2 ** (bits - 1) - 1)
        expected = [step * round(float(value) / step) for value in token]
        assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_float8_rounds_each_token_to_the_nearest_number_of_its_own_scale(inputs: Tensor) -> None:
    result = PerTokenFloat8()(inputs)
    codes, scales = PerTokenFloat8().codes(inputs)
    assert scales.shape == (2, 5, 1)
    assert torch.equal(codes.float() * scales, result)
    for token, found in zip(inputs.view(-1, 24), result.view(-1, 24), strict=True):
        scale = max(abs(float(value)) for value in token) / 448
        expected = [scale * e4m3(nearest(float(value) / scale)) for value in token]
        assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_per_tensor_rounds_all_on_one_grid_that_contains_zero(inputs: Tensor, bits: int) -> None:
    low, high = float(inputs.min()), float(inputs.max())
    result = PerTensorAffine.from_range(low, high, bits)(inputs)
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    for value, found in zip(inputs.flatten().tolist(), result.flatten().tolist(), strict=True):
        code = min(max(round(value / step) + zero, 0), 2**bits - 1)
        assert found == pytest.approx(step * (code - zero), rel=1e-5, abs=1e-6)
    assert len(set(result.flatten().tolist())) <= 2**bits
    assert float(PerTensorAffine.from_range(low, high, bits)(torch.zeros(1))) == 0.0


def test_values_outside_the_range_saturate() -> None:
    quantizer = PerTensorAffine.from_range(-1.0, 3.0, 8)
    found = quantizer(torch.tensor([-50.0, 50.0]))
    assert found.tolist() == pytest.approx([-1.0, 3.0], abs=4 / 255)


@pytest.mark.parametrize(("low", "high"), [(2.0, 6.0), (-6.0, -2.0), (0.0, 0.0)])
def test_a_range_beside_zero_is_widened_to_it(low: float, high: float) -> None:
    quantizer = PerTensorAffine.from_range(low, high, 4)
    assert float(quantizer(torch.zeros(1))) == 0.0
    assert quantizer(torch.tensor([low, high])).tolist() == pytest.approx([low, high], abs=0.21)


def test_a_token_of_zeros_stays_zero() -> None:
    x = torch.zeros(3, 8)
    x[1] = 1.0
    for quantizer in (PerTokenSymmetric(8), PerTokenFloat8()):
        assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiny_and_huge_tokens_keep_their_relative_precision(size: float, bits: int) -> None:
    x = torch.tensor([[1.0, -0.5, 0.25]]) * size
    step = size / (2 ** (bits - 1) - 1)
    assert float((PerTokenSymmetric(bits)(x) - x).abs().max()) <= 0.51 * step
    assert torch.allclose(PerTokenFloat8()(x), x, rtol=2.0**-4, atol=0)


def test_the_smallest_numbers_do_not_become_nan() -> None:
    for quantizer in (PerTokenSymmetric(8), PerTokenFloat8()):
        assert bool(quantizer(torch.full((1, 4), 1e-45)).isfinite().all())
    assert bool(PerTensorAffine.from_range(-1e-45, 1e-45, 8)(torch.zeros(1)).isfinite().all())


def test_nan_is_passed_on_rather_than_hidden() -> None:
    x = torch.tensor([[1.0, math.nan]])
    assert bool(PerTokenSymmetric(8)(x).isnan().all())
    assert bool(PerTokenFloat8()(x).isnan().all())
    assert bool(PerTensorAffine.from_range(-1, 1, 8)(x).isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_is_kept(inputs: Tensor, dtype: torch.dtype) -> None:
    for quantizer in (
        PerTokenSymmetric(8),
        PerTokenFloat8(),
        PerTensorAffine.from_range(-9, 9, 8),
    ):
        assert quantizer(inputs.to(dtype)).dtype == dtype


def test_quantizing_twice_changes_nothing(inputs: Tensor) -> None:
    for quantizer in (
        PerTokenSymmetric(8),
        PerTokenFloat8(),
        PerTensorAffine.from_range(-9, 9, 4),
    ):
        once = quantizer(inputs)
        assert torch.allclose(quantizer(once), once, rtol=1e-6)


def test_saved_and_loaded_they_give_the_same_bits(inputs: Tensor) -> None:
    for quantizer in (
        PerTokenSymmetric(4),
        PerTokenFloat8(),
        PerTensorAffine.from_range(-7.3, 9.1, 8),
    ):
        again = load_activation(quantizer.metadata(), quantizer.tensors())
        assert torch.equal(again(inputs), quantizer(inputs))


def test_unknown_or_incomplete_ones_are_refused() -> None:
    with pytest.raises(CorruptEntryError, match="'novel'"):
        load_activation({"format": "novel", "bits": 8}, {})
    with pytest.raises(CorruptEntryError, match="per-tensor-affine"):
        load_activation({"format": "per-tensor-affine", "bits": 8}, {"scale": torch.ones(1)})
