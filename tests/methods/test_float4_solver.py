"""MXFP4 and NVFP4: rounding by exhaustion, scales by brute force, published-formula vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.formats import MicroscaledFloat4
from pytest_qlab.formats.e2m1 import ScaleRule, e2m1_codes
from pytest_qlab.methods.ggml import Ggml
from pytest_qlab.solvers.codebook import round_nearest
from pytest_qlab.solvers.float4 import Mxfp4, Nvfp4
from tests.formats.test_float4 import e2m1, e4m3
from tests.toy import toy_weight

POINTS = np.array([e2m1(code) for code in range(16)])
SCALES = np.array([e4m3(code) for code in range(127)])
weights = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)


def packed(weight: Tensor, codebook: Mxfp4 | Nvfp4) -> MicroscaledFloat4:
    found = round_nearest(weight, codebook)
    assert isinstance(found, MicroscaledFloat4)
    return found


def relative_error(weight: Tensor, codebook: Mxfp4 | Nvfp4) -> float:
    return float((packed(weight, codebook).dequantize() - weight).norm() / weight.norm())


def least_error(block: NDArray[np.float64], scale: float) -> float:
    """Sum of squares when each weight becomes the nearest of the 16 points times the scale.

    Products are rounded to float32, as a format's are.
    """
    with np.errstate(over="ignore"):
        points = (POINTS.astype(np.float32) * np.float32(scale)).astype(np.float64)
    return float(np.square(block[:, None] - points).min(1).sum())


def nearest_scale(value: float) -> float:
    """In E4M3, the even code of two as near; never below the smallest one that is not 0."""
    distance = np.abs(SCALES - value)
    near = np.flatnonzero(distance == distance.min())
    return max(float(SCALES[min(near, key=lambda code: code % 2)]), 2.0**-9)


def test_rounding_by_exhaustion() -> None:
    """Every 64th between -8 and 8, so every tie as well: the even code of two as near."""
    for step in range(-512, 513):
        value = step / 64
        near = np.abs(POINTS - value).min()
        expected = {c for c in range(16) if abs(POINTS[c] - value) == near and c % 2 == 0}
        expected = expected or {c for c in range(16) if abs(POINTS[c] - value) == near}
        (code,) = e2m1_codes(torch.tensor([value])).tolist()
        assert code in expected, value
        assert code >> 3 == (value < 0), value


def test_points_round_to_themselves_and_zero_keeps_its_sign() -> None:
    codes = torch.arange(16)
    assert e2m1_codes(torch.tensor(POINTS, dtype=torch.float32)).tolist() == codes.tolist()
    assert e2m1_codes(torch.tensor([-1e-9, 1e-9, 1e9, -1e9])).tolist() == [8, 0, 7, 15]


@settings(max_examples=200, deadline=None)
@given(block=st.lists(weights, min_size=1, max_size=32))
def test_shared_exponents_by_their_definition(block: list[float]) -> None:
    weight = torch.tensor([block])
    largest = float(weight.abs().max())
    rules: tuple[ScaleRule, ...] = ("floor", "ceil", "even")
    for rule in rules:
        (exponent,) = Mxfp4(rule).fit(weight).scales.flatten().tolist()
        if largest == 0:
            assert exponent == 0
        elif rule == "floor":
            assert 2.0 ** (exponent - 127) <= largest / 4 < 2.0 ** (exponent - 126)
        elif rule == "even":
            assert 3.5 * 2.0 ** (exponent - 127) <= largest < 7 * 2.0 ** (exponent - 127)
        else:
            assert 6 * 2.0 ** (exponent - 127) >= largest > 3 * 2.0 ** (exponent - 127)


@settings(max_examples=50, deadline=None)
@given(block=st.lists(weights, min_size=1, max_size=32))
@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
def test_codes_are_the_best_for_their_exponent_and_no_exponent_beats_brute_force(
    rule: ScaleRule, block: list[float]
) -> None:
    weight = torch.tensor([block])
    exact = np.array(weight[0].tolist())
    found = packed(weight, Mxfp4(rule))
    error = float(np.square(exact - np.array(found.dequantize()[0].tolist())).sum())
    errors = [least_error(exact, 2.0 ** (e - 127)) for e in range(255)]
    assert error == pytest.approx(errors[int(found.scales[0, 0])], rel=1e-9, abs=1e-60)
    assert min(errors) <= error * (1 + 1e-9)
    if max(abs(exact)) > 0:  # the best exponent is never above that of `ceil`
        assert int(np.argmin(errors)) <= int(Mxfp4("ceil").fit(weight).scales[0, 0])


@settings(max_examples=60, deadline=None)
@given(blocks=st.lists(st.lists(weights, min_size=16, max_size=16), min_size=1, max_size=4))
@pytest.mark.parametrize("four_over_six", [False, True])
def test_nvfp4_by_its_definition(four_over_six: bool, blocks: list[list[float]]) -> None:
    weight = torch.tensor([[value for block in blocks for value in block]])
    exact = np.array(weight[0].tolist())
    found = packed(weight, Nvfp4(four_over_six))
    assert found.tensor_scale is not None
    tensor_scale = float(found.tensor_scale)
    top = 256 if four_over_six else 448
    assert tensor_scale == pytest.approx(np.abs(exact).max() / (6 * top), rel=1e-6, abs=2e-38)
    for number, values in enumerate(exact.reshape(-1, 16)):
        stored = float(found.scales[0, number].float())
        wanted = np.abs(values).max() / 6 / tensor_scale
        candidates = [nearest_scale(wanted)]
        if four_over_six:
            candidates.append(nearest_scale(1.5 * wanted))
        # The division is rounded, so that a value halfway between two scales can go either way.
        assert any(stored == pytest.approx(each, rel=0.13, abs=2.0**-9) for each in candidates)
        errors = [least_error(values, each * tensor_scale) for each in SCALES]
        got = np.array(found.dequantize()[0, 16 * number : 16 * number + 16].tolist())
        error = float(np.square(values - got).sum())
        own = errors[SCALES.tolist().index(stored)]
        # Near the middle of two points, the rounded quotient may go the other way.
        nothing = 1e-13 * float(np.square(values).max())
        assert error == pytest.approx(own, rel=1e-5, abs=nothing)
        assert min(errors) <= error * (1 + 1e-5) + nothing


def test_every_block_takes_the_better_of_four_and_six() -> None:
    weight = toy_weight()
    chosen, plain = packed(weight, Nvfp4(True)), Nvfp4(True).fit(weight)
    assert chosen.tensor_scale is not None
    unit = float(chosen.tensor_scale)
    fours = 0
    for i in range(16):
        for number in range(16):
            values = np.array(weight[i, 16 * number : 16 * number + 16].tolist())
            wanted = np.abs(values).max() / 6 / unit
            six, four = nearest_scale(wanted), nearest_scale(1.5 * wanted)
            better = least_error(values, four * unit) < least_error(values, six * unit)
            assert float(chosen.scales[i, number].float()) == (four if better else six)
            fours += better
    assert fours / 256 == pytest.approx(0.508, abs=0.001)
    assert torch.equal(plain.block_scales, chosen.block_scales())


@pytest.mark.parametrize(
    ("codebook", "expected"),
    [
        (Nvfp4(), 0.096454),
        (Nvfp4(four_over_six=True), 0.083359),
        (Mxfp4("floor"), 0.140989),
        (Mxfp4("ceil"), 0.109234),
        (Mxfp4("even"), 0.106704),
    ],
)
def test_vectors(codebook: Mxfp4 | Nvfp4, expected: float) -> None:
    """From an implementation of the formulas in numpy; `even` from compressed-tensors 0.19."""
    assert relative_error(toy_weight(), codebook) == pytest.approx(expected, abs=1e-6)


def test_llama_cpps_mxfp4_has_the_same_values_where_nothing_is_halfway() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    theirs = Ggml(type="MXFP4").quantize(weight, None).weight
    ours = packed(weight, Mxfp4("floor"))
    assert torch.equal(ours.dequantize(), theirs.dequantize())
    assert ours.nbytes == theirs.nbytes
    halfway = torch.tensor([[6.0, 0.75, 2.5, 3.5, *[0.0] * 28]])
    assert packed(halfway, Mxfp4("floor")).dequantize()[0, :4].tolist() == [6, 1, 2, 4]
    found = Ggml(type="MXFP4").quantize(halfway, None).weight.dequantize()
    assert found[0, :4].tolist() == [6, 0.5, 2, 3]


@pytest.mark.parametrize("codebook", [Mxfp4("floor"), Mxfp4("ceil"), Mxfp4("even"), Nvfp4()])
def test_what_is_on_the_grid_stays(codebook: Mxfp4 | Nvfp4) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 128), generator=generator)
    codes[:, ::16] = 7  # so that every block reaches 6
    weight = torch.tensor(POINTS, dtype=torch.float32)[codes]
    if isinstance(codebook, Mxfp4):
        weight *= 2.0 ** torch.randint(-20, 20, (8, 4), generator=generator).repeat_interleave(
            32, 1
        )
    assert torch.equal(packed(weight, codebook).dequantize(), weight)


@pytest.mark.parametrize("codebook", [Mxfp4("floor"), Mxfp4("ceil"), Nvfp4(), Nvfp4(True)])
def test_a_power_of_two_changes_scales_only(codebook: Mxfp4 | Nvfp4) -> None:
    weight = toy_weight()
    one, other = packed(weight, codebook), packed(weight * 2.0**40, codebook)
    assert torch.equal(one.codes(), other.codes())
    assert torch.equal(one.block_scales() * 2.0**40, other.block_scales())


def test_floor_saturates_and_ceil_does_not() -> None:
    weight = torch.tensor([[7.9, 1.0, 0.5]])
    assert packed(weight, Mxfp4("floor")).dequantize()[0, 0] == 6
    assert packed(weight, Mxfp4("ceil")).dequantize()[0, 0] == 8
    assert packed(weight, Mxfp4("even")).dequantize()[0, 0] == 8
    below, at = (torch.tensor([[value, 1.0]]) for value in (6.9999, 7.0))
    assert packed(below, Mxfp4("even")).dequantize()[0].tolist() == [6, 1]
    assert packed(at, Mxfp4("even")).dequantize()[0].tolist() == [8, 1]
    assert math.isclose(float(packed(weight, Nvfp4()).dequantize()[0, 0]), 7.9, rel_tol=1e-6)


def test_a_block_far_below_the_tensors_largest_weight_is_not_lost() -> None:
    """Its scale would be rounded to 0 in E4M3; with the smallest there is, points remain."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 6 * 448.0, 6 * 2.0**-11
    assert packed(weight, Nvfp4()).dequantize()[0, 16] == 1.5 * 2.0**-9
