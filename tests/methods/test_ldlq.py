"""LDLQ with any codebook against QuIP's own numbers, GPTQ, slow loops and enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pytest_qlab.solvers.codebook import Points
from pytest_qlab.solvers.gptq import NotPositiveDefiniteError, gptq_solve
from pytest_qlab.solvers.grid import GridRule
from pytest_qlab.solvers.ldlq import LdlqSolution, Order, ldlq
from tests.methods.codebooks import AffinePoints, ListedPoints
from tests.methods.oracles import correlated, loop_fit
from tests.methods.oracles import ldlq as slow_ldlq
from tests.toy import DEAD_COLUMN, relative_output_error, toy_gram, toy_weight

EXACT = torch.float64
ORDERS: list[Order] = ["first", "last", "active"]
UNEVEN = torch.tensor([-1.0, -0.6, -0.35, -0.1, 0.0, 0.2, 0.45, 1.0], dtype=EXACT)


def damped(gram: Tensor, damp_percent: float = 0.01) -> Tensor:
    fixed = gram.double().clone()
    fixed.diagonal()[fixed.diagonal() == 0] = 1
    return fixed + damp_percent * fixed.diagonal().mean() * torch.eye(len(gram), dtype=EXACT)


def affine(weight: Tensor, bits: int) -> AffinePoints:
    return AffinePoints(*loop_fit(bits, False)(weight), bits)


def listed(columns: int) -> ListedPoints:
    scales = torch.rand(columns, generator=torch.Generator().manual_seed(5), dtype=EXACT) + 2
    return ListedPoints(UNEVEN, scales)


class HalfwayPoints(AffinePoints):
    """2**bits points, symmetric around 0; halves go up."""

    def __init__(self, step: Tensor, bits: int) -> None:
        super().__init__(step.reshape(1), torch.tensor([(2**bits - 1) / 2]), bits)

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        codes = torch.floor(values / self.scale + self.zero + 0.5)
        return codes.clamp(0, 2**self.bits - 1).to(torch.uint8)


def error_of(weight: Tensor, points: Points, codes: Tensor, hessian: Tensor) -> float:
    delta = weight - points.decode(codes, torch.arange(weight.shape[1]))
    return float(((delta @ hessian) * delta).sum())


@pytest.mark.parametrize(
    ("bits", "order", "first_row", "total", "error"),
    [
        (2, "last", 380, 6184, 1.160691e-1),
        (2, "active", 369, 6177, 9.164122e-2),
        (3, "last", 883, 14445, 2.005375e-2),
        (3, "active", 869, 14433, 1.556853e-2),
        (4, "last", 1864, 30992, 4.628616e-3),
        (4, "active", 1864, 30963, 3.583713e-3),
    ],
)
def test_the_reference_implementation_finds_the_same(
    bits: int, order: Order, first_row: int, total: int, error: float
) -> None:
    """Sums of codes of Cornell-RelaxML/QuIP on the toy problem, its grid "b" without rotation.

    `last` is its `ldlq`, `active` its `ldlqRG`, which takes the columns in the order of rising
    diag(H) from the last to the first.
    """
    weight = toy_weight().clone()
    weight[:, DEAD_COLUMN] = 0  # as the reference does before it fits the grid
    end = 2.4 * weight.square().mean().sqrt()
    points = HalfwayPoints(2 * end / (2**bits - 1), bits)
    solution = ldlq(weight.clamp(-end, end), toy_gram(), points, order=order)
    codes = solution.codes.to(torch.int64)
    assert (int(codes[0].sum()), int(codes.sum())) == (first_row, total)
    found = points.decode(codes, torch.arange(256))
    assert relative_output_error(toy_weight(), found) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [1, 31, 50, 300])
def test_last_to_first_is_quips_loop(bits: int, columns: int) -> None:
    weight, _, gram = correlated(7, columns, 2 * columns + 20)
    scale, zero = loop_fit(bits, False)(weight)
    expected = slow_ldlq(weight, damped(gram), scale, zero, bits)
    solution = ldlq(weight, gram, AffinePoints(scale, zero, bits), order="last")
    assert torch.equal(solution.codes.double(), expected)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("desc_act", [True, False])
def test_first_to_last_and_act_order_are_gptq_on_whole_rows(bits: int, desc_act: bool) -> None:
    weight, inputs, _ = correlated(6, 70, 150)
    inputs[:, 9] = 0
    gram = inputs.T @ inputs
    expected = gptq_solve(weight, gram, GridRule(bits, scale_dtype=EXACT), desc_act=desc_act)
    order: Order = "active" if desc_act else "first"
    solution = ldlq(weight, gram, affine(weight, bits), order=order)
    assert torch.equal(solution.codes, expected.quantized.codes)
    assert solution.loss == pytest.approx(2 * expected.loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_any_codebook_agrees_with_the_inverse_of_the_rest_at_every_column(order: Order) -> None:
    """The update of optimal brain quantization, column by column, with points in no order."""
    weight, _, gram = correlated(5, 40, 90)
    points = listed(40)
    taken = {
        "first": list(range(40)),
        "last": list(range(39, -1, -1)),
        "active": sorted(range(40), key=lambda j: -float(gram[j, j])),
    }[order]
    w, h = weight[:, taken].clone(), damped(gram)[taken][:, taken]
    expected = torch.empty_like(weight, dtype=torch.int64)
    for j, column in enumerate(taken):
        distances = (w[:, j, None] - UNEVEN * points.scales[column]).abs()
        expected[:, column] = distances.argmin(1)
        error = w[:, j] - UNEVEN[expected[:, column]] * points.scales[column]
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j + 1 :] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
    solution = ldlq(weight, gram, points, order=order)
    assert torch.equal(solution.codes, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("greedy_passes", [0, 3])
def test_the_loss_is_the_damped_output_error(order: Order, greedy_passes: int) -> None:
    weight, inputs, _ = correlated(5, 40, 60)
    inputs[:, 7] = 0
    gram, points = inputs.T @ inputs, listed(40)
    solution = ldlq(weight, gram, points, order=order, greedy_passes=greedy_passes)
    weight[:, 7] = 0
    expected = error_of(weight, points, solution.codes, damped(gram))
    assert solution.loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("greedy_passes", [0, 2])
def test_without_correlation_it_is_the_nearest_point(order: Order, greedy_passes: int) -> None:
    weight, _, _ = correlated(8, 48, 1)
    points = listed(48)
    diagonal = torch.rand(48, generator=torch.Generator().manual_seed(0), dtype=EXACT) + 0.1
    solution = ldlq(weight, diagonal.diag(), points, order=order, greedy_passes=greedy_passes)
    assert torch.equal(solution.codes, points.nearest(weight, torch.arange(48)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("greedy_passes", [0, 2])
def test_the_block_size_does_not_matter(order: Order, greedy_passes: int) -> None:
    weight, _, gram = correlated(6, 75, 120)

    def solve(block_size: int) -> LdlqSolution:
        return ldlq(
            weight,
            gram,
            listed(75),
            order=order,
            block_size=block_size,
            greedy_passes=greedy_passes,
        )

    first = solve(1)
    for block_size in (7, 32, 75, 128):
        assert torch.equal(solve(block_size).codes, first.codes)


def test_between_the_optimum_and_the_nearest_points() -> None:
    """All codes of a tiny problem enumerated: no row beats the optimum, and on average it pays."""
    points = ListedPoints(torch.tensor([-1.3, -0.2, 0.4, 1.1], dtype=EXACT), torch.ones(4).double())
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    totals = {"least": 0.0, "greedy": 0.0, "ldlq": 0.0, "nearest": 0.0}
    for seed in range(20):
        weight, _, gram = correlated(6, 4, 8, seed)
        found = {
            "ldlq": ldlq(weight, gram, points, damp_percent=0.0).codes,
            "greedy": ldlq(weight, gram, points, damp_percent=0.0, greedy_passes=9).codes,
            "nearest": points.nearest(weight, torch.arange(4)),
        }
        for row in range(6):
            one = weight[row : row + 1]
            deltas = one - points.decode(every, torch.arange(4))
            least = float(((deltas @ gram) * deltas).sum(1).min())
            totals["least"] += least
            for name, codes in found.items():
                error = error_of(one, points, codes[row : row + 1], gram)
                assert error >= least * (1 - 1e-9)
                totals[name] += error
    assert totals["least"] < totals["greedy"] < totals["ldlq"] < totals["nearest"]


def test_greedy_passes_never_cost_and_end_where_no_single_code_can_be_bettered() -> None:
    weight, _, gram = correlated(4, 24, 60)
    points, hessian = listed(24), damped(gram)
    losses = [ldlq(weight, gram, points, greedy_passes=passes).loss for passes in range(8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0]
    codes = ldlq(weight, gram, points, greedy_passes=100).codes
    for row, column, code in itertools.product(range(4), range(24), range(8)):
        other = codes[row : row + 1].clone()
        other[0, column] = code
        one = weight[row : row + 1]
        before = error_of(one, points, codes[row : row + 1], hessian)
        assert error_of(one, points, other, hessian) >= before * (1 - 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_float32_differs_from_float64_in_rounding_only(order: Order) -> None:
    weight, _, gram = correlated(16, 96, 200)
    single = ldlq(weight.float(), gram.float(), affine(weight, 4), order=order)
    double = ldlq(weight, gram, affine(weight, 4), order=order)
    assert float((single.codes == double.codes).float().mean()) > 0.99
    assert single.loss == pytest.approx(double.loss, rel=1e-2)


def test_the_weight_and_the_gram_matrix_are_left_alone() -> None:
    weight, inputs, _ = correlated(4, 40, 60)
    inputs[:, 3] = 0
    gram = inputs.T @ inputs
    before = weight.clone(), gram.clone()
    ldlq(weight, gram, listed(40), greedy_passes=1)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_damping_is_raised_until_the_matrix_can_be_factored() -> None:
    weight, _, _ = correlated(3, 16, 1)
    gram = torch.eye(16)
    gram[0, 1] = gram[1, 0] = 1.32  # indefinite; positive definite when 0.32 is added
    solution = ldlq(weight, gram, listed(16), damp_percent=0.05)
    assert solution.damp_percent == pytest.approx(0.35)
    with pytest.raises(NotPositiveDefiniteError):
        ldlq(weight, -torch.eye(16), listed(16))
