"""Errors of weights against known values and explicit outputs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.weights import WeightError, total, weight_error


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Symmetric rounding to nearest in groups of a row, by the largest magnitude."""
    grouped = weight.reshape(-1, group)
    top = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(dim=1, keepdim=True) / top
    codes = (grouped / scale).round().clamp(-top - 1, top)
    return torch.reshape(codes * scale, weight.shape)


@pytest.mark.parametrize(
    ("bits", "group", "decibels"), [(8, 128, 43.8), (4, 32, 20.3), (4, 128, 18.6), (4, 2048, 16.5)]
)
def test_rounded_gaussian_weights_have_the_known_snr(
    bits: int, group: int, decibels: float
) -> None:
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    found = weight_error(weight, rounded(weight, bits, group))
    assert found.snr_db == pytest.approx(decibels, abs=0.3)
    # Errors that do not depend on the weight: cos = 1 / sqrt(1 + 10^(-SNR / 10)).
    assert found.cosine == pytest.approx(1 / math.sqrt(1 + 10 ** (-decibels / 10)), abs=2e-3)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 30), st.floats(1e-3, 2), st.booleans()
)
def test_output_error_is_that_of_the_outputs(
    seed: int, rows: int, columns: int, noise: float, correlated: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, columns, generator=generator)
    if correlated:
        inputs = inputs + 5 * inputs[:, :1]
    weight = torch.randn(rows, columns, generator=generator)
    candidate = weight + noise * torch.randn(rows, columns, generator=generator)
    found = weight_error(weight, candidate, inputs.T @ inputs)
    before = inputs.double() @ weight.double().T
    after = inputs.double() @ candidate.double().T
    error = float((before - after).square().sum())
    assert found.output_error == pytest.approx(error, rel=1e-3)
    assert found.relative_output_error == pytest.approx(
        error / float(before.square().sum()), rel=1e-3
    )
    assert found.snr_db == pytest.approx(
        10 * math.log10(float(weight.square().sum() / (weight - candidate).square().sum())),
        abs=1e-3,
    )


def test_a_layer_of_many_rows_is_summed_in_parts() -> None:
    weight = torch.randn(2500, 3, generator=torch.Generator().manual_seed(1))
    gram = torch.eye(3) * 2
    found = weight_error(weight, weight * 0.5, gram)
    assert found.signal == pytest.approx(float(weight.double().square().sum()))
    assert found.relative_output_error == pytest.approx(0.25)
    assert found.cosine == pytest.approx(1)
    assert found.snr_db == pytest.approx(20 * math.log10(2))
    assert found.weights == 7500


def test_an_exact_copy() -> None:
    weight = torch.randn(4, 6)
    found = weight_error(weight, weight.clone(), torch.eye(6))
    assert (found.snr_db, found.cosine, found.relative_output_error) == (200.0, 1.0, 0.0)


def test_weights_that_are_zero() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert weight_error(zero, zero).snr_db == 200
    lost = weight_error(zero, one, torch.eye(3))
    assert (lost.snr_db, lost.cosine, lost.relative_output_error) == (-200.0, 0.0, None)
    assert weight_error(one, zero).cosine == 0


def test_layers_add_up_as_if_they_were_one() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(30, 8, generator=generator)
    candidate = weight + 0.1 * torch.randn(30, 8, generator=generator)
    inputs = torch.randn(40, 8, generator=generator)
    gram = inputs.T @ inputs
    whole = weight_error(weight, candidate, gram)
    parts = total(
        weight_error(weight[a:b], candidate[a:b], gram) for a, b in ((0, 7), (7, 8), (8, 30))
    )
    assert parts.layers == 3
    assert parts.weights == whole.weights
    for name in ("snr_db", "cosine", "relative_output_error"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_a_layer_without_statistics_leaves_the_total_output_error_open() -> None:
    weight = torch.randn(3, 4)
    known, unknown = weight_error(weight, weight, torch.eye(4)), weight_error(weight, weight)
    assert total([known]).relative_output_error == 0
    assert total([known, unknown]).relative_output_error is None
    assert "layer_error" not in total([known, unknown]).estimates()
    with pytest.raises(MetricError, match="No quantized layer"):
        total([])


def test_estimates_and_plain_fields() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    found = weight_error(weight, weight * 0.9, torch.eye(4))
    estimates = found.estimates("rtn")
    assert {name: float(e) for name, e in estimates.items()} == pytest.approx(
        {"weights.snr_db": 20.0, "weights.cosine": 1.0, "layer_error": 0.01}, rel=1e-5
    )
    assert estimates["weights.snr_db"].unit == "dB"
    assert estimates["weights.snr_db"].detail == "12 weights in 1 layers"
    assert WeightError(**json.loads(json.dumps(asdict(found)))) == found


def test_shapes_must_agree_and_values_be_finite() -> None:
    weight = torch.ones(3, 4)
    with pytest.raises(MetricError, match=r"weights of q_proj have shape \(3, 4\)"):
        weight_error(weight, torch.ones(4, 3), name="q_proj")
    with pytest.raises(MetricError, match=r"Gram matrix \(3, 3\)"):
        weight_error(weight, weight, torch.eye(3))
    broken = weight.clone()
    broken[1, 2] = math.nan
    with pytest.raises(MetricError, match=r"q_proj.*contain NaN"):
        weight_error(weight, broken, name="q_proj")
    with pytest.raises(MetricError, match="contain NaN"):
        weight_error(weight, weight, torch.full((4, 4), math.inf))
