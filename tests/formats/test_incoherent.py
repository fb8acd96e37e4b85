"""Rotated weights: what they stand for, what they take, their rows, and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import Incoherent, load_packed
from pytest_qlab.formats.transforms import Kind, Transform
from tests.formats.test_packed_weights import reloaded
from tests.formats.test_transforms import dense


def example(
    rows: int, columns: int, bits: int, kind: Kind, rescaled: bool
) -> tuple[Incoherent, Tensor]:
    """A packed weight of random codes, and the weight by matrix products."""
    generator = torch.Generator().manual_seed(rows + 31 * columns + bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = torch.rand(1, generator=generator) + 0.5
    scales = (torch.rand(columns, generator=generator) + 0.5).half() if rescaled else None
    u, v = Transform.of(kind, rows, 1), Transform.of(kind, columns, 2)
    packed = Incoherent.pack(codes, scale, scales, row_transform=u, column_transform=v, bits=bits)
    rotated = float(scale) * (2 * codes.double() / (2**bits - 1) - 1)
    weight = dense(u).T @ rotated @ dense(v)
    return packed, weight if scales is None else weight / scales.double()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4]),
    kind=st.sampled_from(["kronecker", "hadamard"]),
    rescaled=st.booleans(),
)
def test_bits_stand_for_the_product_of_three_matrices(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    bits: int,
    kind: Kind,
    rescaled: bool,
) -> None:
    packed, weight = example(rows, columns, bits, kind, rescaled)
    found = packed.dequantize()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), weight, rtol=1e-6, atol=1e-6)
    again, stored = reloaded(packed, tmp_path_factory.mktemp("packed") / "file")
    assert torch.equal(again.dequantize(), found)
    expected = rows * ((columns * bits + 7) // 8) + 4 + (2 * columns if rescaled else 0)
    assert packed.nbytes == again.nbytes == expected
    assert stored - 8 < expected <= stored
    index = torch.randint(0, rows, (2 * rows,), generator=torch.Generator().manual_seed(rows))
    taken = packed.take_rows(index)
    assert taken.shape == (2 * rows, columns)
    assert torch.equal(taken.dequantize(), found[index])
    assert torch.equal(taken.take_rows(index).dequantize(), found[index][index])
    assert taken.nbytes == expected + 4 * 2 * rows
    restored, _ = reloaded(taken, tmp_path_factory.mktemp("taken") / "file")
    assert torch.equal(restored.dequantize(), found[index])


def test_scales_that_would_be_rounded_when_stored_are_refused() -> None:
    codes = torch.zeros(2, 3)
    transforms = {
        "row_transform": Transform("kronecker", 2, 0),
        "column_transform": Transform("kronecker", 3, 0),
    }
    for scale, columns in ((torch.ones(1).double(), None), (torch.ones(1), torch.ones(3))):
        with pytest.raises(ValueError, match="float32, scales of columns as float16"):
            Incoherent.pack(codes, scale, columns, bits=2, **transforms)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: ({**t, "codes": t["codes"][:1]}, m), "codes.*shape"),
        (lambda t, m: ({**t, "scale": t["scale"].repeat(2)}, m), "scale.*shape"),
        (lambda t, m: ({**t, "column_scales": t["column_scales"][1:]}, m), "column_scales.*shape"),
        (lambda t, m: (t, {**m, "bits": 5}), "codes of 5 bits"),
        (lambda t, m: (t, {**m, "shape": [2, 8]}), "2 rows .* 3 rows"),
        (lambda t, m: ({**t, "rows": torch.tensor([0, 1, 3])}, m), "3 rows"),
        (lambda t, m: (t, {**m, "row_transform": m["column_transform"]}), "order 3"),
    ],
)
def test_damage_is_found(damage: Any, message: str, tmp_path: Path) -> None:
    packed, _ = example(3, 8, 3, "kronecker", rescaled=True)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)
