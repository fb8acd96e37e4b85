"""`ldlq`: its codebooks are those of the methods they are named after, and inputs are minded."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from pytest_qlab.errors import MethodError
from pytest_qlab.specs import parse_specs
from pytest_qlab.testing import statistics_of, toy_problem

NEAREST = {
    "nf4": "nf4",
    "fp4": "fp4",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "fp8": "fp8:activations=false",
}


def quantized(spec: str, weight: Tensor, statistics: object) -> Tensor:
    (found,) = parse_specs([spec])
    return found.method.quantize(weight, cast("None", statistics)).weight.dequantize()


@pytest.mark.parametrize(("codebook", "method"), NEAREST.items())
def test_with_inputs_that_do_not_correlate_it_rounds_to_nearest(codebook: str, method: str) -> None:
    weight, inputs = toy_problem(16, 128)
    statistics = statistics_of(inputs)
    assert statistics.gram is not None
    apart = replace(statistics, gram=torch.diag(statistics.gram.diagonal()))
    found = quantized(f"ldlq:{codebook}", weight, apart)
    assert torch.equal(found, quantized(method, weight, None))


@pytest.mark.parametrize("codebook", [*NEAREST, "table3"])
def test_correlated_inputs_are_minded(codebook: str) -> None:
    weight, inputs = toy_problem(16, 128)
    statistics = statistics_of(inputs)
    assert statistics.gram is not None
    apart = replace(statistics, gram=torch.diag(statistics.gram.diagonal()))
    errors = [
        float((inputs @ (weight - quantized(f"ldlq:{codebook}", weight, each)).T).square().sum())
        for each in (apart, statistics)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_greedy_passes_do_no_harm() -> None:
    weight, inputs = toy_problem(16, 128)
    statistics = statistics_of(inputs)
    errors = [
        float((inputs @ (weight - quantized(spec, weight, statistics)).T).square().sum())
        for spec in ("ldlq:nvfp4", "ldlq:nvfp4:greedy_passes=3")
    ]
    assert errors[1] <= errors[0] * 1.001


def test_tables_mind_the_columns_that_are_used() -> None:
    """One row, two columns of ten used: the table's four entries go to those."""
    weight = torch.tensor([[0.1, 0.9, *(-3.0 + 0.7 * i for i in range(8))]])
    inputs = torch.zeros(64, 10)
    inputs[:32, 0], inputs[32:, 1] = 1.0, 1.0
    found = quantized("ldlq:table2", weight, statistics_of(inputs))
    torch.testing.assert_close(found[0, :2], weight[0, :2].half().float())


def test_a_gram_matrix_that_cannot_be_factored_names_the_layer() -> None:
    weight, inputs = toy_problem(8, 32)
    broken = replace(statistics_of(inputs), gram=-torch.eye(32))
    (spec,) = parse_specs(["ldlq"])
    with pytest.raises(MethodError, match=r"cannot solve up_proj.*256"):
        spec.method.quantize(weight, broken, name="up_proj")
