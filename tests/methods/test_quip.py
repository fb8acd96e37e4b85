"""QuIP against dense matrices and slow loops, its theory, and what it promises as a method."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pytest_qlab.errors import MethodError
from pytest_qlab.formats import Incoherent
from pytest_qlab.formats.transforms import Kind, Transform
from pytest_qlab.methods.gptq import Gptq
from pytest_qlab.methods.quip import Quip
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.solvers.incoherence import make_incoherent, quip_solve
from pytest_qlab.solvers.ldlq import ldlq
from tests.formats.test_transforms import dense
from tests.methods.codebooks import AffinePoints
from tests.methods.oracles import correlated
from tests.methods.test_methods import layer, output_error, unreached

EXACT = torch.float64
KINDS: list[Kind] = ["kronecker", "hadamard"]


def slow_quip(
    weight: Tensor, gram: Tensor, bits: int, kind: Kind, *, rescale: bool = True, seed: int = 0
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The reference's steps with dense matrices, in float64: codes, and what makes them a weight.

    H is scaled by its largest entry, columns by (diag(H) / diag(W^T W))^(1/4), then H to the trace
    n; 0.01 is added to its diagonal, and after rotation 0.01 of the mean.
    """
    w, h = weight.double().clone(), gram.double().clone()
    rows, columns = w.shape
    h /= h.abs().max()
    d = torch.ones(columns, dtype=EXACT)
    if rescale:
        squares = (w.T @ w).diagonal()
        d = (h.diagonal() / (squares / squares.max())) ** 0.25
        d = d.half().double()  # they are stored so
        w, h = w @ d.diag(), torch.linalg.inv(d.diag()) @ h @ torch.linalg.inv(d.diag())
    h = h * columns / h.trace() + 0.01 * torch.eye(columns, dtype=EXACT)
    u = dense(Transform.of(kind, rows, 2 * seed + 1))
    v = dense(Transform.of(kind, columns, 2 * seed))
    w, h = u @ w @ v.T, v @ h @ v.T
    h += 0.01 * h.diagonal().mean() * torch.eye(columns, dtype=EXACT)
    end, top = float(2.4 * w.square().mean().sqrt().float()), 2**bits - 1
    grid = ((w / end + 1) / 2 * top).clamp(0, top)
    lower = torch.linalg.cholesky(h)
    lower = lower / lower.diagonal()
    codes = torch.zeros_like(grid)
    for j in reversed(range(columns)):
        feedback = (grid - codes)[:, j + 1 :] @ lower[j + 1 :, j]
        codes[:, j] = (grid[:, j] + feedback + 0.5).floor().clamp(0, top)
    return codes, lambda found: u.T @ ((2 * found / top - 1) * end) @ v / d


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(8, 48), (12, 35), (5, 1)])
def test_it_is_the_reference_with_dense_matrices(
    kind: Kind, bits: int, rescale: bool, rows: int, columns: int
) -> None:
    weight, _, gram = correlated(rows, columns, 3 * columns + 9)
    codes, undo = slow_quip(weight, gram, bits, kind, rescale=rescale, seed=3)
    packed = quip_solve(weight.float(), gram, bits=bits, transform=kind, rescale=rescale, seed=3)
    found = packed.codes().double()
    # float32 decides where two codes are as near, and what follows from it.
    assert float((found == codes).double().mean()) > 0.99
    assert torch.allclose(packed.dequantize().double(), undo(found), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescale", [True, False])
def test_the_problem_is_the_same_after_rotation(kind: Kind, rescale: bool) -> None:
    """tr(W H W^T), of any error in place of W, changes by what is added to H only."""
    weight, _, gram = correlated(9, 40, 100)
    found = make_incoherent(weight, gram, transform=kind, rescale=rescale, seed=1)
    assert found.gram is not None
    d = torch.ones(40) if found.column_scales is None else found.column_scales
    u, v = dense(found.row_transform), dense(found.column_transform)
    assert torch.allclose(u.T @ found.weight @ v / d.double(), weight, atol=1e-9)
    inner = v.T @ found.gram @ v - 0.01 * torch.eye(40, dtype=EXACT)
    back = inner * d.double() * d.double()[:, None]
    assert torch.allclose(back / back.trace(), gram / gram.trace(), atol=1e-12)
    assert float(inner.trace()) == pytest.approx(40)


def test_rescaling_makes_columns_even() -> None:
    """Squares of inputs times those of weights: both are the same share of the whole after it."""
    weight, _, gram = correlated(30, 40, 100)
    weight *= 0.1 + torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=EXACT)
    found = make_incoherent(weight, gram, transform="kronecker", rescale=True, seed=0)
    assert found.column_scales is not None
    d = found.column_scales.double()
    inputs, weights = gram.diagonal() / d.square(), (weight * d).square().sum(0)
    ratio = inputs / weights
    assert torch.allclose(ratio, ratio.mean().expand(40), rtol=5e-3)
    # The least product of tr(H) and the squared norm of W that scales of columns can make.
    least = (gram.diagonal() * weight.square().sum(0)).sqrt().sum().square()
    assert float(inputs.sum() * weights.sum()) == pytest.approx(float(least), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_spread_a_weight_that_is_large_in_one_place(kind: Kind) -> None:
    """max|W| sqrt(m n) / ||W||: sqrt(m n) for a single weight, about 4 for Gaussian ones."""

    def incoherence(w: Tensor) -> float:
        return float(w.abs().max() * w.numel() ** 0.5 / w.norm())

    weight = torch.randn(64, 144, generator=torch.Generator().manual_seed(2)) * 0.01
    weight[5, 17], weight[40, 100] = 3, -2
    found = make_incoherent(weight, None, transform=kind, rescale=False, seed=0)
    assert incoherence(weight) > 60
    assert incoherence(found.weight) < 25
    identity = make_incoherent(torch.eye(64), None, transform=kind, rescale=False, seed=0)
    assert incoherence(torch.eye(64)) == pytest.approx(8)
    # The two sides of a square matrix are rotated by different matrices.
    assert incoherence(identity.weight) < 6
    assert not torch.allclose(identity.weight, torch.eye(64, dtype=EXACT), atol=0.1)


def test_the_loss_of_ldlq_is_what_the_paper_derives() -> None:
    """E tr((W - Q) H (W - Q)^T) = m tr(D) step^2 / 12, H = L D L^T, for weights of any value."""
    weight, _, gram = correlated(4000, 24, 80)
    ones = torch.ones(4000, dtype=EXACT)
    points = WidePoints(0.01 * ones, 0 * ones, 0)
    for order in ("first", "last"):
        solution = ldlq(weight, gram, points, order=cast(Any, order), damp_percent=0.0)
        hessian = gram if order == "last" else gram.flip(0, 1)
        d = torch.linalg.cholesky(hessian).diagonal().square()
        expected = 4000 * float(d.sum()) * 0.01**2 / 12
        assert solution.loss == pytest.approx(expected, rel=0.05)


class WidePoints(AffinePoints):
    """Codes without bounds."""

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        return torch.round(values / self.scale[:, None]) + self.zero[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_it_beats_rounding_and_gptq_on_whole_rows_at_two_bits(kind: Kind) -> None:
    totals = dict.fromkeys(("rtn", "gptq", "quip"), 0.0)
    for seed in range(4):
        weight, statistics = layer(64, 96, seed)
        for method in (
            Rtn(bits=2, group_size=-1),
            Gptq(bits=2, group_size=-1),
            Quip(bits=2, transform=kind),
        ):
            found = method.quantize(weight, statistics).weight
            error = output_error(weight, found.dequantize(), statistics)
            totals[method.name] += error / output_error(weight, 0 * weight, statistics)
    assert totals["quip"] < 0.8 * totals["gptq"] < 0.5 * totals["rtn"]


def test_greedy_passes_pay() -> None:
    errors = [0.0, 0.0]
    for seed in range(4):
        weight, statistics = layer(32, 64, seed)
        for index, passes in enumerate((0, 5)):
            found = Quip(bits=2, greedy_passes=passes).quantize(weight, statistics).weight
            errors[index] += output_error(weight, found.dequantize(), statistics)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rescale", [True, False])
def test_options_reach_the_bits(kind: Kind, bits: int, rescale: bool) -> None:
    weight, statistics = layer(16, 92)
    method = Quip(bits=cast(Any, bits), transform=kind, rescale=rescale, seed=4)
    found = cast(Incoherent, method.quantize(weight, statistics).weight)
    assert (found.bits, found.shape) == (bits, (16, 92))
    # There is a Hadamard matrix of order 16, and none of order 92 here.
    assert found.row_transform == Transform(kind, 16, 9)
    assert found.column_transform == Transform("kronecker", 92, 8)
    scales = 16 * 92 if rescale else 0
    assert found.bits_per_weight == pytest.approx(
        8 * -(-92 * bits // 8) / 92 + (32 + scales) / (16 * 92)
    )
    other = method.model_copy(update={"seed": 5}).quantize(weight, statistics).weight
    assert not torch.equal(other.dequantize(), found.dequantize())
    again = cast(Incoherent, method.quantize(weight, statistics).weight)
    assert torch.equal(again.codes(), found.codes())


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (3, 41), (1, 9), (5, 1), (1, 1), (3, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_and_scale(rows: int, columns: int, scale: float, kind: Kind) -> None:
    weight, statistics = layer(rows, columns)
    before = weight.clone()
    one = Quip(transform=kind).quantize(weight, statistics).weight
    assert torch.equal(weight, before)
    assert one.shape == (rows, columns)
    whole = output_error(weight, 0 * weight, statistics)
    assert output_error(weight, one.dequantize(), statistics) < 0.05 * whole
    other = Quip(transform=kind).quantize(weight * scale, statistics).weight.dequantize()
    assert torch.allclose(other.double() / scale, one.dequantize().double(), rtol=1e-3, atol=1e-3)


def test_rows_of_zeros_and_unused_columns() -> None:
    weight, statistics = layer(12, 40)
    assert statistics.gram is not None
    weight[3] = 0
    weight[:, 7] = 0
    gram = statistics.gram.clone()
    gram[9] = gram[:, 9] = 0
    statistics = replace(statistics, gram=gram)
    found = Quip().quantize(weight, statistics).weight.dequantize()
    assert bool(found.isfinite().all())
    whole = output_error(weight, 0 * weight, statistics)
    assert output_error(weight, found, statistics) < 0.05 * whole
    nothing = Quip().quantize(torch.zeros(12, 40), statistics).weight.dequantize()
    assert not nothing.any()
    unused = Quip().quantize(weight, replace(statistics, gram=torch.zeros(40, 40))).weight
    assert float((unused.dequantize() - weight).norm() / weight.norm()) < 0.5


def test_a_layer_that_no_token_reached_is_rounded_to_nearest_after_rotation() -> None:
    weight, _ = layer(12, 40)
    found = cast(Incoherent, Quip(bits=3).quantize(weight, unreached(40)).weight)
    u, v = dense(Transform("kronecker", 12, 1)), dense(Transform("kronecker", 40, 0))
    rotated = u @ weight.double() @ v.T
    end = 2.4 * rotated.square().mean().sqrt()
    points = (2 * torch.arange(8, dtype=EXACT) / 7 - 1) * end
    expected = (rotated[..., None] - points).abs().argmin(-1)
    assert torch.equal(found.codes().to(torch.int64), expected)
    assert torch.allclose(found.dequantize().double(), u.T @ points[expected] @ v, atol=1e-5)
    assert found.column_scales is None


def test_what_cannot_be_solved_is_said() -> None:
    weight, statistics = layer()
    assert statistics.gram is not None
    indefinite = torch.ones(64, 64) - 0.5 * torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = -9e3
    for gram in (-torch.eye(64), indefinite):
        with pytest.raises(MethodError, match=r"QuIP cannot solve up_proj.*300"):
            Quip(rescale=False).quantize(weight, replace(statistics, gram=gram), name="up_proj")
    with pytest.raises(MethodError, match="Gram matrix"):
        Quip().quantize(weight, replace(statistics, gram=None))
    weight[2, 2] = math.nan
    with pytest.raises(MethodError, match="up_proj contains NaN"):
        Quip().quantize(weight, statistics, name="up_proj")


def test_reading_options_imports_no_torch() -> None:
    code = (
        "import sys, pytest_qlab.methods.quip, pytest_qlab.methods.spqr;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_named_and_checked() -> None:
    assert (Quip().id, Quip().stream) == ("quip-w4", "quantized")
    method = Quip(bits=2, transform="hadamard", rescale=False, greedy_passes=2, seed=7)
    assert method.id == "quip-w2-greedy_passes=2-no_rescale-seed=7-transform=hadamard"
    for wrong in ({"bits": 8}, {"transform": "fourier"}, {"seed": -1}, {"damp_percent": 1.0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Quip(**cast(Any, wrong))
