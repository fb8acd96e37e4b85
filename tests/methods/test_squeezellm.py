"""SqueezeLLM: tables that gradients weigh, outliers by count, and a lab from text to bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.errors import MethodError
from pytest_qlab.formats import RowLookup, WithOutliers
from pytest_qlab.methods.squeezellm import SqueezeLlm, largest
from pytest_qlab.solvers.codebook import round_nearest
from pytest_qlab.solvers.kmeans import kmeans_rows
from pytest_qlab.solvers.tables import RowTables
from tests.architectures import ARCHITECTURES
from tests.lab.test_streaming import contents, lab
from tests.lab.tiny import saved_tiny_model, tiny_lab


def known(fisher: Tensor, tokens: int = 10) -> LayerStatistics:
    channel = torch.ones(fisher.shape[1])
    return LayerStatistics(tokens, channel, fisher=fisher)


def problem(rows: int = 12, columns: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and squared gradients over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, 1e-8 * torch.randn(rows, columns, generator=generator).mul(2).exp()


def weighted_error(weight: Tensor, found: Tensor, fisher: Tensor) -> float:
    return float((fisher.double() * (weight - found).double().square()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(12, 80), (3, 7), (1, 9), (5, 1), (1, 1), (2, 16)])
def test_every_weight_becomes_the_nearest_entry_of_its_row(
    bits: Any, rows: int, columns: int
) -> None:
    weight, fisher = problem(rows, columns)
    found = SqueezeLlm(bits=bits).quantize(weight, known(fisher)).weight
    assert isinstance(found, RowLookup)
    tables = kmeans_rows(weight, fisher, min(2**bits, columns)).half().float()
    assert torch.equal(found.tables.float(), tables)
    nearest = (weight.unsqueeze(-1) - tables.unsqueeze(1)).abs().amin(-1)
    assert torch.equal((found.dequantize() - weight).abs(), nearest)
    entries = min(2**bits, columns)
    assert found.nbytes == rows * (math.ceil(columns * bits / 8) + 2 * entries)


def test_gradients_decide_where_entries_stand() -> None:
    weight, fisher = problem()
    method = SqueezeLlm(bits=3)
    weighted = method.quantize(weight, known(fisher)).weight.dequantize()
    plain = method.quantize(weight, known(torch.ones_like(weight))).weight.dequantize()
    assert weighted_error(weight, weighted, fisher) < 0.6 * weighted_error(weight, plain, fisher)
    ones = torch.ones_like(fisher)
    assert weighted_error(weight, plain, ones) < weighted_error(weight, weighted, ones)


def test_a_layer_that_no_gradient_reached_is_clustered_as_it_is() -> None:
    weight, fisher = problem()
    found = SqueezeLlm().quantize(weight, known(torch.zeros_like(fisher), tokens=0)).weight
    expected = round_nearest(weight, RowTables(4))
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_scales_of_weights_and_gradients_do_not_matter(scale: float) -> None:
    weight, fisher = problem()
    expected = SqueezeLlm().quantize(weight, known(fisher)).weight.dequantize()
    found = SqueezeLlm().quantize(weight * scale, known(fisher)).weight.dequantize()
    torch.testing.assert_close(found / scale, expected, rtol=0, atol=2e-3)
    found = SqueezeLlm().quantize(weight, known(fisher * scale)).weight.dequantize()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_points_are_what_a_solver_may_ask_for() -> None:
    """Column by column, as solvers with feedback do it."""
    weight, fisher = problem(5, 24)
    points = RowTables(3, fisher).fit(weight)
    columns = torch.tensor([7, 3, 20])
    codes = points.nearest(weight[:, columns] + 0.3, columns)
    found = points.decode(codes, columns)
    for i in range(5):
        for j, column in enumerate(columns.tolist()):
            table = points.tables[i].float()
            nearest = table[(table - weight[i, column] - 0.3).abs().argmin()]
            assert float(found[i, j]) == float(nearest)
    everywhere = torch.arange(24)
    codes = points.nearest(weight, everywhere)
    assert torch.equal(points.pack(codes).dequantize(), points.decode(codes, everywhere))


def test_constant_and_empty_rows_are_exact() -> None:
    weight, fisher = problem()
    weight[0], weight[1], weight[2] = 0, 0.5, -0.25
    weight[2, ::2] = 0.75
    for method in (SqueezeLlm(bits=2), SqueezeLlm(bits=2, dense_and_sparse=True)):
        found = method.quantize(weight, known(fisher)).weight.dequantize()
        assert torch.equal(found[:3], weight[:3])


def test_outliers_are_the_most_sensitive_and_then_the_largest() -> None:
    weight, fisher = problem(50, 80)
    method = SqueezeLlm(bits=3, dense_and_sparse=True, sensitive_percent=0.5, outlier_percent=1)
    found = method.quantize(weight, known(fisher)).weight
    assert isinstance(found, WithOutliers)
    # 0.5 % of 4000 is 20: all above the 20th. Of the others, 1 % is 40.
    by_gradient = set(fisher.flatten().argsort(descending=True)[:19].tolist())
    order = weight.abs().flatten().argsort(descending=True).tolist()
    by_size = [place for place in order if place not in by_gradient][:39]
    expected = by_gradient | set(by_size)
    assert set(found.mask().flatten().nonzero().flatten().tolist()) == expected
    mask = found.mask()
    assert torch.equal(found.dequantize()[mask], weight[mask].half().float())
    assert found.nbytes == found.dense.nbytes + 4 * len(expected) + 4 * 51
    # What is kept apart does not pull at the tables.
    tables = kmeans_rows(weight, fisher * ~mask, 8).half()
    assert isinstance(found.dense, RowLookup)
    assert torch.equal(found.dense.tables, tables)


def test_outliers_reduce_the_weighted_error() -> None:
    weight, fisher = problem(50, 80)
    errors = [
        weighted_error(weight, method.quantize(weight, known(fisher)).weight.dequantize(), fisher)
        for method in (
            SqueezeLlm(bits=3),
            SqueezeLlm(bits=3, dense_and_sparse=True),
            SqueezeLlm(bits=3, dense_and_sparse=True, outlier_percent=5),
            SqueezeLlm(bits=3, dense_and_sparse=True, sensitive_percent=5, outlier_percent=5),
        )
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_matrix_of_outliers_and_one_without_are_both_fine() -> None:
    weight, fisher = problem(4, 10)
    every = SqueezeLlm(dense_and_sparse=True, sensitive_percent=100).quantize(weight, known(fisher))
    assert float((every.weight.dequantize() - weight).abs().max()) < 2e-3
    few = SqueezeLlm(dense_and_sparse=True).quantize(weight, known(fisher)).weight
    assert isinstance(few, WithOutliers)
    assert not bool(few.mask().any())


@pytest.mark.parametrize("percent", [0.0, 3.0, 50.0, 100.0])
def test_the_largest_are_above_the_kth(percent: float) -> None:
    values = torch.rand(6, 17, generator=torch.Generator().manual_seed(2))
    values[2] = 0.5  # equal ones
    count = int(102 * percent / 100)
    expected = torch.zeros(6, 17, dtype=torch.bool)
    if count:
        expected = values > sorted(values.flatten().tolist(), reverse=True)[count - 1]
    assert torch.equal(largest(values, percent), expected)


def test_what_is_missing_or_wrong_is_refused() -> None:
    weight, fisher = problem()
    method = SqueezeLlm()
    with pytest.raises(MethodError, match=r"squared gradients of the loss of up_proj"):
        method.quantize(weight, None, name="up_proj")
    with pytest.raises(MethodError, match="squared gradients of the loss"):
        method.quantize(weight, replace(known(fisher), fisher=None))
    with pytest.raises(MethodError, match=r"\(12, 80\), its weight has \(11, 80\)"):
        method.quantize(weight[:11], known(fisher))
    broken = fisher.clone()
    broken[0, 0] = math.nan
    with pytest.raises(MethodError, match="NaN"):
        method.quantize(weight, known(broken))
    with pytest.raises(MethodError, match="NaN"):
        method.quantize(weight * math.nan, known(fisher))


def test_what_it_asks_for_and_how_it_is_called() -> None:
    assert (SqueezeLlm().stream, sorted(SqueezeLlm().needs)) == ("original", ["fisher"])
    assert SqueezeLlm(bits=3).id == "squeezellm-w3"
    assert SqueezeLlm(dense_and_sparse=True).id == "squeezellm-w4-dense_and_sparse"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_lab_collects_gradients_once_and_quantizes(tmp_path: Path, architecture: str) -> None:
    made = tiny_lab(tmp_path, architecture)
    four, three = made.candidate("squeezellm"), made.candidate("squeezellm:bits=3")
    sparse = made.candidate("squeezellm:bits=3:dense_and_sparse=true:outlier_percent=3")
    assert 0 < four.kl.mean < three.kl.mean
    assert sparse.kl.mean < three.kl.mean
    built = [name for name in made.store.built if name.startswith("gradients/")]
    assert len(built) == 1
    assert made.store.built[built[0]] == 1
    again = tiny_lab(tmp_path, architecture)
    assert again.candidate("squeezellm:bits=2").kl.mean > three.kl.mean
    assert not [name for name in again.store.built if name.startswith("gradients/")]


def test_block_by_block_it_needs_gradients_that_are_there(tmp_path: Path) -> None:
    model = saved_tiny_model(tmp_path / "model")
    streamed = lab(model, tmp_path / "store", stream="always")
    method = SqueezeLlm(bits=3)
    with pytest.raises(MethodError, match="--qlab-stream=never"):
        streamed.checkpoint(method)
    lab(model, tmp_path / "store", stream="never").gradients()
    whole = lab(model, tmp_path / "whole", stream="never")
    assert contents(streamed.checkpoint(method)) == contents(whole.checkpoint(method))
    assert not streamed.model.is_loaded
