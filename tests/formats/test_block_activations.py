"""Inputs in blocks of E2M1: by brute force over the 15 numbers, by definition, by properties."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import (
    ActivationQuantizer,
    PerBlockMxfp4,
    PerBlockNvfp4,
    load_activation,
)
from pytest_qlab.formats.e2m1 import ScaleRule, e8m0_values
from tests.formats.test_float4 import e4m3

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of E2M1, as the specification lists them; the position is the code."""
POINTS = np.array([*NUMBERS, *(-number for number in NUMBERS)])
E4M3 = np.array([e4m3(code) for code in range(127)])
RULES: tuple[ScaleRule, ...] = ("floor", "ceil", "even")
KINDS: dict[str, ActivationQuantizer] = {
    **{f"mxfp4-{rule}": PerBlockMxfp4(rule) for rule in RULES},
    "nvfp4-token": PerBlockNvfp4(),
    "nvfp4-calibrated": PerBlockNvfp4.from_largest(4.0),
}
each_kind = pytest.mark.parametrize("quantizer", KINDS.values(), ids=KINDS)
values = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)


@pytest.fixture
def inputs() -> Tensor:
    """Sequences of tokens of three sizes; blocks of 16 and 32 do not divide them."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1e-3, 1.0, 50.0]).view(3, 1)
    return sizes * torch.randn(2, 3, 72, generator=generator)


def power_of_two(largest: float, rule: ScaleRule) -> float:
    """By the rules' definitions."""
    if largest == 0:
        return 1.0
    if rule == "floor":
        return float(2.0 ** (math.floor(math.log2(largest)) - 2))
    if rule == "ceil":
        return float(2.0 ** math.ceil(math.log2(largest / 6)))
    scale = 2.0 ** (math.floor(math.log2(largest)) - 2)
    return 2 * scale if largest >= 7 * scale else scale


def nearest_e4m3(value: float) -> float:
    """Never 0; random values are never halfway."""
    return max(float(E4M3[np.abs(E4M3 - value).argmin()]), 2.0**-9)


def scale_of(block: NDArray[np.float64], token: NDArray[np.float64], kind: Any) -> float:
    """What a block's elements are multiplied by, by the formats' definitions."""
    largest = float(np.abs(block).max())
    if isinstance(kind, PerBlockMxfp4):
        return power_of_two(largest, kind.scale)
    above = kind.tensor_scale or float(np.abs(token).max()) / (6 * 448)
    return above * nearest_e4m3(largest / 6 / above)


@each_kind
def test_every_input_becomes_the_nearest_of_the_numbers_of_its_block(
    quantizer: ActivationQuantizer, inputs: Tensor
) -> None:
    size = 32 if isinstance(quantizer, PerBlockMxfp4) else 16
    found = quantizer(inputs)
    assert found.shape == inputs.shape
    for token, rounded in zip(inputs.view(-1, 72), found.view(-1, 72), strict=True):
        exact = token.double().numpy()
        for start in range(0, 72, size):
            block = exact[start : start + size]
            points = POINTS * scale_of(block, exact, quantizer)
            nearest = points[np.abs(points - block[:, None]).argmin(-1)]
            got = rounded[start : start + size].double().numpy()
            assert np.allclose(got, nearest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantizer", [PerBlockMxfp4(), PerBlockNvfp4(1.0)])
def test_halfway_between_two_numbers_the_even_code_is_taken(
    quantizer: PerBlockMxfp4 | PerBlockNvfp4,
) -> None:
    """Every eighth from -6 to 6, in blocks whose scale is 1 because they reach 6."""
    size = 32 if isinstance(quantizer, PerBlockMxfp4) else 16
    for step in range(-48, 49):
        x = torch.full((size,), step / 8)
        x[0] = 6.0
        distance = np.abs(POINTS - step / 8)
        near = [code for code in range(16) if distance[code] == distance.min()]
        expected = next((code for code in near if code % 2 == 0), near[0])
        assert set(quantizer(x)[1:].tolist()) == {float(POINTS[expected])}


@each_kind
def test_codes_and_scales_stand_for_what_is_returned(
    quantizer: PerBlockMxfp4 | PerBlockNvfp4, inputs: Tensor
) -> None:
    if isinstance(quantizer, PerBlockMxfp4):
        codes, exponents = quantizer.codes(inputs)
        scales, size = 2.0 ** (exponents.double().numpy() - 127), 32
        assert exponents.dtype == torch.uint8
    else:
        codes, stored, above = quantizer.codes(inputs)
        scales, size = stored.double().numpy() * above.double().numpy(), 16
        assert stored.dtype == torch.float8_e4m3fn
        assert above.shape == ((1,) if quantizer.tensor_scale else (2, 3, 1))
    assert (codes.dtype, codes.shape) == (torch.uint8, inputs.shape)
    assert scales.shape == (2, 3, -(-72 // size))
    expected = POINTS[codes.numpy()] * scales.repeat(size, -1)[..., :72]
    assert np.allclose(quantizer(inputs).double().numpy(), expected, rtol=2.0**-23, atol=0)


@settings(deadline=None, max_examples=60)
@given(token=st.lists(values, min_size=1, max_size=40), exponent=st.integers(-30, 30))
def test_a_power_of_two_comes_out_again(token: list[float], exponent: int) -> None:
    x, power = torch.tensor(token), 2.0**exponent
    for kind in (*(PerBlockMxfp4(rule) for rule in RULES), PerBlockNvfp4()):
        assert torch.equal(kind(x * power), kind(x) * power)
    one, other = PerBlockNvfp4(0.75), PerBlockNvfp4(0.75 * power)
    assert torch.equal(other(x * power), one(x) * power)


@settings(deadline=None, max_examples=60)
@given(token=st.lists(values, min_size=1, max_size=40))
def test_signs_are_kept_and_zeros_stay(token: list[float]) -> None:
    x = torch.tensor(token)
    for kind in KINDS.values():
        found = kind(x)
        assert torch.equal(kind(-x), -found)
        assert bool((found * x >= 0).all())
        assert not found[x == 0].any()
        assert torch.equal(found.signbit(), x.signbit())
        assert torch.equal(kind(torch.zeros(3, 40)), torch.zeros(3, 40))


@settings(deadline=None, max_examples=60)
@given(token=st.lists(values, min_size=1, max_size=40), largest=st.floats(1e-3, 1e3))
def test_what_calibration_has_not_seen_saturates(token: list[float], largest: float) -> None:
    x = torch.tensor(token)
    kind = PerBlockNvfp4.from_largest(largest)
    found = kind(x)
    assert kind.largest == pytest.approx(largest, rel=1e-6)
    assert float(found.abs().max()) <= largest * (1 + 1e-6)
    beyond = x.abs() >= largest
    expected = largest * x[beyond].sign()
    assert found[beyond].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert float(kind(torch.tensor([largest]))) == pytest.approx(largest, rel=1e-6)


def test_only_the_range_found_at_run_time_always_holds_the_largest_input() -> None:
    x = torch.tensor([[1.0, 100.0], [0.25, -0.5]])
    assert PerBlockNvfp4()(x)[:, 1].tolist() == pytest.approx([100.0, -0.5], rel=1e-6)
    assert PerBlockNvfp4.from_largest(2.0)(x)[:, 1].tolist() == pytest.approx([2.0, -0.5], rel=0.07)
    assert PerBlockNvfp4().largest is PerBlockMxfp4().largest is None


def test_floor_saturates_beyond_six_times_the_scale_and_the_others_do_not() -> None:
    x = torch.tensor([7.9, 1.0])
    assert [float(PerBlockMxfp4(rule)(x)[0]) for rule in RULES] == [6.0, 8.0, 8.0]


def test_a_block_far_below_the_calibrated_range_is_not_lost() -> None:
    """With E4M3's least number as its scale, some of the numbers are still within reach."""
    kind = PerBlockNvfp4(1.0)
    assert float(kind(torch.tensor([6 * 2.0**-11]))) == 1.5 * 2.0**-9


def test_tokens_are_rounded_by_themselves(inputs: Tensor) -> None:
    for kind in KINDS.values():
        whole = kind(inputs)
        for index in np.ndindex(2, 3):
            assert torch.equal(kind(inputs[index]), whole[index])
        assert kind(inputs[:0]).shape == (0, 3, 72)  # an expert that no token is sent to


def test_a_layer_whose_inputs_were_all_zero_gets_the_range_of_each_token() -> None:
    assert PerBlockNvfp4.from_largest(0.0).tensor_scale is None


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spoils_its_block_and_no_other_of_mxfp4(poison: float) -> None:
    x = torch.ones(2, 64)
    x[1, 40] = poison
    found = PerBlockMxfp4()(x)
    assert bool(found[1, 32:].isnan().all())
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[1, :32], x[1, :32])


def test_nan_spoils_its_block_of_nvfp4_and_its_token_where_the_range_is_the_tokens() -> None:
    x = torch.ones(2, 64)
    x[1, 40] = math.nan
    calibrated, token = PerBlockNvfp4.from_largest(1.0)(x), PerBlockNvfp4()(x)
    assert bool(calibrated[1, 32:48].isnan().all())
    assert bool(calibrated[1, :32].isfinite().all())
    assert bool(token[1].isnan().all())
    assert bool(token[0].isfinite().all())


def test_a_scale_that_is_no_number_is_none() -> None:
    found = e8m0_values(torch.tensor([0, 254, 255], dtype=torch.uint8))
    assert found[:2].double().tolist() == [2.0**-127, 2.0**127]
    assert math.isnan(float(found[2]))


@each_kind
def test_saved_and_loaded_they_give_the_same_bits(
    quantizer: ActivationQuantizer, inputs: Tensor
) -> None:
    metadata = json.loads(json.dumps(quantizer.metadata()))
    again = load_activation(metadata, quantizer.tensors())
    assert type(again) is type(quantizer)
    assert again.bits == 4
    assert torch.equal(again(inputs), quantizer(inputs))


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "per-block-mxfp4", "bits": 4},
        {"format": "per-block-mxfp4", "bits": 4, "scale": "round"},
        {"format": "per-block-nvfp4", "bits": 4},
        {"format": "per-block-nvfp4", "bits": 4, "calibrated": True},
    ],
)
def test_incomplete_ones_are_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(CorruptEntryError, match=metadata["format"]):
        load_activation(metadata, {})


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_is_kept_and_nothing_is_rounded_twice(
    quantizer: ActivationQuantizer, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = quantizer(x)
    assert found.dtype == dtype
    # The scales of NVFP4 are products, which float16 and bfloat16 round.
    assert torch.allclose(quantizer(found), found, rtol=4 * torch.finfo(dtype).eps, atol=0)
