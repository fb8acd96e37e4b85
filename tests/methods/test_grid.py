"""Affine grids and rounding to nearest: closed forms, loops, reference numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.solvers.grid import GridRule, fake_quantize, grouped, round_to_nearest
from tests.methods.oracles import loop_fit
from tests.toy import digest, relative_output_error, toy_inputs, toy_weight

BITS = [2, 3, 4, 8]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_toy_problem_is_the_published_one() -> None:
    assert digest(toy_weight()).startswith("e7a677125a53b13b")
    assert digest(toy_inputs()).startswith("fe7cb33b96f0e4ee")


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size", "mse", "expected"),
    [
        (4, False, -1, False, 7.0880e-3),
        (4, True, -1, False, 7.2847e-3),
        (4, False, 128, False, 6.9371e-3),
        (4, False, 32, False, 5.2592e-3),
        (3, True, 64, False, 3.0132e-2),
        (2, False, 64, False, 1.2888e-1),
        (3, False, -1, True, 2.7540e-2),
    ],
)
def test_rounding_agrees_with_the_gptq_reference(
    bits: int, symmetric: bool, group_size: int, mse: bool, expected: float
) -> None:
    rule = GridRule(bits, symmetric, mse, scale_dtype=torch.float32)
    found = relative_output_error(toy_weight(), fake_quantize(toy_weight(), rule, group_size))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8, 32])
@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (3, 41), (1, 9), (4, 1)])
def test_codes_agree_with_a_loop_and_with_the_packed_bits(
    bits: int, symmetric: bool, group_size: int, rows: int, columns: int
) -> None:
    weight = normal(rows, columns)
    rule = GridRule(bits, symmetric)
    result = round_to_nearest(weight, rule, group_size)
    packed = result.pack()
    assert torch.equal(packed.codes(), result.codes)
    assert torch.equal(packed.dequantize(), fake_quantize(weight, rule, group_size))
    length = columns if group_size == -1 else group_size
    expected = torch.empty_like(weight)
    for start in range(0, columns, length):
        group = weight[:, start : start + length]
        scale, zero = loop_fit(bits, symmetric)(group)
        scale = scale.half().double()
        # The zero point counts in steps of the stored scale.
        if not symmetric:
            low = group.double().amin(1).clamp(max=0)
            zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
        codes = (torch.round(group.double() / scale[:, None]) + zero[:, None]).clamp(0, 2**bits - 1)
        expected[:, start : start + length] = (scale[:, None] * (codes - zero[:, None])).float()
    assert torch.allclose(packed.dequantize(), expected, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_goes_to_the_nearest_point_of_its_grid(bits: int, symmetric: bool) -> None:
    weight = normal(6, 48)
    packed = round_to_nearest(weight, GridRule(bits, symmetric), 16).pack()
    every = torch.arange(2**bits)
    for i in range(6):
        for g in range(3):
            zero = int(packed.zeros()[i, g])
            points = packed.scales[i, g].float() * (every - zero)
            group = weight[i, 16 * g : 16 * g + 16]
            distance = (group[:, None] - points).abs()
            found = (group - packed.dequantize()[i, 16 * g : 16 * g + 16]).abs()
            assert torch.allclose(found, distance.min(1).values, atol=1e-6)


@settings(deadline=None)
@given(power=st.integers(-4, 8), bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_powers_of_two_scale_the_scales_and_keep_the_codes(
    power: int, bits: int, symmetric: bool
) -> None:
    weight = normal(3, 40)
    rule = GridRule(bits, symmetric)
    one = round_to_nearest(weight, rule, 16)
    other = round_to_nearest(weight * 2.0**power, rule, 16)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.grid.scale.float() * 2.0**power, other.grid.scale.float())


def test_rows_are_independent() -> None:
    weight = normal(7, 40)
    shuffled = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    rule = GridRule(3, mse=True)
    assert torch.equal(
        fake_quantize(weight, rule, 16)[shuffled], fake_quantize(weight[shuffled], rule, 16)
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_rows(symmetric: bool, value: float) -> None:
    weight = torch.full((2, 20), value)
    found = fake_quantize(weight, GridRule(4, symmetric), 8)
    # A symmetric grid of an even number of points ends half a step short of its positive edge.
    worst = abs(value) / 15 if symmetric else abs(value) * 1e-3
    assert float((found - weight).abs().max()) <= worst * 1.01


def test_a_symmetric_group_of_positive_weights_does_not_saturate() -> None:
    weight = torch.linspace(0.1, 1.0, 16)[None]
    found = fake_quantize(weight, GridRule(4, symmetric=True), -1)
    assert float((found - weight).abs().max()) <= 1.01 / 15


@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-6, 1e4, 1e7, 1e30])
def test_any_size_of_weights_keeps_its_relative_precision(size: float, mse: bool) -> None:
    weight = normal(4, 32) * size
    packed = round_to_nearest(weight, GridRule(8, mse=mse), 16).pack()
    error = packed.dequantize() - weight
    assert bool(error.isfinite().all())
    if size > 1e-40:
        assert float(error.double().norm() / weight.double().norm()) < 0.01
    assert packed.scales.dtype == (torch.float16 if 1e-3 < size < 1e6 else torch.float32)


def test_scales_of_very_different_size_in_one_tensor() -> None:
    weight = normal(4, 32) * torch.tensor([1e-9, 1.0, 1e-3, 1e8])[:, None]
    error = fake_quantize(weight, GridRule(8), 16) - weight
    assert float((error.norm(dim=1) / weight.norm(dim=1)).max()) < 0.01


def test_the_range_search_agrees_with_a_loop() -> None:
    weight = normal(3, 24).double()
    rule = GridRule(2, mse=True, scale_dtype=torch.float64)
    found = fake_quantize(weight, rule, -1)
    for row, result in zip(weight, found, strict=True):
        low, high = min(float(row.min()), 0), max(float(row.max()), 0)
        best, least = row, math.inf
        for step in range(80):
            share = 1 - step / 100
            scale = share * (high - low) / 3
            zero = round(-share * low / scale)
            codes = (torch.round(row / scale) + zero).clamp(0, 3)
            error = float((scale * (codes - zero) - row).abs().pow(2.4).sum())
            if error < least:
                best, least = scale * (codes - zero), error
        assert torch.allclose(result, best)


def test_the_range_search_helps_where_one_weight_sticks_out() -> None:
    weight = normal(8, 64)
    weight[:, 0] = 6
    plain = fake_quantize(weight, GridRule(3), -1) - weight
    searched = fake_quantize(weight, GridRule(3, mse=True), -1) - weight
    assert float(searched.abs().pow(2.4).sum()) < 0.95 * float(plain.abs().pow(2.4).sum())


def test_padding_a_group_with_zeros_changes_nothing() -> None:
    weight = normal(3, 20)
    for rule in (GridRule(3), GridRule(3, symmetric=True), GridRule(3, mse=True)):
        alone = rule.fit(weight[:, None, 16:])
        padded = rule.fit(grouped(weight, 16))
        assert torch.equal(alone.scale[:, 0], padded.scale[:, 1])
        assert torch.equal(alone.zero[:, 0], padded.zero[:, 1])


def snr_db(weight: Tensor, found: Tensor) -> float:
    signal, noise = weight.double().square().sum(), (weight - found).double().square().sum()
    return 10 * math.log10(float(signal / noise))


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [(4, 32, 22.1), (4, 128, 20.0), (4, -1, 17.6), (3, 128, 13.4), (2, 128, 6.0)],
)
def test_snr_of_gaussian_weights_with_zero_points(
    bits: int, group_size: int, expected: float
) -> None:
    weight = normal(256, 2048)
    found = snr_db(weight, fake_quantize(weight, GridRule(bits), group_size))
    assert found == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [(8, 128, 43.8), (4, 32, 20.3), (4, 128, 18.6), (4, -1, 16.5), (3, 128, 11.2), (2, 128, 2.3)],
)
def test_snr_of_gaussian_weights_on_symmetric_grids(
    bits: int, group_size: int, expected: float
) -> None:
    """The expected values are of a grid that wastes its lowest code; ours may only be better.

    Its step is larger by (2**bits - 1) / (2**bits - 2), which is what it can cost at most.
    """
    weight = normal(256, 2048)
    found = snr_db(weight, fake_quantize(weight, GridRule(bits, symmetric=True), group_size))
    gain = 20 * math.log10((2**bits - 1) / (2**bits - 2))
    assert expected - 0.3 <= found <= expected + gain + 0.3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_grid_beats_rate_distortion(bits: int, group_size: int, symmetric: bool) -> None:
    """Gaussian weights cannot be coded below 4**-R at R bits each; catches bits not counted."""
    weight = normal(64, 1024)
    packed = round_to_nearest(weight, GridRule(bits, symmetric, mse=bits < 8), group_size).pack()
    error = float((packed.dequantize() - weight).double().square().mean())
    assert error > 4.0**-packed.bits_per_weight * float(weight.double().square().mean())
