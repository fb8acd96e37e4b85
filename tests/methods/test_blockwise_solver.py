"""NF4 and FP4: bitsandbytes' bytes, nearest numbers by brute force, 8-bit absmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.formats import BlockwiseTable
from pytest_qlab.formats.blockwise import TABLES, dynamic_map
from pytest_qlab.solvers.blockwise import Float4, NormalFloat4, Table, quantize_absmax
from pytest_qlab.solvers.codebook import round_nearest
from tests.toy import digest, toy_weight


def packed(weight: torch.Tensor, codebook: NormalFloat4 | Float4) -> BlockwiseTable:
    found = round_nearest(weight, codebook)
    assert isinstance(found, BlockwiseTable)
    return found


def codes_of(normalized: torch.Tensor, table: str) -> torch.Tensor:
    return Table.named(table, normalized.device).nearest(normalized)


@pytest.mark.parametrize(
    ("codebook", "sha", "first", "expected"),
    [
        (NormalFloat4(), "a90a46e922e873b833e00ad8ab2b9921", "56718b2825967777", 0.094303),
        (
            NormalFloat4(double_quant=True),
            "a90a46e922e873b833e00ad8ab2b9921",
            "56718b2825967777",
            0.094305,
        ),
        (Float4(), "1fc7ebadfd07dcdec607117853520758", "ee9a14a1", 0.120471),
    ],
)
def test_bytes_are_those_of_bitsandbytes(
    codebook: NormalFloat4 | Float4, sha: str, first: str, expected: float
) -> None:
    """Made by bitsandbytes 0.50.2 on its CPU path from the same weight."""
    weight = toy_weight()
    found = packed(weight, codebook)
    assert digest(found.packed_codes).startswith(sha)
    assert bytes(found.packed_codes.tolist()).hex().startswith(first)
    assert float(found.absmax()[0]) == pytest.approx(0.96921635, rel=0.01)
    error = float((found.dequantize() - weight).norm() / weight.norm())
    assert error == pytest.approx(expected, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(value=st.floats(-1.5, 1.5, width=32))
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_codes_are_of_the_nearest_number(table: str, value: float) -> None:
    (code,) = codes_of(torch.tensor([value]), table).tolist()
    numbers = np.array(TABLES[table])
    # Float32 rounds the middles between two numbers, by less than this.
    assert abs(numbers[code] - value) <= np.abs(numbers - value).min() + 1e-7


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_halfway_is_the_lower_number(table: str) -> None:
    numbers = torch.tensor(sorted({value + 0.0 for value in TABLES[table]}))
    middles = (numbers[:-1] + numbers[1:]) / 2
    codes = codes_of(middles, table).to(torch.int64)
    assert torch.equal(torch.tensor(TABLES[table])[codes], numbers[:-1])
    above = codes_of(torch.nextafter(middles, torch.tensor(2.0)), table).to(torch.int64)
    assert torch.equal(torch.tensor(TABLES[table])[above], numbers[1:])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 50),
    block_size=st.sampled_from([8, 64]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("kind", [NormalFloat4, Float4])
def test_blocks_go_across_rows(
    kind: type[NormalFloat4 | Float4], rows: int, columns: int, block_size: int, seed: int
) -> None:
    """Block by block of the flattened matrix, with the numbers of the table tried one by one."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = packed(weight, kind(block_size))
    flat, got = weight.flatten().numpy(), found.dequantize().flatten().numpy()
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size].astype(np.float64)
        points = np.array(TABLES[kind.table]) * np.abs(block).max()
        distance = np.abs(block[:, None] - points).min(1)
        assert np.abs(got[start : start + block_size] - block) == pytest.approx(distance, abs=1e-6)


def test_absmax_codes_are_the_nearest_levels() -> None:
    absmax = torch.rand(600, generator=torch.Generator().manual_seed(0))
    found = quantize_absmax(absmax)
    levels = dynamic_map(absmax.device).double().numpy()
    exact = absmax.double().numpy()
    assert float(found.offset) == pytest.approx(exact.mean(), rel=1e-6)
    for block in range(3):
        part = exact[256 * block : 256 * block + 256] - float(found.offset)
        scale = np.abs(part).max()
        assert float(found.scales[block]) == pytest.approx(scale, rel=1e-6)
        distance = np.abs(part[:, None] - levels * scale)
        codes = found.codes[256 * block : 256 * block + 256].numpy()
        taken = distance[np.arange(len(part)), codes]
        assert taken == pytest.approx(distance.min(1), abs=1e-7)
    assert len(found.scales) == 3


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", [NormalFloat4, Float4])
def test_zeros_stay_zero(kind: type[NormalFloat4 | Float4], double_quant: bool) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight[2], weight[3, 64:] = 0, 1e-40
    found = packed(weight, kind(64, double_quant)).dequantize()
    assert not found[2].any()
    assert float(found[3, 64:].abs().max()) < 1e-38 or double_quant


@pytest.mark.parametrize("double_quant", [False, True])
def test_equal_blocks_need_no_spread_of_absmax(double_quant: bool) -> None:
    weight = torch.ones(2, 64)
    found = packed(weight, NormalFloat4(32, double_quant))
    assert torch.equal(found.dequantize(), weight)


def test_bits_per_weight() -> None:
    weight = torch.randn(256, 128)  # 512 blocks of 64
    assert packed(weight, NormalFloat4()).bits_per_weight == 4 + 32 / 64
    double = packed(weight, NormalFloat4(double_quant=True)).bits_per_weight
    assert double == 4 + 8 / 64 + 32 / (64 * 256) + 32 / weight.numel()
