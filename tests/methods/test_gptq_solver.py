"""GPTQ against the reference's published numbers, slow oracles, and its own identities."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pytest_qlab.solvers.gptq import (
    GptqSolution,
    NotPositiveDefiniteError,
    gptq_solve,
    gptq_solve_shared,
)
from pytest_qlab.solvers.grid import GridRule, round_to_nearest
from tests.methods.oracles import correlated, ldlq, loop_fit, slow_gptq
from tests.toy import SEQUENCES, relative_output_error, toy_gram, toy_weight

EXACT = torch.float64


def exact_rule(bits: int, symmetric: bool = False) -> GridRule:
    return GridRule(bits, symmetric, scale_dtype=EXACT)


def points(solution: GptqSolution) -> Tensor:
    """The dequantized weight in float64, by the definition."""
    result = solution.quantized
    columns = result.codes.shape[1]
    groups = result.column_groups
    if groups is None:
        length = columns if result.group_size == -1 else result.group_size
        groups = torch.arange(columns) // length
    scale, zero = result.grid.scale.double()[:, groups], result.grid.zero.double()[:, groups]
    return scale * (result.codes.double() - zero)


def proxy(delta: Tensor, gram: Tensor) -> float:
    return float((delta @ gram * delta).sum())


def damped(gram: Tensor, damp_percent: float = 0.01) -> Tensor:
    fixed = gram.double().clone()
    fixed.diagonal()[fixed.diagonal() == 0] = 1
    return fixed + damp_percent * fixed.diagonal().mean() * torch.eye(len(gram), dtype=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size", "act", "static", "mse", "first_row", "loss", "error"),
    [
        (4, False, -1, False, False, False, -7.639556, 3659.15, 3.98995e-3),
        (4, True, -1, False, False, False, -6.507397, 3782.69, 4.11800e-3),
        (3, False, -1, False, False, True, -6.209492, 14825.3, 1.61881e-2),
        (4, False, -1, True, False, False, -7.112690, 2812.22, 2.92560e-3),
        (4, False, 128, False, False, False, -6.420324, 3538.21, 3.85809e-3),
        (4, False, 32, False, False, False, -6.753570, 2720.05, 2.96548e-3),
        (4, False, 32, True, False, False, -7.276856, 2129.44, 2.21766e-3),
        (4, False, 32, True, True, False, -6.885807, 2085.75, 2.17820e-3),
        (4, False, 32, False, True, False, -6.568056, 2726.35, 2.97330e-3),
        (3, True, 64, True, True, False, -3.619148, 12596.2, 1.32230e-2),
        (2, False, 64, True, True, False, -1.648643, 58976.3, 6.28529e-2),
    ],
)
def test_the_reference_implementation_finds_the_same(
    dtype: torch.dtype,
    bits: int,
    symmetric: bool,
    group_size: int,
    act: bool,
    static: bool,
    mse: bool,
    first_row: float,
    loss: float,
    error: float,
) -> None:
    """Numbers printed by IST-DASLab/gptq on the toy problem, whose H is 2/N sum x x^T."""
    solution = gptq_solve(
        toy_weight().to(dtype),
        toy_gram() * (2 / SEQUENCES),
        GridRule(bits, symmetric, mse, scale_dtype=torch.float32),
        group_size=group_size,
        desc_act=act,
        static_groups=static,
    )
    weight = solution.quantized.pack().dequantize()
    assert float(weight[0].double().sum()) == pytest.approx(first_row, abs=2e-6)
    assert solution.loss == pytest.approx(loss, rel=5e-6)
    assert relative_output_error(toy_weight(), weight) == pytest.approx(error, rel=5e-6)


def test_smaller_blocks_see_more_of_the_updates_as_in_the_reference() -> None:
    rule = GridRule(4, scale_dtype=torch.float32)
    gram = toy_gram() * (2 / SEQUENCES)
    solution = gptq_solve(toy_weight(), gram, rule, group_size=32, block_size=32)
    assert solution.loss == pytest.approx(2764.91, rel=5e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize(
    ("columns", "group_size", "block_size"),
    [(48, -1, 128), (48, 8, 16), (48, 16, 8), (45, 16, 10), (45, 12, 20), (30, 40, 16)],
)
def test_it_agrees_with_a_slow_implementation_in_every_code(
    bits: int,
    symmetric: bool,
    desc_act: bool,
    static_groups: bool,
    columns: int,
    group_size: int,
    block_size: int,
) -> None:
    weight, inputs, _ = correlated(6, columns, 80)
    inputs[:, 5] = 0  # a dead column
    gram = inputs.T @ inputs
    if symmetric:
        # A group's most negative weight lies exactly between two codes of a symmetric grid, where
        # the last bit decides. Weights that are mostly positive have no such extreme.
        weight += 3
    codes, expected = slow_gptq(
        weight,
        gram,
        bits,
        loop_fit(bits, symmetric),
        group_size=group_size,
        desc_act=desc_act,
        static_groups=static_groups,
        block_size=block_size,
    )
    solution = gptq_solve(
        weight,
        gram,
        exact_rule(bits, symmetric),
        group_size=group_size,
        desc_act=desc_act,
        static_groups=static_groups,
        block_size=block_size,
    )
    assert torch.equal(solution.quantized.codes.double(), codes)
    assert torch.allclose(points(solution), expected, rtol=1e-9, atol=1e-12)


def test_float32_differs_from_float64_in_rounding_only() -> None:
    weight, _, gram = correlated(16, 96, 200)
    options = {"group_size": 32, "desc_act": True, "static_groups": True}
    rule = GridRule(4, scale_dtype=torch.float32)
    single = gptq_solve(weight.float(), gram.float(), rule, **options)  # type: ignore[arg-type]
    double = gptq_solve(weight, gram, rule, **options)  # type: ignore[arg-type]
    same = single.quantized.codes == double.quantized.codes
    assert float(same.float().mean()) > 0.99
    assert single.loss == pytest.approx(double.loss, rel=1e-2)


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
def test_the_loss_is_half_the_damped_output_error(
    group_size: int, desc_act: bool, static_groups: bool
) -> None:
    weight, inputs, _ = correlated(5, 40, 60)
    inputs[:, 7] = 0
    gram = inputs.T @ inputs
    solution = gptq_solve(
        weight,
        gram,
        exact_rule(3),
        group_size=group_size,
        desc_act=desc_act,
        static_groups=static_groups,
        block_size=16,
    )
    weight[:, 7] = 0
    expected = proxy(weight - points(solution), damped(gram)) / 2
    assert solution.loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["multiple of the identity", "diagonal"])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_without_correlation_it_is_rounding_to_nearest(
    kind: str, desc_act: bool, group_size: int
) -> None:
    weight, _, _ = correlated(8, 48, 1)
    diagonal = torch.full((48,), 3.7)
    if kind == "diagonal":
        diagonal = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.1
    solution = gptq_solve(
        weight.float(),
        diagonal.diag(),
        GridRule(4),
        group_size=group_size,
        desc_act=desc_act,
        static_groups=True,
    )
    expected = round_to_nearest(weight.float(), GridRule(4), group_size)
    assert torch.equal(solution.quantized.codes, expected.codes)
    assert torch.equal(solution.quantized.pack().dequantize(), expected.pack().dequantize())


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("desc_act", [True, False])
def test_the_block_size_does_not_matter_for_grids_fitted_before(
    group_size: int, desc_act: bool
) -> None:
    weight, _, gram = correlated(6, 48, 90)
    found = [
        gptq_solve(
            weight,
            gram,
            exact_rule(4),
            group_size=group_size,
            desc_act=desc_act,
            static_groups=True,
            block_size=block_size,
        )
        for block_size in (1, 7, 16, 48, 128)
    ]
    for other in found[1:]:
        assert torch.equal(other.quantized.codes, found[0].quantized.codes)
        assert other.loss == pytest.approx(found[0].loss, rel=1e-9)


@pytest.mark.parametrize("power", [-5, 3, 9])
def test_powers_of_two_in_weights_and_inputs_keep_the_codes(power: int) -> None:
    weight, _, gram = correlated(6, 48, 90)
    options = {"group_size": 16, "desc_act": True}
    one = gptq_solve(weight.float(), gram.float(), GridRule(4), **options)  # type: ignore[arg-type]
    other = gptq_solve(
        weight.float() * 2.0**power,
        gram.float() * 4.0**-power,
        GridRule(4),
        **options,  # type: ignore[arg-type]
    )
    assert torch.equal(one.quantized.codes, other.quantized.codes)


def test_act_order_does_not_depend_on_the_order_of_columns() -> None:
    weight, _, gram = correlated(6, 48, 90)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    one = gptq_solve(weight, gram, exact_rule(4), desc_act=True)
    other = gptq_solve(weight[:, shuffle], gram[shuffle][:, shuffle], exact_rule(4), desc_act=True)
    assert torch.equal(one.quantized.codes[:, shuffle], other.quantized.codes)


def test_rows_are_independent() -> None:
    weight, _, gram = correlated(6, 48, 90)
    whole = gptq_solve(weight, gram, exact_rule(3), group_size=16)
    part = gptq_solve(weight[2:4], gram, exact_rule(3), group_size=16)
    assert torch.equal(whole.quantized.codes[2:4], part.quantized.codes)


def test_it_is_ldlq_on_flipped_columns() -> None:
    """Two algorithms with different variables: GPTQ moves weights, LDLQ feeds errors back."""
    weight, _, gram = correlated(12, 50, 120)
    codes = ldlq(weight.flip(1), damped(gram).flip(0, 1), *loop_fit(4, False)(weight), bits=4).flip(
        1
    )
    solution = gptq_solve(weight, gram, exact_rule(4))
    assert torch.equal(solution.quantized.codes.double(), codes)


def test_between_the_optimum_and_rounding_to_nearest() -> None:
    """All codes of a tiny problem enumerated: no row beats the optimum, and on average it pays."""
    bits, columns = 2, 4
    greedy, nearest, least = 0.0, 0.0, 0.0
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=columns)), dtype=EXACT)
    for seed in range(20):
        weight, _, gram = correlated(6, columns, 8, seed)
        rule = exact_rule(bits)
        delta = weight - points(gptq_solve(weight, gram, rule, damp_percent=0.0))
        plain = round_to_nearest(weight, rule, -1)
        scale, zero = plain.grid
        for row in range(6):
            deltas = weight[row] - scale[row] * (every - zero[row])
            optimum = float(((deltas @ gram) * deltas).sum(1).min())
            found = proxy(delta[row : row + 1], gram)
            assert found >= optimum * (1 - 1e-9)
            greedy, least = greedy + found, least + optimum
        nearest += proxy(weight - scale * (plain.codes.double() - zero), gram)
    assert least < greedy < nearest


def test_act_order_and_small_groups_pay_on_correlated_inputs() -> None:
    rule = GridRule(4)
    gram = toy_gram()

    def error(**options: bool) -> float:
        solution = gptq_solve(toy_weight(), gram, rule, group_size=32, **options)
        return relative_output_error(toy_weight(), solution.quantized.pack().dequantize())

    nearest = relative_output_error(
        toy_weight(), round_to_nearest(toy_weight(), rule, 32).pack().dequantize()
    )
    assert error(desc_act=True, static_groups=True) < 0.8 * error() < 0.6 * nearest


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16, 64])
def test_a_group_index_is_stored_only_where_groups_are_scattered(
    desc_act: bool, static_groups: bool, group_size: int
) -> None:
    weight, _, gram = correlated(4, 40, 60)
    solution = gptq_solve(
        weight.float(),
        gram,
        GridRule(4),
        group_size=group_size,
        desc_act=desc_act,
        static_groups=static_groups,
    )
    scattered = desc_act and not static_groups and group_size == 16
    assert (solution.quantized.column_groups is not None) == scattered
    assert ("column_groups" in solution.quantized.pack().tensors()) == scattered
    assert torch.allclose(solution.quantized.pack().dequantize().double(), points(solution))


def test_the_weight_and_the_gram_matrix_are_left_alone() -> None:
    weight, inputs, _ = correlated(4, 40, 60)
    inputs[:, 3] = 0
    gram = inputs.T @ inputs
    before = weight.clone(), gram.clone()
    gptq_solve(weight, gram, exact_rule(4), desc_act=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (7, 1), (3, 130)])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_odd_shapes(rows: int, columns: int, group_size: int) -> None:
    weight, _, gram = correlated(rows, columns, 5)
    solution = gptq_solve(
        weight.float(), gram.float(), GridRule(4), group_size=group_size, desc_act=True
    )
    error = solution.quantized.pack().dequantize() - weight.float()
    assert bool(error.isfinite().all())
    assert float(error.abs().max()) < 0.5 * float(weight.abs().max())


def test_inputs_of_zeros_leave_zero_weights() -> None:
    """As the reference does: columns that calibration never used are cleared."""
    weight, _, _ = correlated(3, 16, 1)
    solution = gptq_solve(weight.float(), torch.zeros(16, 16), GridRule(4), group_size=8)
    assert not solution.quantized.pack().dequantize().any()


def test_damping_is_raised_until_the_matrix_can_be_factored() -> None:
    weight, _, _ = correlated(3, 16, 1)
    gram = torch.eye(16)
    gram[0, 1] = gram[1, 0] = 1.32  # indefinite; positive definite when 0.32 is added
    solution = gptq_solve(weight.float(), gram, GridRule(4), damp_percent=0.05)
    assert solution.damp_percent == pytest.approx(0.35)
    assert gptq_solve(weight.float(), torch.eye(16), GridRule(4)).damp_percent == 0.01


def test_a_hopeless_matrix_is_refused() -> None:
    weight, _, _ = correlated(3, 16, 1)
    with pytest.raises(NotPositiveDefiniteError):
        gptq_solve(weight.float(), -torch.eye(16), GridRule(4), damp_percent=0.0)


def test_a_matrix_whose_mean_overflows_is_refused() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = 3e17 * torch.randn(256, 64, generator=generator)
    gram = inputs.T @ inputs
    assert gram.isfinite().all()
    assert gram.diagonal().mean().isinf()
    with pytest.raises(NotPositiveDefiniteError):
        gptq_solve(torch.randn(4, 64, generator=generator), gram, GridRule(4))


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_weights_on_the_same_inputs_are_solved_as_each_alone(
    desc_act: bool, static_groups: bool, group_size: int
) -> None:
    weight, inputs, _ = correlated(15, 72, 160)
    inputs[:, 7] = 0
    gram = inputs.T @ inputs
    parts = [weight[:4], weight[4:5] * 30, weight[5:]]
    together = gptq_solve_shared(
        parts,
        gram,
        exact_rule(3),
        group_size=group_size,
        desc_act=desc_act,
        static_groups=static_groups,
        block_size=40,
    )
    for part, solution in zip(parts, together, strict=True):
        codes, expected = slow_gptq(
            part,
            gram,
            3,
            loop_fit(3, False),
            group_size=group_size,
            desc_act=desc_act,
            static_groups=static_groups,
            block_size=40,
        )
        assert torch.equal(solution.quantized.codes.double(), codes)
        assert torch.allclose(points(solution), expected, rtol=1e-9, atol=1e-12)
        dead = part.clone()
        dead[:, 7] = 0
        error = proxy(dead - points(solution), damped(gram)) / 2
        assert solution.loss == pytest.approx(error, rel=1e-9)


def test_weights_whose_scales_need_other_types_are_not_mixed() -> None:
    weight, _, gram = correlated(6, 48, 90)
    small, large = weight.float(), weight.float() * 2.0**40  # beyond what float16 scales reach
    alone = [gptq_solve(each, gram.float(), GridRule(4)).quantized for each in (small, large)]
    assert alone[0].rule.scale_dtype != alone[1].rule.scale_dtype
    together = gptq_solve_shared([small, large], gram.float(), GridRule(4))
    for solution, expected in zip(together, alone, strict=True):
        assert solution.quantized.rule == expected.rule
        assert torch.equal(solution.quantized.codes, expected.codes)
