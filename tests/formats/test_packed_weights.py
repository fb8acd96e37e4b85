"""Packed weights: what they stand for, what they take, and that they survive being saved."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import AffineGroups, PackedWeight, PlainWeight, load_packed
from pytest_qlab.formats.affine import scale_storage_dtype

shapes = st.tuples(st.integers(1, 5), st.integers(1, 150))


def random_affine(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool, scattered: bool = False
) -> tuple[AffineGroups, Tensor]:
    """A packed weight of random bits, and the weight by a loop over its elements."""
    generator = torch.Generator().manual_seed(rows + 7 * columns + bits)
    length = columns if group_size == -1 else min(group_size, columns)
    groups = (columns + length - 1) // length
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    scales = torch.rand(rows, groups, generator=generator).half()
    group_of = torch.arange(columns) // length
    if scattered:
        group_of = group_of[torch.randperm(columns, generator=generator)]
    weight = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            g = int(group_of[j])
            zero = 2 ** (bits - 1) if symmetric else int(zeros[i, g])
            weight[i, j] = scales[i, g].float() * (int(codes[i, j]) - zero)
    packed = AffineGroups.pack(
        codes,
        scales,
        None if symmetric else zeros,
        bits=bits,
        group_size=group_size,
        column_groups=group_of if scattered else None,
    )
    return packed, weight


def reloaded(packed: PackedWeight, path: Path) -> tuple[PackedWeight, int]:
    """Save, load, and say how many bytes of the file are no header."""
    save_file(packed.tensors(), path)
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    metadata = json.loads(json.dumps(packed.metadata()))
    return load_packed(metadata, load_file(path)), path.stat().st_size - 8 - header


@settings(deadline=None)
@given(
    shape=shapes,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 32, 64]),
    symmetric=st.booleans(),
    scattered=st.booleans(),
)
def test_affine_groups_are_what_their_bits_say(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    symmetric: bool,
    scattered: bool,
) -> None:
    packed, weight = random_affine(
        *shape, bits, group_size, symmetric=symmetric, scattered=scattered
    )
    assert packed.shape == shape
    assert torch.equal(packed.dequantize(), weight)
    again, payload = reloaded(packed, tmp_path_factory.mktemp("packed") / "w.safetensors")
    assert torch.equal(again.dequantize(), weight)
    assert again.metadata() == packed.metadata()
    assert again.nbytes == packed.nbytes == payload
    assert packed.bits_per_weight == pytest.approx(8 * payload / weight.numel())


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "expected"),
    [
        (4, 128, False, 4 + 20 / 128),
        (3, 128, False, 3 + 19 / 128),
        (4, -1, False, 4 + 20 / 4096),
        (4, 128, True, 4 + 16 / 128),
        (8, 32, False, 8 + 24 / 32),
    ],
)
def test_bits_per_weight_is_the_formula_where_nothing_is_padded(
    bits: int, group_size: int, symmetric: bool, expected: float
) -> None:
    groups = 1 if group_size == -1 else 4096 // group_size
    zeros = torch.zeros(8, groups, dtype=torch.uint8)
    packed = AffineGroups.pack(
        torch.zeros(8, 4096, dtype=torch.uint8),
        torch.ones(8, groups).half(),
        None if symmetric else zeros,
        bits=bits,
        group_size=group_size,
    )
    # A single 4-bit zero point takes a whole byte.
    padding = 4 / 4096 if group_size == -1 else 0
    assert packed.bits_per_weight == pytest.approx(expected + padding)


def test_a_group_index_costs_32_bits_a_column() -> None:
    plain, _ = random_affine(5, 96, 4, 32, symmetric=False)
    scattered, _ = random_affine(5, 96, 4, 32, symmetric=False, scattered=True)
    assert scattered.nbytes - plain.nbytes == 4 * 96


@pytest.mark.parametrize(
    ("scales", "dtype"),
    [
        ([1.0, 2.0**-17], torch.float16),
        ([1.0, 2.0**-17.01], torch.float32),
        ([65504.0, 1.0], torch.float16),
        ([66000.0, 1.0], torch.float32),
    ],
)
def test_scales_are_stored_in_float16_if_they_survive_it(
    scales: list[float], dtype: torch.dtype
) -> None:
    assert scale_storage_dtype(torch.tensor(scales)) == dtype


def test_scales_that_would_be_rounded_when_stored_are_refused() -> None:
    codes, scales = torch.zeros(1, 8), torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        AffineGroups.pack(codes, scales, None, bits=4, group_size=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_plain_weight_gets_its_storage_type_back(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = PlainWeight.lossless(stored.float())
    assert packed.weight.dtype == dtype
    assert torch.equal(packed.dequantize(), stored.float())
    again, payload = reloaded(packed, tmp_path / "w.safetensors")
    assert torch.equal(again.dequantize(), stored.float())
    assert again.nbytes == payload == stored.numel() * stored.element_size()
    assert packed.bits_per_weight == 8 * stored.element_size()


def _without(name: str) -> Any:
    return lambda tensors, metadata: ({k: v for k, v in tensors.items() if k != name}, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("codes"), "codes.*missing"),
        (_without("scales"), "scales.*missing"),
        (lambda t, m: ({**t, "scales": t["scales"][:, :1]}, m), "scales.*shape"),
        (lambda t, m: ({**t, "zeros": t["zeros"][:1]}, m), "zeros.*shape"),
        (lambda t, m: (t, {**m, "bits": 5}), "codes of 5 bits"),
        (lambda t, m: (t, {**m, "format": "novel"}), "novel.*affine-groups.*ggml.*plain"),
    ],
)
def test_damaged_tensors_are_refused(damage: Any, message: str) -> None:
    packed, _ = random_affine(3, 40, 4, 16, symmetric=False)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)
