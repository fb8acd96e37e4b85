"""SpQR against the reference's own numbers, a slow loop, and its identities."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import MethodError
from pytest_qlab.formats import BilevelAffine, WithOutliers
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.methods.spqr import Spqr
from pytest_qlab.solvers.bilevel import fit_range, leave_one_out, round_over_rows
from pytest_qlab.solvers.spqr import SpqrRule, SpqrSolution, spqr_solve, spqr_solve_shared
from tests.methods.oracles import correlated
from tests.methods.spqr_loops import loop_gain, loop_grid, loop_statistics, slow_spqr
from tests.methods.test_methods import layer, output_error, unreached
from tests.toy import SEQUENCES, relative_output_error, toy_gram, toy_weight

EXACT = torch.float64
RULE = SpqrRule(dtype=EXACT)


def problem(rows: int, columns: int, *dead: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    weight, inputs, _ = correlated(rows, columns, 2 * columns + 30, seed)
    inputs[:, list(dead)] = 0
    return weight, inputs.T @ inputs


@pytest.mark.parametrize(
    ("rows", "bits", "group", "width", "tau", "act", "damp", "loo", "row", "outliers", "error"),
    [
        (16, 3, 16, 3, 0.2, True, 1.0, True, -6.387985, 114, 9.625309e-3),
        (16, 3, 16, 3, 0.2, False, 1.0, True, -6.044820, 120, 1.129518e-2),
        (16, 4, 16, 3, 0.2, True, 1.0, True, -6.680394, 0, 3.608781e-3),
        (16, 3, 16, 3, 0.2, True, 1.0, False, -7.622743, 0, 1.472649e-2),
        (16, 3, 16, 3, math.inf, True, 1.0, True, -7.622743, 0, 1.472649e-2),
        (16, 3, 16, 2, 0.5, True, 1.0, True, -6.663765, 18, 1.695512e-2),
        (16, 4, 64, 4, 0.1, False, 0.1, True, -6.246909, 15, 3.820330e-3),
        (48, 3, 16, 3, 0.2, True, 1.0, True, -5.992210, 290, 1.046314e-2),
        (48, 3, 16, 3, 0.2, False, 1.0, True, -7.692810, 308, 1.181424e-2),
        (48, 4, 64, 4, 0.1, False, 0.1, True, -6.246909, 49, 3.862976e-3),
    ],
)
def test_the_reference_implementation_finds_the_same(
    rows: int,
    bits: int,
    group: int,
    width: int,
    tau: float,
    act: bool,
    damp: float,
    loo: bool,
    row: float,
    outliers: int,
    error: float,
) -> None:
    """Numbers of Vahe1994/SpQR, spqr_engine.py, on the toy problem, with `width`-bit statistics."""
    rule = SpqrRule(bits, group, width, 16, tau, loo, EXACT)
    gram = toy_gram().double() * (2 / SEQUENCES)
    solution = spqr_solve(toy_weight(rows).double(), gram, rule, desc_act=act, damp_percent=damp)
    assert float(solution.weight[0].sum()) == pytest.approx(row, abs=1e-5)
    assert int(solution.outliers.sum()) == outliers
    found = relative_output_error(toy_weight(rows), solution.weight)
    assert found == pytest.approx(error, rel=2e-6)


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("loo", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, math.inf])
@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group_size", "width", "shared", "damp"),
    [
        (18, 32, 3, 16, 3, 16, 1.0),
        (6, 33, 2, 8, 3, 4, 1.0),
        (5, 20, 4, 9, 2, 2, 0.01),
        (2, 12, 3, 40, 4, 16, 0.1),
    ],
)
def test_it_agrees_with_a_slow_implementation_in_every_weight(
    desc_act: bool,
    loo: bool,
    threshold: float,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    width: int,
    shared: int,
    damp: float,
) -> None:
    weight, gram = problem(rows, columns, 5)
    expected = slow_spqr(
        weight,
        gram,
        bits=bits,
        group_size=group_size,
        statistic_bits=width,
        statistic_group_size=shared,
        threshold=threshold,
        leave_one_out=loo,
        desc_act=desc_act,
        damp_percent=damp,
    )
    rule = SpqrRule(bits, group_size, width, shared, threshold, loo, EXACT)
    found = spqr_solve(weight, gram, rule, desc_act=desc_act, damp_percent=damp)
    if threshold:  # else whether it is off by 1e-17 or by nothing is chance
        assert torch.equal(found.outliers, expected.outliers)
        assert torch.equal(found.codes, expected.codes)
    assert torch.allclose(found.weight, expected.weight, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), bits=st.sampled_from([2, 3]), rows=st.integers(1, 3))
def test_leaving_one_out_is_fitting_to_the_others(
    data: st.DataObject, bits: int, rows: int
) -> None:
    size = data.draw(st.integers(1, 7))
    # Few different values, so that extremes are often shared.
    values = st.lists(st.integers(-6, 6).map(lambda v: v / 3), min_size=size, max_size=size)
    group = data.draw(st.lists(values, min_size=rows, max_size=rows))
    importance = [1 + 0.3 * j for j in range(size)]
    found = leave_one_out(
        torch.tensor(group, dtype=EXACT).T, torch.tensor(importance, dtype=EXACT), bits
    )
    expected = [loop_gain(row, importance, bits) for row in group]
    assert torch.allclose(found.T, torch.tensor(expected, dtype=EXACT), atol=1e-12)


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=40),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.integers(1, 20),
)
def test_statistics_are_rounded_over_rows(values: list[float], bits: int, group_size: int) -> None:
    given_values = torch.tensor(values, dtype=EXACT)
    found = round_over_rows(given_values, bits, group_size, EXACT)
    expected = torch.tensor(loop_statistics(values, bits, group_size), dtype=EXACT)
    shared = min(group_size, len(values))
    steps = found.ranges[1].repeat_interleave(shared)[: len(values)]
    assert found.ranges.shape == (2, -(-len(values) // shared))
    assert bool(((found.values - given_values).abs() <= steps / 2 + 1e-12).all())
    # Halfway between two codes the last bit decides.
    assert bool(((found.values - expected).abs() <= steps + 1e-12).all())
    assert 0 <= int(found.codes.min()) <= int(found.codes.max()) < 2**bits


def test_ends_of_statistics_are_rounded_before_codes_are_chosen() -> None:
    values = torch.tensor([0.1, 0.2, 0.15, 0.1 + 0.1 / 14 - 1e-7])
    found = round_over_rows(values, 3, 4, torch.float16, 2.0**-10)
    # Exact decimals in units of 2**-10, rounded to float16, whose spacing there is 2**-24.
    least, step = round(0.1 * 2**14) / 2**24, round(0.1 / 7 * 2**14) / 2**24
    assert found.ranges.tolist() == [[least], [step]]
    # In float16, half a step above the least lies below the last value.
    assert least + step / 2 < (0.1 / 14 - 1e-7) * 2**-10 + 0.1 * 2**-10
    codes = [0, 7, round((0.15 * 2**-10 - least) / step), 1]
    assert found.codes.tolist() == codes
    expected = [(least + step * code) * 2**10 for code in codes]
    assert found.values.tolist() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 5.0, 1e4, -1e7]),
    bits=st.sampled_from([2, 3, 4, 8]),
)
def test_ranges_that_are_narrow_and_far_from_zero_are_widened(
    values: list[float], offset: float, bits: int
) -> None:
    shifted = torch.tensor(values, dtype=EXACT) + offset
    low, high = shifted.min()[None], shifted.max()[None]
    scale, zero = fit_range(low, high, bits)
    assert (float(scale), float(zero)) == pytest.approx(loop_grid(shifted.tolist(), bits))
    assert abs(float(zero)) <= 2 ** (bits + 3)
    ends = (-zero * scale, (2**bits - 1 - zero) * scale)
    assert float(ends[0]) <= float(low) + 1e-9 * abs(offset) + 1e-12
    assert float(ends[1]) >= float(high) - 1e-9 * abs(offset) - 1e-12


@pytest.mark.parametrize("threshold", [0.0, 0.1, math.inf])
@pytest.mark.parametrize("desc_act", [True, False])
def test_the_loss_is_the_damped_output_error(threshold: float, desc_act: bool) -> None:
    weight, gram = problem(7, 40)
    weight *= 3e4
    rule = replace(RULE, outlier_threshold=threshold)
    solution = spqr_solve(weight, gram, rule, desc_act=desc_act, damp_percent=0.3)
    hessian = gram + 0.3 * gram.diagonal().mean() * torch.eye(40, dtype=EXACT)
    delta = weight - solution.weight
    expected = float(((delta @ hessian) * delta).sum())
    assert solution.loss == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert solution.damp_percent == 0.3


def test_the_threshold_decides_how_many_weights_are_kept() -> None:
    weight, gram = problem(32, 64)
    kept, losses = [], []
    for threshold in (0.0, 0.01, 0.05, 0.2, 1.0, math.inf):
        solution = spqr_solve(weight, gram, replace(RULE, outlier_threshold=threshold))
        kept.append(int(solution.outliers.sum()))
        losses.append(solution.loss)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 1500
    assert 0 < kept[3] < 500
    assert kept[-1] == 0
    assert losses == sorted(losses)


def test_where_every_error_makes_an_outlier_the_weight_is_kept() -> None:
    weight, gram = problem(9, 40)
    exact = spqr_solve(weight, gram, replace(RULE, outlier_threshold=0.0))
    assert torch.allclose(exact.weight, weight, rtol=0, atol=1e-12)
    half = spqr_solve(weight.float(), gram.float(), SpqrRule(outlier_threshold=0.0)).pack()
    assert half.values.dtype == torch.float16
    assert torch.allclose(half.dequantize().double(), weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("power", [-90, -5, 3, 60])
def test_powers_of_two_in_weights_and_inputs_change_nothing(power: int) -> None:
    weight, gram = problem(10, 48)
    rule = SpqrRule(dtype=torch.float32)
    one = spqr_solve(weight.float(), gram.float(), rule)
    other = spqr_solve(weight.float() * 2.0**power, gram.float() * 2.0**-power, rule)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.outliers, other.outliers)
    assert torch.equal(one.weight, other.weight * 2.0**-power)


def test_act_order_does_not_depend_on_the_order_of_columns() -> None:
    weight, gram = problem(6, 48)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    one = spqr_solve(weight, gram, RULE)
    other = spqr_solve(weight[:, shuffle], gram[shuffle][:, shuffle], RULE)
    assert torch.equal(one.codes[:, shuffle], other.codes)
    assert torch.allclose(one.weight[:, shuffle], other.weight)


def test_weights_on_the_same_inputs_are_solved_as_each_alone() -> None:
    weight, gram = problem(40, 48, 3)
    parts = [weight[:7], weight[7:] * 1e6]
    for part, found in zip(parts, spqr_solve_shared(parts, gram, RULE), strict=True):
        alone = spqr_solve(part, gram, RULE)
        assert torch.equal(found.weight, alone.weight)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (5, 1), (3, 7), (17, 50), (40, 16)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-4, 1e5])
@pytest.mark.parametrize("desc_act", [True, False])
def test_what_is_packed_is_what_was_solved(
    rows: int, columns: int, scale: float, desc_act: bool
) -> None:
    weight, gram = problem(rows, columns)
    weight = weight.float() * scale
    solution = spqr_solve(weight, gram.float(), SpqrRule(), desc_act=desc_act)
    packed = solution.pack()
    found = packed.dequantize()
    assert torch.equal(found, solution.weight)
    assert torch.equal(packed.mask(), solution.outliers)
    error = (found.double() - weight.double()).norm() / weight.double().norm()
    assert float(error) < 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [True, False])
def test_bits_per_weight_is_the_formula(bits: int, desc_act: bool) -> None:
    weight, gram = problem(32, 128)
    packed = cast(
        WithOutliers,
        Spqr(bits=cast(Any, bits), desc_act=desc_act)
        .quantize(weight.float(), statistics_like(gram))
        .weight,
    )
    share = int(packed.mask().sum()) / (32 * 128)
    expected = bits + 2 * 3 / 16 + 64 / (16 * 16) + 32 * share + 32 * 33 / (32 * 128)
    expected += 16 / 32 if desc_act else 0
    assert packed.bits_per_weight == pytest.approx(expected)
    dense = cast(BilevelAffine, packed.dense)
    assert (dense.bits, dense.group_size, dense.statistic_bits) == (bits, 16, 3)


def statistics_like(gram: Tensor) -> Any:
    _, known = layer(4, len(gram))
    return replace(known, gram=gram.float())


def test_rows_of_zeros_constants_and_unused_columns() -> None:
    weight, gram = problem(20, 48, 0, 1, 2, 30)
    weight[3] = 0
    weight[4] = 0.7
    weight[5] = -1e-3
    weight[6, :20] = 5
    for desc_act in (True, False):
        found = spqr_solve(weight.float(), gram.float(), SpqrRule(), desc_act=desc_act)
        alive = torch.ones(48, dtype=torch.bool)
        alive[[0, 1, 2, 30]] = False
        error = (found.weight - weight)[:, alive]
        assert bool(found.weight.isfinite().all())
        assert float(error.norm() / weight[:, alive].norm()) < 0.3


def test_inputs_of_zeros_leave_zero_weights() -> None:
    weight, _ = problem(3, 16)
    found = spqr_solve(weight.float(), torch.zeros(16, 16), SpqrRule())
    assert not found.weight.any()


def test_a_layer_that_no_token_reached_is_rounded_with_all_inputs_alike() -> None:
    weight, _ = layer(18, 40)
    found = Spqr(group_size=8).quantize(weight, unreached(40)).weight
    expected = slow_spqr(
        weight,
        torch.eye(40),
        bits=3,
        group_size=8,
        statistic_bits=3,
        statistic_group_size=16,
        threshold=0.2,
        leave_one_out=True,
        desc_act=False,
        damp_percent=0.0,
    )
    # Ranges in float16 move a weight by a step where it lies between two codes.
    off = (found.dequantize() - expected.weight).abs() > 0.02
    assert float(off.float().mean()) < 0.02


def test_it_beats_rounding_on_small_plain_groups_that_cost_more() -> None:
    spqr, rtn = 0.0, 0.0
    for seed in range(3):
        weight, statistics = layer(256, 128, seed)
        found = Spqr().quantize(weight, statistics).weight
        plain = Rtn(bits=3, group_size=8).quantize(weight, None).weight
        assert found.bits_per_weight < plain.bits_per_weight - 0.7
        spqr += output_error(weight, found.dequantize(), statistics)
        rtn += output_error(weight, plain.dequantize(), statistics)
    assert spqr < 0.7 * rtn


def test_leaving_one_out_pays() -> None:
    """One large weight in each group spoils the grids of the others unless it is found."""
    weight, statistics = layer(32, 128)
    weight[:, ::16] *= 20
    losses = []
    for leave in (True, False):
        found = Spqr(leave_one_out=leave, desc_act=False).quantize(weight, statistics).weight
        losses.append(output_error(weight, found.dequantize(), statistics))
    assert losses[0] < 0.5 * losses[1]


def test_options_reach_the_solver() -> None:
    weight, statistics = layer(20, 48)
    assert statistics.gram is not None
    method = Spqr(
        bits=4,
        group_size=8,
        statistic_bits=4,
        statistic_group_size=5,
        outlier_threshold=0.05,
        leave_one_out=False,
        desc_act=False,
        damp_percent=0.2,
    )
    rule = SpqrRule(4, 8, 4, 5, 0.05, False)
    expected: SpqrSolution = spqr_solve(
        weight, statistics.gram, rule, desc_act=False, damp_percent=0.2
    )
    assert torch.equal(method.quantize(weight, statistics).weight.dequantize(), expected.weight)
    assert method.id == (
        "spqr-w4g8-damp_percent=0.2-no_desc_act-no_leave_one_out-outlier_threshold=0.05"
        "-statistic_bits=4-statistic_group_size=5"
    )
    assert (Spqr().id, Spqr().stream) == ("spqr-w3g16", "quantized")


def test_what_cannot_be_solved_is_said() -> None:
    weight, statistics = layer()
    with pytest.raises(MethodError, match=r"SpQR cannot solve up_proj.*300"):
        Spqr().quantize(weight, replace(statistics, gram=-torch.eye(64)), name="up_proj")
    with pytest.raises(MethodError, match="Gram matrix"):
        Spqr().quantize(weight, replace(statistics, gram=None))
    weight[2, 2] = math.nan
    with pytest.raises(MethodError, match="up_proj contains NaN"):
        Spqr().quantize(weight, statistics, name="up_proj")
