"""What solvers rely on: every codebook's points are fixed, nearest, and packed as they decode."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.solvers.codebook import Codebook, round_nearest
from pytest_qlab.solvers.codebooks import Float4, Mxfp4, NormalFloat4, Nvfp4, UniformGroups
from pytest_qlab.solvers.grid import GridRule, round_to_nearest

CODEBOOKS: dict[str, tuple[Codebook, int]] = {
    "nf4": (NormalFloat4(), 16),
    "nf4-16-double": (NormalFloat4(16, double_quant=True), 16),
    "fp4": (Float4(), 16),
    "mxfp4": (Mxfp4(), 16),
    "mxfp4-ceil": (Mxfp4("ceil"), 16),
    "mxfp4-even": (Mxfp4("even"), 16),
    "nvfp4": (Nvfp4(), 16),
    "nvfp4-4/6": (Nvfp4(four_over_six=True), 16),
    "uniform-3": (UniformGroups(GridRule(3), 16), 8),
    "uniform-2-symmetric-row": (UniformGroups(GridRule(2, symmetric=True), -1), 4),
}


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("name", CODEBOOKS)
def test_codes_are_of_the_nearest_points_for_any_columns(
    name: str, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    codebook, size = CODEBOOKS[name]
    points = codebook.fit(normal(rows, columns, seed))
    order = data.draw(st.permutations(range(columns)))
    chosen = torch.tensor(order[: data.draw(st.integers(1, columns))])
    values = 1.5 * normal(rows, len(chosen), seed + 1)  # also beyond the range that was fitted
    codes = points.nearest(values, chosen)
    found = points.decode(codes, chosen)
    every = torch.stack(
        [points.decode(torch.full_like(codes, code), chosen) for code in range(size)]
    )
    least = (every - values).abs().amin(0)
    # With 8-bit absmax, codes are chosen before it is rounded, as in bitsandbytes.
    slack = 0.3 if "double" in name else 1e-5
    assert ((found - values).abs() <= least + slack * values.abs().clamp(min=1)).all()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", CODEBOOKS)
def test_what_is_packed_is_what_codes_decode_to(
    name: str, rows: int, columns: int, seed: int
) -> None:
    codebook, size = CODEBOOKS[name]
    points = codebook.fit(normal(rows, columns, seed))
    codes = torch.randint(
        0, size, (rows, columns), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    whole = points.pack(codes).dequantize()
    assert torch.equal(whole, points.decode(codes, torch.arange(columns)))
    for column in range(columns):
        one = torch.tensor([column])
        assert torch.equal(points.decode(codes[:, one], one), whole[:, one])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 8, 32])
def test_uniform_groups_round_as_rtn_does(bits: int, group_size: int) -> None:
    weight = normal(7, 45)
    for rule in (GridRule(bits), GridRule(bits, symmetric=True), GridRule(bits, mse=True)):
        expected = round_to_nearest(weight, rule, group_size).pack()
        found = round_nearest(weight, UniformGroups(rule, group_size))
        for name, tensor in expected.tensors().items():
            assert torch.equal(tensor, found.tensors()[name])


@pytest.mark.parametrize("name", CODEBOOKS)
def test_nothing_beats_the_rate_distortion_bound(name: str) -> None:
    """No code of R bits a number has less than 4^-R of a Gaussian's variance as its error.

    Below the bound, bits are not all counted; 2 bits above it, something is wrong with the points.
    """
    weight = normal(256, 512).double()
    found = round_nearest(weight.float(), CODEBOOKS[name][0])
    error = float((found.dequantize() - weight).square().mean() / weight.square().mean())
    lost = found.bits_per_weight - math.log(1 / error, 4)
    assert 0 < lost < 2


def test_what_is_made_for_gaussians_does_best_on_them() -> None:
    weight = normal(256, 512)

    def error(codebook: Codebook) -> float:
        return float((round_nearest(weight, codebook).dequantize() - weight).norm())

    assert error(NormalFloat4()) < error(Float4())
    assert error(Nvfp4(four_over_six=True)) < error(Nvfp4())
    assert error(Nvfp4()) < error(Mxfp4())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_extreme_weights_are_as_good_as_others(name: str, scale: float) -> None:
    weight = normal(4, 64)
    ordinary, extreme = (
        round_nearest(weight * s, CODEBOOKS[name][0]).dequantize() / s - weight
        for s in (1.0, scale)
    )
    assert float(extreme.norm()) < 1.05 * float(ordinary.norm())
