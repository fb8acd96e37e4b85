"""`ggml` and `gguf`: the bits of one layer, what is refused, names and specifications."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.errors import MethodError
from pytest_qlab.formats.ggml import GGML_TYPES, PLAIN_TYPES, GgmlBlocks
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.ggml import Ggml, GgmlTypeName
from pytest_qlab.methods.gguf import Gguf
from pytest_qlab.solvers.ggml import quantize_ggml
from pytest_qlab.specs import parse_specs
from tests.methods.gguf_checks import BYTES, ggml, gguf, same, type_of
from tests.methods.oracles import correlated

BLIND = ("Q8_0", "MXFP4", "F16", "BF16", "F32")
"""Types that take no notice of importance."""


def layer(rows: int = 8, columns: int = 512, seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    weight, inputs, _ = correlated(rows, columns, 64, seed)
    return weight.float(), statistics_of(inputs.float())


def statistics_of(inputs: Tensor) -> LayerStatistics:
    return LayerStatistics(len(inputs), inputs.square().sum(0))


def test_every_type_can_be_asked_for() -> None:
    assert sorted(get_args(GgmlTypeName)) == sorted(GGML_TYPES | PLAIN_TYPES) == sorted(BYTES)


@pytest.mark.parametrize("type", BYTES)
@pytest.mark.parametrize("imatrix", [False, True])
def test_ggml_stores_the_type_asked_for_in_the_bytes_of_its_layout(
    type: str, imatrix: bool
) -> None:
    weight, statistics = layer()
    before = weight.clone()
    found = ggml(type, imatrix=imatrix).quantize(weight, statistics, name="up_proj")
    assert type_of(found.weight) == type
    assert found.weight.shape == (8, 512)
    assert found.weight.nbytes == 8 * 2 * BYTES[type]
    assert found.activation is None
    assert torch.equal(weight, before)


def test_error_falls_as_bits_rise() -> None:
    weight, _ = layer(16)
    order = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "F32"]
    errors = [
        float((ggml(type).quantize(weight, None).weight.dequantize() - weight).norm())
        for type in order
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert errors[0] < 0.4 * float(weight.norm())


@pytest.mark.parametrize(
    ("type", "columns", "taken"),
    [
        ("Q2_K", 96, "Q4_0"),
        ("Q3_K", 96, "Q4_0"),
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 288, "Q5_1"),
        ("Q6_K", 288, "Q8_0"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("Q4_0", 96, "Q4_0"),
        ("MXFP4", 96, "MXFP4"),
        ("Q4_K", 41, "F16"),
        ("Q8_0", 48, "F16"),
        ("BF16", 41, "BF16"),
        ("F32", 1, "F32"),
    ],
)
def test_rows_that_do_not_fit_get_the_type_that_llama_cpp_takes(
    type: str, columns: int, taken: str
) -> None:
    weight, _ = layer(4, columns)
    found = ggml(type).quantize(weight, None).weight
    assert type_of(found) == taken
    assert (found.dequantize() - weight).norm() < 0.2 * weight.norm()


@pytest.mark.parametrize("type", BYTES)
def test_importance_changes_the_bits_where_the_type_searches(type: str) -> None:
    weight, statistics = layer()
    plain = ggml(type).quantize(weight, None).weight
    weighted = ggml(type, imatrix=True).quantize(weight, statistics).weight
    assert same(plain, weighted) == (type in BLIND)


@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q4_0", "IQ4_XS"])
def test_importance_lowers_the_error_that_it_weighs(type: str) -> None:
    weight, statistics = layer(32)
    scale = torch.linspace(0.1, 4, 512) ** 2
    statistics = replace(statistics, square_sum=statistics.square_sum * scale)
    errors = []
    for method, known in ((ggml(type), None), (ggml(type, imatrix=True), statistics)):
        delta = method.quantize(weight, known).weight.dequantize() - weight
        errors.append(float((delta.square() @ statistics.square_sum).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_importance_is_the_mean_square_of_the_inputs() -> None:
    weight, _ = layer()
    inputs = torch.randn(40, 512, generator=torch.Generator().manual_seed(1))
    found = ggml("Q4_K", imatrix=True).quantize(weight, statistics_of(inputs)).weight
    expected = quantize_ggml(weight, "Q4_K", inputs.square().mean(0))
    assert torch.equal(cast(GgmlBlocks, found).data, expected)


def test_an_expert_that_no_token_reached_has_columns_of_equal_importance() -> None:
    """As in llama.cpp's imatrix, which stores 1 for the missing experts of a tensor."""
    weight, statistics = layer()
    nothing = LayerStatistics(0, torch.zeros(512))
    found = ggml("Q4_K", imatrix=True).quantize(weight, nothing).weight
    expected = quantize_ggml(weight, "Q4_K", torch.ones(512))
    assert torch.equal(cast(GgmlBlocks, found).data, expected)
    assert not same(found, ggml("Q4_K").quantize(weight, None).weight)
    assert not same(found, ggml("Q4_K", imatrix=True).quantize(weight, statistics).weight)


def test_what_cannot_be_quantized_is_refused_by_name() -> None:
    weight, statistics = layer()
    with pytest.raises(MethodError, match=r"'ggml' needs .* of up_proj"):
        ggml("Q4_K", imatrix=True).quantize(weight, None, name="up_proj")
    with pytest.raises(MethodError, match="512 input channels"):
        ggml("Q4_K", imatrix=True).quantize(weight[:, :256], statistics, name="up_proj")
    for poison in (math.nan, math.inf):
        weight[2, 3] = poison
        with pytest.raises(MethodError, match="up_proj contains NaN"):
            ggml("Q4_K").quantize(weight, None, name="up_proj")
    weight[2, 3] = 1e6
    with pytest.raises(MethodError, match=r"up_proj holds weights of magnitude 1e\+06.*F16"):
        ggml("F16").quantize(weight, None, name="up_proj")
    weight[2, 3] = 1e9
    with pytest.raises(MethodError, match=r"up_proj cannot be quantized.*row 2"):
        ggml("Q8_0").quantize(weight, None, name="up_proj")


@pytest.mark.parametrize(
    ("text", "method", "name"),
    [
        ("gguf", Gguf(), "gguf-Q4_K_M"),
        ("gguf:Q4_K_M", Gguf(), "gguf-Q4_K_M"),
        ("gguf:q3_k_s:imatrix=true", gguf("Q3_K_S", imatrix=True), "gguf-Q3_K_S-imatrix"),
        ("gguf:type=F16", gguf("F16"), "gguf-F16"),
        ("ggml:IQ4_XS", ggml("IQ4_XS"), "ggml-IQ4_XS"),
        ("ggml:mxfp4:imatrix", ggml("MXFP4", imatrix=True), "ggml-MXFP4-imatrix"),
    ],
)
def test_specifications(text: str, method: Method, name: str) -> None:
    (spec,) = parse_specs([text])
    assert spec.method == method
    assert spec.id == name


def test_types_that_do_not_exist_are_refused() -> None:
    for kind, type in ((Ggml, "Q4_K_M"), (Gguf, "Q4_K"), (Ggml, ""), (Gguf, 4)):
        with pytest.raises(ValidationError):
            kind.model_validate({"type": type})


def test_calibration_is_wanted_for_importance_only() -> None:
    for method in (Ggml(), Gguf()):
        assert method.wanted_statistics == frozenset()
        assert method.stream == "none"
    for method in (Ggml(imatrix=True), Gguf(imatrix=True)):
        assert method.wanted_statistics == {"channels"}
        assert method.stream == "original"
