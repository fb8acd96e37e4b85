"""`fp8` against a search over all codes, its error bound, torchao, and on weights that are hard."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from pytest_qlab.errors import MethodError
from pytest_qlab.formats import PerTokenFloat8, ScaledFloat8
from pytest_qlab.methods.fp8 import Fp8
from pytest_qlab.solvers.codebook import round_nearest
from pytest_qlab.solvers.codebooks import Float8
from pytest_qlab.specs import parse_specs
from tests.formats.test_float8 import VALUES, e4m3, from_bits
from tests.lab.tiny import tiny_lab
from tests.methods.test_methods import layer, unreached
from tests.toy import toy_weight


def packed(weight: Tensor) -> ScaledFloat8:
    found = Fp8().quantize(weight, None).weight
    assert isinstance(found, ScaledFloat8)
    return found


def code_bits(weight: ScaledFloat8) -> Tensor:
    return weight.codes.view(torch.uint8)


def searched(weight: Tensor) -> NDArray[np.float64]:
    """Each row over max|w| / 448, and of all numbers the nearest to each quotient, in float64."""
    exact = weight.double().numpy()
    scales = np.abs(exact).max(1, keepdims=True) / 448
    scales[scales == 0] = 1
    every = np.concatenate([-VALUES, VALUES])
    chosen = np.abs(every - (exact / scales)[..., None]).argmin(-1)
    found: NDArray[np.float64] = every[chosen] * scales
    return found


@pytest.mark.parametrize("shape", [(24, 64), (3, 41), (3, 7), (1, 9), (5, 1), (1, 1)])
def test_every_weight_becomes_the_nearest_number(shape: tuple[int, int]) -> None:
    weight, _ = layer(*shape)
    before = weight.clone()
    found = packed(weight)
    assert found.shape == shape
    assert np.allclose(found.dequantize().double().numpy(), searched(weight), rtol=1e-6, atol=0)
    assert torch.equal(weight, before)


def test_the_toy_weight() -> None:
    weight = toy_weight()
    found = packed(weight)
    assert np.allclose(found.dequantize().double().numpy(), searched(weight), rtol=1e-6, atol=0)
    assert found.nbytes == weight.numel() + 4 * len(weight)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=3,
    )
)
def test_no_weight_is_further_off_than_half_a_step(rows: list[list[float]]) -> None:
    """Half a step is 2**-4 of a number, or 2**-10 of the scale where E4M3 is subnormal."""
    weight = torch.tensor(rows)
    found = packed(weight)
    scales = found.scales.double()
    sizes = weight.double().abs()
    half = torch.maximum(sizes * 2.0**-4, scales * 2.0**-10)
    off = (found.dequantize().double() - weight.double()).abs()
    # Of float32: the scale, the quotient and the product are each rounded once, and may be tiny.
    assert (off <= half + 3 * 2.0**-24 * sizes + 2.0**-149).all()


@pytest.mark.parametrize("exponent", [-90, -20, 1, 90])
def test_a_power_of_two_changes_the_scales_only(exponent: int) -> None:
    weight, _ = layer()
    one, other = packed(weight), packed(weight * 2.0**exponent)
    assert torch.equal(code_bits(one), code_bits(other))
    assert torch.equal(one.scales * 2.0**exponent, other.scales)


@pytest.mark.parametrize(("scale", "more"), [(1e-38, 0.1), (1e-30, 0), (1e30, 0), (9e35, 0)])
def test_extreme_weights_are_as_good_as_others(scale: float, more: float) -> None:
    """Or nearly, where float32 itself ends."""
    weight, _ = layer()
    weight /= weight.abs().max()
    extreme = weight * scale
    found = packed(extreme).dequantize()
    off = float((found.double() - extreme.double()).norm() / extreme.double().norm())
    usual = float((packed(weight).dequantize() - weight).norm() / weight.norm())
    assert off == pytest.approx(usual, rel=1e-3 + more)


def test_rows_of_zeros_constant_rows_and_the_smallest_numbers() -> None:
    weight, _ = layer(6, 32)
    weight[1], weight[2], weight[3], weight[4] = 0, 0.3, -7.0, 1e-45
    found = packed(weight).dequantize()
    assert not found[1].any()
    assert torch.allclose(found[2:4], weight[2:4], rtol=2.0**-23, atol=0)
    # Nothing of them is left, and nothing of them is NaN.
    assert torch.equal(found[4], torch.zeros(32))


def test_scales_are_of_rows() -> None:
    weight, _ = layer()
    scaled = weight * torch.arange(1, 25).unsqueeze(1)
    expected = packed(weight).dequantize() * torch.arange(1, 25).unsqueeze(1)
    step = 2.0**-4 * scaled.abs()
    assert (packed(scaled).dequantize() - expected).abs().le(2 * step).all()
    largest = scaled.abs().argmax(1)
    found = packed(scaled)
    assert code_bits(found)[torch.arange(24), largest].bitwise_and(127).eq(0x7E).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(poison: float) -> None:
    weight, _ = layer()
    weight[3, 5] = poison
    with pytest.raises(MethodError, match=r"layers\.7\.up_proj contains NaN"):
        Fp8().quantize(weight, None, name="layers.7.up_proj")


def test_inputs_are_rounded_unless_only_weights_are_wanted() -> None:
    weight, statistics = layer()
    both, weights = (Fp8(activations=each).quantize(weight, None) for each in (True, False))
    assert isinstance(both.activation, PerTokenFloat8)
    assert weights.activation is None
    assert torch.equal(both.weight.dequantize(), weights.weight.dequantize())
    assert (Fp8().stream, Fp8().needs) == ("none", frozenset())
    for known in (statistics, unreached(64)):
        again = Fp8().quantize(weight, known).weight
        assert torch.equal(again.dequantize(), both.weight.dequantize())


def test_ids_and_options() -> None:
    specs = parse_specs(["fp8,fp8:activations=false"])
    assert [spec.id for spec in specs] == ["fp8", "fp8-no_activations"]
    wrong: Any = {"bits": 8}
    with pytest.raises(ValidationError, match="bits"):
        Fp8(**wrong)


def test_reading_options_imports_no_torch() -> None:
    code = "import sys, pytest_qlab.methods.fp8; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_get_the_same_bits() -> None:
    weights = [layer(16, 96, seed)[0] for seed in range(8)]
    alone = [packed(weight) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(packed, weights), strict=True):
            assert torch.equal(code_bits(one), code_bits(other))
            assert torch.equal(one.scales, other.scales)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_its_points_serve_any_solver(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    """Any columns in any order, values beyond the range; codes decode as they are packed."""
    weight, _ = layer(rows, columns, seed)
    points = Float8().fit(weight)
    order = data.draw(st.permutations(range(columns)))
    chosen = torch.tensor(order[: data.draw(st.integers(1, columns))])
    values = 3 * layer(rows, len(chosen), seed + 1)[0]
    found = points.decode(points.nearest(values, chosen), chosen)
    every = np.concatenate([-VALUES, VALUES]) * points.scales.double().numpy()[..., None]
    off = np.abs(values.double().numpy()[..., None] - every)
    least = off.min(-1)
    assert np.allclose(np.abs(found.double().numpy() - values.double().numpy()), least, atol=1e-5)
    codes = torch.randint(0, 127, (rows, columns), generator=torch.Generator().manual_seed(seed))
    whole = points.pack(codes.to(torch.uint8)).dequantize()
    assert torch.equal(whole, points.decode(codes.to(torch.uint8), torch.arange(columns)))
    expected = torch.tensor([[e4m3(int(code)) for code in row] for row in codes]) * points.scales
    assert torch.equal(whole, expected)
    assert torch.equal(round_nearest(weight, Float8()).dequantize(), packed(weight).dequantize())


def test_inputs_cost_more_than_weights_alone_and_less_than_in_4_bits(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    kl = {
        spec: float(lab.candidate(spec).kl.mean)
        for spec in ("fp8", "fp8:activations=false", "dynamic:bits=8:activation_bits=4")
    }
    assert 0 < kl["fp8:activations=false"] < kl["fp8"] < kl["dynamic:bits=8:activation_bits=4"]


def test_without_a_gpu_it_is_simulated_and_says_what_would_be_needed(tmp_path: Path) -> None:
    kernels = tiny_lab(tmp_path).candidate("fp8").kernels
    assert str(kernels) == "dequantize-matmul 14"
    assert kernels.wanted == ("W8A8 matmul on scaled-float8",)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("shape", [(24, 64), (96, 512), (3, 40)])
def test_torchao(shape: tuple[int, int]) -> None:
    """Every code and scale of its float8 with a scale for each row."""
    primitives = pytest.importorskip(
        "torchao.quantization.quant_primitives",
        reason="torchao is no dependency: pip install torchao==0.18.0",
    )
    weight, _ = layer(*shape)
    for each in (weight, weight**3, weight.bfloat16().float()):
        scale = primitives._choose_scale_float8(each, [1, shape[1]])
        codes = primitives._quantize_affine_float8(each, scale)
        found = packed(each)
        assert torch.equal(found.scales, scale)
        assert torch.equal(code_bits(found), codes.view(torch.uint8))
        activation = PerTokenFloat8()
        assert torch.equal(activation(each), codes.float() * scale)


def test_codes_that_are_no_numbers_are_never_chosen() -> None:
    weight = from_bits(torch.arange(128, 254)).float().unsqueeze(0) * 1e30
    assert int(code_bits(packed(weight)).bitwise_and(127).max()) == 0x7E
