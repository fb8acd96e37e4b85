"""`hqq`, `nf4`, `fp4`, `mxfp4`, `nvfp4` as methods: options, shapes, refusals, a whole model."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError

from pytest_qlab.errors import MethodError
from pytest_qlab.formats import AffineGroups, BlockwiseTable, MicroscaledFloat4, PackedWeight
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.blockwise import Fp4, Nf4
from pytest_qlab.methods.hqq import Hqq
from pytest_qlab.methods.microscaled import Mxfp4, Nvfp4
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.specs import parse_specs
from tests.lab.tiny import tiny_lab
from tests.methods.test_methods import layer, unreached

ALL: list[type[Method]] = [Hqq, Nf4, Fp4, Mxfp4, Nvfp4]
VARIANTS: list[Method] = [
    *(kind() for kind in ALL),
    Hqq(bits=2, group_size=16),
    Hqq(optimize=False),
    Nf4(double_quant=True),
    Fp4(block_size=32),
    Mxfp4(scale="ceil"),
    Mxfp4(scale="even"),
    Nvfp4(four_over_six=True),
]


def same(one: PackedWeight, other: PackedWeight) -> bool:
    """By their bytes, since torch does not compare tensors of 8-bit floats."""
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: method.id)
@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (3, 41), (3, 7), (1, 9), (5, 1), (1, 1)])
def test_weights_of_any_shape(method: Method, rows: int, columns: int) -> None:
    weight, _ = layer(rows, columns)
    before = weight.clone()
    found = method.quantize(weight, None, name="block.layer")
    assert found.activation is None
    assert found.weight.shape == (rows, columns)
    error = found.weight.dequantize() - weight
    assert float(error.abs().max()) < 0.5 * float(weight.abs().max())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: method.id)
def test_rows_of_zeros_and_constant_rows(method: Method) -> None:
    weight, _ = layer(6, 128)
    weight[1], weight[2], weight[3] = 0, 0.25, -1.0
    found = method.quantize(weight, None).weight.dequantize()
    assert not found[1].any()
    # What each format's scales cost: float16, 3 bits of mantissa, 8 bits around a mean; none.
    costs = {"hqq": 2.0**-8, "nvfp4": 2.0**-4, "nf4-double_quant": 0.05}
    within = costs.get(method.id, costs.get(method.name, 1e-6))
    assert torch.allclose(found[2:4], weight[2:4], rtol=within, atol=0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(kind: type[Method], poison: float) -> None:
    weight, _ = layer()
    weight[3, 5] = poison
    with pytest.raises(MethodError, match=r"layers\.7\.up_proj contains NaN"):
        kind().quantize(weight, None, name="layers.7.up_proj")


@pytest.mark.parametrize("kind", ALL)
def test_no_calibration_is_asked_for_and_none_used(kind: type[Method]) -> None:
    weight, statistics = layer()
    method = kind()
    assert (method.stream, method.needs) == ("none", frozenset())
    expected = method.quantize(weight, None).weight
    assert same(method.quantize(weight, statistics).weight, expected)
    assert same(method.quantize(weight, unreached(64)).weight, expected)


@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: method.id)
def test_threads_get_the_same_bits(method: Method) -> None:
    weights = [layer(16, 96, seed)[0] for seed in range(8)]
    alone = [method.quantize(weight, None).weight for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda weight: method.quantize(weight, None).weight, weights)
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_options_reach_the_bits() -> None:
    weight, _ = layer(8, 128)
    for bits in (2, 3, 4, 8):
        for group_size in (16, 64, -1):
            method = Hqq(bits=cast(Any, bits), group_size=group_size)
            found = method.quantize(weight, None).weight
            assert isinstance(found, AffineGroups)
            assert (found.bits, found.group_size) == (bits, group_size)
            assert found.zeros().dtype == torch.float16
            groups = 1 if group_size == -1 else 128 // group_size
            assert found.nbytes == 8 * (16 * bits + 4 * groups)
    for blockwise, table, nbytes in (
        (Nf4(), "nf4", 4 * 16),
        (Fp4(block_size=32), "fp4", 4 * 32),
        (Nf4(double_quant=True), "nf4", 16 + 4 + 4),
    ):
        table_weight = blockwise.quantize(weight, None).weight
        assert isinstance(table_weight, BlockwiseTable)
        assert table_weight.table == table
        assert table_weight.nbytes == 8 * 64 + nbytes
    for scaled, nbytes in ((Mxfp4(), 8 * 4), (Nvfp4(), 8 * 8 + 4)):
        block_weight = scaled.quantize(weight, None).weight
        assert isinstance(block_weight, MicroscaledFloat4)
        assert block_weight.nbytes == 8 * 64 + nbytes


def test_every_option_of_hqq_changes_something() -> None:
    weight, _ = layer(16, 128)
    base = Hqq(bits=2, group_size=32)
    expected = base.quantize(weight, None).weight
    for option in ({"optimize": False}, {"iterations": 1}, {"lp_norm": 0.3}, {"beta": 1.0}):
        method = base.model_copy(update=option)
        assert not same(method.quantize(weight, None).weight, expected), option


def test_ids_are_readable_and_differ() -> None:
    assert [method.id for method in VARIANTS] == [
        "hqq-w4g64",
        "nf4",
        "fp4",
        "mxfp4",
        "nvfp4",
        "hqq-w2g16",
        "hqq-w4g64-no_optimize",
        "nf4-double_quant",
        "fp4-block_size=32",
        "mxfp4-scale=ceil",
        "mxfp4-scale=even",
        "nvfp4-four_over_six",
    ]
    names = "hqq,nf4,fp4,mxfp4,nvfp4"
    assert [spec.id for spec in parse_specs([names])] == [method.id for method in VARIANTS[:5]]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Hqq, {"bits": 1}),
        (Hqq, {"group_size": 4}),
        (Hqq, {"iterations": 0}),
        (Hqq, {"lp_norm": 0.0}),
        (Hqq, {"lp_norm": 1.5}),
        (Hqq, {"beta": 0.0}),
        (Hqq, {"beta": math.inf}),
        (Nf4, {"block_size": 0}),
        (Fp4, {"bits": 4}),
        (Mxfp4, {"scale": "round"}),
        (Nvfp4, {"block_size": 32}),
    ],
)
def test_wrong_options_are_refused(kind: Callable[..., Method], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        kind(**options)


def test_reading_options_imports_no_torch() -> None:
    modules = sorted({kind.__module__ for kind in ALL})
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hqq_beats_rounding_where_bits_are_few() -> None:
    weight, _ = layer(32, 256)

    def error(method: Method) -> float:
        return float((method.quantize(weight, None).weight.dequantize() - weight).norm())

    for bits in (2, 3):
        width: Any = bits
        assert error(Hqq(bits=width)) < error(Rtn(bits=width, group_size=64))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_is_quantized_stored_and_read_again(tmp_path: Path, architecture: str) -> None:
    for method in VARIANTS:
        first = tiny_lab(tmp_path, architecture).candidate(method)
        assert 0 < first.kl.mean < 1
        again = tiny_lab(tmp_path, architecture).candidate(method)
        expected = {name: module.weight for name, module in packed_layers(first.model)}
        for name, module in packed_layers(again.model):
            assert torch.equal(module.weight, expected[name])


def packed_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    from pytest_qlab.kernels.linear import PackedLinear

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]
    assert found
    return found
