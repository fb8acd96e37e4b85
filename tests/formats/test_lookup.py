"""Lookup tables of rows: what they stand for, what they take, and that damage is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import RowLookup, load_packed
from pytest_qlab.formats.lookup import table_storage_dtype
from tests.formats.test_packed_weights import reloaded


def example(rows: int, columns: int, bits: int) -> tuple[RowLookup, torch.Tensor]:
    """Random codes and tables, and the weight by a loop over its elements."""
    generator = torch.Generator().manual_seed(rows + 7 * columns + bits)
    length = min(2**bits, columns)
    codes = torch.randint(0, length, (rows, columns), generator=generator)
    tables = torch.randn(rows, length, generator=generator).half()
    weight = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            weight[i, j] = tables[i, codes[i, j]].float()
    return RowLookup.pack(codes, tables, bits=bits), weight


@settings(deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.sampled_from([2, 3, 4]))
def test_tables_are_what_their_bits_say(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, bits: int
) -> None:
    packed, weight = example(rows, columns, bits)
    assert packed.shape == (rows, columns)
    assert torch.equal(packed.dequantize(), weight)
    again, payload = reloaded(packed, tmp_path_factory.mktemp("packed") / "w.safetensors")
    assert torch.equal(again.dequantize(), weight)
    assert again.metadata() == packed.metadata()
    assert again.nbytes == packed.nbytes == payload
    index = torch.randint(0, rows, (7,), generator=torch.Generator().manual_seed(rows))
    assert torch.equal(packed.take_rows(index).dequantize(), weight[index])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_per_weight_is_the_formula(bits: int) -> None:
    packed, _ = example(3, 4096, bits)
    assert packed.bits_per_weight == bits + 16 * 2**bits / 4096


@pytest.mark.parametrize(
    ("tables", "dtype"),
    [
        ([[-1.0, 0.0, 65504.0]], torch.float16),
        ([[-70000.0, 0.0, 1.0]], torch.float32),
        ([[0.0, 0.0, 0.0], [0.0, 1e-9, 2.0**-14]], torch.float16),
        ([[-1.0, 0.0, 1.0], [0.0, 1e-9, 2.0**-14.1]], torch.float32),
    ],
)
def test_tables_are_float16_if_they_survive_it(
    tables: list[list[float]], dtype: torch.dtype
) -> None:
    assert table_storage_dtype(torch.tensor(tables)) == dtype


def test_tables_that_would_be_rounded_and_codes_without_an_entry_are_refused() -> None:
    codes = torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match="float64"):
        RowLookup.pack(codes, torch.zeros(1, 3, dtype=torch.float64), bits=2)
    with pytest.raises(ValueError, match="code 2 has no entry in a table of 2"):
        RowLookup.pack(codes, torch.zeros(1, 2), bits=2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: ({"codes": t["codes"]}, m), "tables.*missing"),
        (lambda t, m: ({**t, "tables": t["tables"][:, :1]}, m), "tables.*shape"),
        (lambda t, m: ({**t, "codes": t["codes"][:1]}, m), "codes.*shape"),
        (lambda t, m: ({**t, "codes": t["codes"] | 255}, m), "no entry"),
        (lambda t, m: (t, {**m, "bits": 5}), "codes of 5 bits"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: Any, message: str) -> None:
    packed, _ = example(3, 9, 4)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)
