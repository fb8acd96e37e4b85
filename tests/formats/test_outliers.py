"""Outliers: they stand where they stood, they are counted, and damage to them is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import WithOutliers, load_packed
from pytest_qlab.solvers.grid import GridRule, round_to_nearest
from tests.formats.test_packed_weights import reloaded


def example(rows: int, columns: int, share: float, seed: int) -> tuple[WithOutliers, torch.Tensor]:
    """A rounded weight with outliers, and what it must stand for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < share
    dense = round_to_nearest(weight, GridRule(3), 8).pack()
    expected = dense.dequantize().clone()
    for i in range(rows):
        for j in range(columns):
            if mask[i, j]:
                expected[i, j] = weight[i, j].half().float()
    return WithOutliers.pack(dense, weight, mask), expected


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
def test_outliers_replace_the_dense_weights(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, share: float, seed: int
) -> None:
    packed, expected = example(rows, columns, share, seed)
    assert torch.equal(packed.dequantize(), expected)
    again, stored = reloaded(packed, tmp_path_factory.mktemp("packed") / "file")
    assert torch.equal(again.dequantize(), expected)
    count = int(packed.mask().sum())
    assert packed.nbytes == packed.dense.nbytes + 4 * count + 4 * (rows + 1)
    assert stored >= packed.nbytes > stored - 8
    index = torch.randint(0, rows, (2 * rows,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(packed.take_rows(index).dequantize(), expected[index])


def test_values_beyond_float16_are_kept_in_float32() -> None:
    weight = torch.tensor([[1e6, 1.0]])
    dense = round_to_nearest(torch.zeros(1, 2), GridRule(2), -1).pack()
    packed = WithOutliers.pack(dense, weight, torch.tensor([[True, False]]))
    assert packed.dequantize()[0, 0] == 1e6


def test_wide_rows_take_wide_columns() -> None:
    weight = torch.zeros(1, 2**16 + 1)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[0, -1] = True
    dense = round_to_nearest(weight, GridRule(2), -1).pack()
    assert WithOutliers.pack(dense, weight + 2, mask).dequantize()[0, -1] == 2


@pytest.mark.parametrize("damage", ["columns", "starts", "missing"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    packed, _ = example(4, 16, 0.5, 0)
    tensors = dict(packed.tensors())
    if damage == "columns":
        tensors["outlier_columns"] = torch.full_like(tensors["outlier_columns"].int(), 16)
    elif damage == "starts":
        tensors["row_starts"] = tensors["row_starts"].flip(0)
    else:
        del tensors["outlier_values"]
    with pytest.raises(CorruptEntryError):
        load_packed(packed.metadata(), tensors)
