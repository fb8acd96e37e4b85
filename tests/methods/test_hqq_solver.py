"""HQQ: numbers of the reference code, a slow implementation for ragged groups, what is stored."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.solvers.hqq import FINEST, HqqRule, RealGrid
from tests.toy import toy_weight

Floats = NDArray[np.float64]


def unrounded(weight: Tensor, rule: HqqRule) -> tuple[RealGrid, Tensor, Tensor]:
    """The grids before they are stored, and codes and weights on them; whole groups only."""
    grid = rule.solve(weight)
    groups = weight.view(len(weight), -1, rule.group_size)
    inverse, zero = (each.unsqueeze(-1) for each in grid)
    codes = (groups * inverse + zero).round().clamp(0, 2**rule.bits - 1)
    return grid, codes, ((codes - zero) / inverse).view_as(weight)


def relative_error(weight: Tensor, found: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize(
    ("bits", "group_size", "optimize", "error", "zero", "total"),
    [
        (4, 64, False, 0.080177, 7, 469),
        (4, 64, True, 0.079187, 6.956499, 468.9134),
        (3, 64, True, 0.168146, None, 216.6565),
        (2, 64, True, 0.364392, 1.013025, None),
        (2, 16, True, 0.295557, None, None),
    ],
)
def test_vectors(
    bits: int,
    group_size: int,
    optimize: bool,
    error: float,
    zero: float | None,
    total: float | None,
) -> None:
    """Made by hqq 0.2.8.post1 in float32 on the CPU from the same weight."""
    weight = toy_weight()
    rule = HqqRule(bits, group_size, optimize=optimize)
    grid, codes, found = unrounded(weight, rule)
    assert relative_error(weight, found) == pytest.approx(error, abs=1e-6)
    if zero is not None:
        assert float(grid.zero[0, 0]) == pytest.approx(zero, abs=1e-6)
    if total is not None:
        assert float(grid.zero.sum()) == pytest.approx(total, abs=1e-4)
    if (bits, optimize) == (4, True):
        assert int(codes.sum()) == 30305
    if (bits, group_size) == (2, 64):
        assert float((found - weight).abs().pow(0.7).mean()) == pytest.approx(0.191126, abs=1e-6)
    # Stored scales are off by 2**-11 of themselves at most, zero points below 16 by 2**-8 steps;
    # codes are chosen on what is stored. So the error stays what it was but for a thousandth.
    stored = rule.pack(weight, grid)
    assert relative_error(weight, stored.dequantize()) == pytest.approx(error, rel=1e-3)
    assert stored.bits_per_weight == bits + 32 / group_size


def slow(
    weight: Floats, bits: int, group_size: int, iterations: int = 20
) -> tuple[list[list[float]], list[list[float]]]:
    """Scales and zero points, group by group, in float64; groups at the end may be shorter."""
    top = 2**bits - 1
    groups = [
        [row[start : start + group_size] for start in range(0, len(row), group_size)]
        for row in weight
    ]
    scales = [[(group.max() - group.min()) / top for group in row] for row in groups]
    zeros = [
        [-group.min() / s for group, s in zip(row, scale, strict=True)]
        for row, scale in zip(groups, scales, strict=True)
    ]
    if bits == 4:
        zeros = [[float(np.round(zero)) for zero in row] for row in zeros]
    least = math.inf
    for _ in range(iterations):
        total = 0.0
        for i, row in enumerate(groups):
            for g, group in enumerate(row):
                scale, zero = scales[i][g], zeros[i][g]
                codes = np.clip(np.round(group / scale + zero), 0, top)
                error = group - (codes - zero) * scale
                size = np.abs(error)
                with np.errstate(divide="ignore"):
                    kept = np.sign(error) * np.maximum(size - size**-0.3 / 10, 0)
                zeros[i][g] = float(np.mean(codes - (group - kept) / scale))
                total += size.sum()
        if total / weight.size >= least:
            break
        least = total / weight.size
    return scales, zeros


@pytest.mark.parametrize(("columns", "group_size"), [(37, 16), (50, 8), (11, 8), (24, 64)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_at_the_end_of_a_row_count_what_they_have(
    columns: int, group_size: int, bits: int
) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = 2 + torch.randn(6, columns, generator=generator)  # zeros that pad would be seen
    scales, zeros = slow(weight.double().numpy(), bits, group_size)
    grid = HqqRule(bits, group_size).solve(weight)
    assert (1 / grid.inverse).numpy() == pytest.approx(np.array(scales), rel=1e-5)
    # The search ends when the error no longer falls, which rounding can put off by a step.
    assert grid.zero.numpy() == pytest.approx(np.array(zeros), abs=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([8, 64, -1]),
    seed=st.integers(0, 99),
)
def test_without_search_the_grid_spans_the_range(
    rows: int, columns: int, bits: int, group_size: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rule = HqqRule(bits, group_size, optimize=False)
    packed = rule.pack(weight, rule.solve(weight))
    length = columns if group_size == -1 else min(group_size, columns)
    error = (packed.dequantize() - weight).abs()
    for start in range(0, columns, length):
        group = weight[:, start : start + length]
        width = (group.amax(1) - group.amin(1)).double()
        largest = group.abs().amax(1).double()
        # Half a step; for 4 bits the zero point is rounded, which moves the ends by half a step.
        bound = width / (2**bits - 1) * (1.0 if bits == 4 else 0.5)
        # And what float16 makes of scale and zero point, which the largest weight bounds.
        bound += 2.0**-10 * (largest + width)
        assert (error[:, start : start + length].double().amax(1) <= bound).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_lowers_the_error(bits: int) -> None:
    weight = toy_weight()
    plain, moved = (HqqRule(bits, 64, optimize=on) for on in (False, True))
    before, after = (
        relative_error(weight, rule.pack(weight, rule.solve(weight)).dequantize())
        for rule in (plain, moved)
    )
    assert after < before


def test_the_step_that_no_longer_helps_is_kept_and_the_last() -> None:
    weight = toy_weight()
    rules = [HqqRule(4, 64, iterations=n) for n in range(1, 21)]
    zeros = [rule.solve(weight).zero for rule in rules]
    ends = next(n for n in range(19) if torch.equal(zeros[n], zeros[n + 1]))
    assert all(torch.equal(zeros[n], zeros[ends]) for n in range(ends, 20))
    errors = []
    for zero in [HqqRule(4, 64, optimize=False).solve(weight).zero, *zeros[:ends]]:
        groups, s = weight.view(16, 4, 64), rules[0].solve(weight).inverse.unsqueeze(-1)
        codes = (groups * s + zero.unsqueeze(-1)).round().clamp(0, 15)
        errors.append(float((groups - (codes - zero.unsqueeze(-1)) / s).abs().mean()))
    falling = [later < earlier for earlier, later in itertools.pairwise(errors)]
    assert falling == [*[True] * (len(falling) - 1), False]


@pytest.mark.parametrize("constant", [0.0, 0.01, -3.0, 1e-30, 1e30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_groups_keep_their_value(constant: float, bits: int) -> None:
    weight = torch.full((3, 20), constant)
    rule = HqqRule(bits, 8)
    found = rule.pack(weight, rule.solve(weight)).dequantize()
    # The scale of a small one is subnormal in float16, where 8 bits are left of it.
    assert float((found - weight).abs().max()) <= 2.0**-8 * abs(constant)


def test_a_narrow_group_far_from_zero_is_as_good_as_float16_makes_it() -> None:
    weight = 1 + 1e-6 * torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    rule = HqqRule(4, 64)
    grid = rule.solve(weight)
    assert float(grid.inverse.max()) <= FINEST
    found = rule.pack(weight, grid).dequantize()
    assert float((found - weight).abs().max()) <= 2 / FINEST


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38])
def test_extreme_weights_are_as_good_as_others(scale: float) -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rule = HqqRule(4, 16)
    found = rule.pack(weight * scale, rule.solve(weight * scale)).dequantize()
    ordinary = rule.pack(weight, rule.solve(weight)).dequantize()
    assert bool(found.isfinite().all())
    assert relative_error(weight, found / scale) < 1.1 * relative_error(weight, ordinary)
