"""Blocks of the flattened matrix: bytes, values, rows that are taken, damage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import BlockwiseTable, load_packed
from pytest_qlab.formats.blockwise import TABLES, QuantizedAbsmax, dynamic_map
from tests.formats.test_packed_weights import reloaded


def example(
    rows: int, columns: int, block_size: int, *, table: str, double_quant: bool, seed: int
) -> tuple[BlockwiseTable, Tensor]:
    """Random bits, and what they stand for by a loop over the flattened matrix."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    blocks = -(-rows * columns // block_size)
    values = torch.rand(blocks, generator=generator)
    absmax: Tensor | QuantizedAbsmax = values
    if double_quant:
        levels = dynamic_map(torch.device("cpu"))
        coded = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        scales = torch.rand(-(-blocks // 256), generator=generator)
        absmax = QuantizedAbsmax(coded, scales, torch.tensor([2.0]))
        values = torch.stack(
            [levels[int(coded[b])] * scales[b // 256] + 2.0 for b in range(blocks)]
        )
    weight = torch.empty(rows * columns)
    for k in range(rows * columns):
        number = torch.tensor(TABLES[table][int(codes.view(-1)[k])])
        weight[k] = number * values[k // block_size]
    packed = BlockwiseTable.pack(codes, absmax, table=table, block_size=block_size)
    return packed, weight.view(rows, columns)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([8, 16, 64]),
    table=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_are_what_their_bits_say(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    block_size: int,
    table: str,
    double_quant: bool,
    seed: int,
) -> None:
    packed, weight = example(
        rows, columns, block_size, table=table, double_quant=double_quant, seed=seed
    )
    assert torch.equal(packed.dequantize(), weight)
    again, payload = reloaded(packed, tmp_path_factory.mktemp("packed") / "w.safetensors")
    assert torch.equal(again.dequantize(), weight)
    assert again.metadata() == packed.metadata()
    assert packed.nbytes == again.nbytes <= payload < packed.nbytes + 8
    blocks = -(-rows * columns // block_size)
    scales = blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks
    assert packed.nbytes == (rows * columns + 1) // 2 + scales


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([8, 16, 64]),
    double_quant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_keep_their_values_wherever_blocks_cross_them(
    rows: int, columns: int, block_size: int, double_quant: bool, seed: int
) -> None:
    packed, weight = example(
        rows, columns, block_size, table="nf4", double_quant=double_quant, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, rows, (2 * rows,), generator=generator)
    taken = packed.take_rows(first)
    assert taken.shape == (2 * rows, columns)
    assert torch.equal(taken.dequantize(), weight[first])
    assert torch.equal(taken.codes(), packed.codes()[first])
    again = load_packed(taken.metadata(), taken.tensors())
    second = torch.randint(0, 2 * rows, (rows,), generator=generator)
    assert torch.equal(again.take_rows(second).dequantize(), weight[first][second])


def test_whole_blocks_stay_as_they_are_when_rows_are_taken() -> None:
    packed, _ = example(6, 128, 64, table="nf4", double_quant=False, seed=1)
    taken = packed.take_rows(torch.tensor([4, 1, 4]))
    assert taken.row_offsets is None
    assert taken.bits_per_weight == packed.bits_per_weight == 4.5


def test_no_rows_can_be_taken() -> None:
    packed, _ = example(3, 20, 8, table="fp4", double_quant=False, seed=1)
    assert packed.take_rows(torch.empty(0, dtype=torch.int64)).dequantize().shape == (0, 20)


@pytest.mark.parametrize(("table", "zero"), [("nf4", 7), ("fp4", 0)])
def test_the_first_of_two_is_in_the_high_half(table: str, zero: int) -> None:
    codes = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    packed = BlockwiseTable.pack(codes, torch.ones(2), table=table, block_size=8)
    assert packed.packed_codes.tolist() == [0x12, 0x34, 0x56, 0x78, 0x90 | zero]


def test_the_dynamic_map() -> None:
    """Facts of the map that bitsandbytes makes."""
    levels = dynamic_map(torch.device("cpu"))
    assert len(levels) == len(set(levels.tolist())) == 256
    assert torch.equal(levels, levels.sort().values)
    assert levels[:2].tolist() == pytest.approx([-0.9929687, -0.9789063], abs=1e-7)
    assert float(levels.double().sum()) == pytest.approx(1.0, abs=1e-6)
    assert levels[-1] == 1
    assert int((levels == 0).sum()) == 1
    assert torch.equal(levels[:127], -levels[128:255].flip(0))


def test_tables_are_sorted_or_signed() -> None:
    nf4, fp4 = TABLES["nf4"], TABLES["fp4"]
    assert list(nf4) == sorted(set(nf4))
    assert [nf4[0], nf4[7], nf4[15]] == [-1, 0, 1]
    assert [-value for value in fp4[:8]] == list(fp4[8:])
    # 0.0625, 8, 12, 4, 6, 2, 3 twelfths.
    expected = [0, 0.005208333, 0.66666669, 1, 0.33333334, 0.5, 0.16666667, 0.25]
    assert list(fp4[:8]) == pytest.approx(expected, rel=1e-7)


Damage = Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: ({k: v for k, v in t.items() if k != "codes"}, m), "codes.*missing"),
        (lambda t, m: ({**t, "codes": t["codes"][1:]}, m), "codes.*shape"),
        (lambda t, m: ({**t, "absmax_codes": t["absmax_codes"][1:]}, m), "absmax_codes.*shape"),
        (lambda t, m: ({**t, "absmax_scales": torch.ones(2)}, m), "absmax_scales.*shape"),
        (lambda t, m: ({**t, "absmax_offset": torch.ones(2)}, m), "absmax_offset.*shape"),
        (lambda t, m: ({**t, "row_offsets": torch.ones(2)}, m), "row_offsets.*shape"),
        (lambda t, m: ({**t, "row_offsets": torch.full((3,), 16)}, m), "outside of its first"),
        (lambda t, m: ({"codes": t["codes"]}, m), "absmax.*missing"),
        (lambda t, m: (t, {**m, "table": "nf3"}), "nf3.*nf4, fp4"),
    ],
)
def test_damaged_tensors_are_refused(damage: Damage, message: str) -> None:
    packed, _ = example(3, 40, 16, table="nf4", double_quant=True, seed=0)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)


@pytest.mark.parametrize(
    ("codes", "absmax", "table", "message"),
    [
        (torch.full((1, 8), 16), torch.ones(1), "nf4", "outside of 0 .. 15"),
        (torch.zeros(1, 8), torch.ones(1), "nf3", "nf3.*nf4, fp4"),
        (torch.zeros(1, 8), torch.ones(1).half(), "nf4", "not as torch.float16"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    codes: Tensor, absmax: Tensor, table: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockwiseTable.pack(codes, absmax, table=table, block_size=8)
