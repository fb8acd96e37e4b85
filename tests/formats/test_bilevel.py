"""Bilevel grids: what their bits stand for, what they take, their rows, and damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import BilevelAffine, load_packed
from tests.formats.test_packed_weights import reloaded


def example(
    rows: int,
    columns: int,
    *,
    bits: int = 3,
    width: int = 3,
    group_size: int = 8,
    shared: int = 4,
    scattered: bool = False,
) -> tuple[BilevelAffine, Tensor]:
    """A packed weight of random bits, and the weight by a loop over its elements."""
    generator = torch.Generator().manual_seed(rows + 7 * columns + bits)
    length = columns if group_size == -1 else min(group_size, columns)
    groups, blocks = -(-columns // length), -(-rows // shared)

    def integers(top: int, *shape: int) -> Tensor:
        return torch.randint(0, top, shape, generator=generator)

    codes = integers(2**bits, rows, columns)
    scales, zeros = integers(2**width, rows, groups), integers(2**width, rows, groups)
    scale_ranges = torch.rand(2, blocks, groups, generator=generator).half()
    zero_ranges = torch.randn(2, blocks, groups, generator=generator)
    group_of = torch.arange(columns) // length
    if scattered:
        group_of = group_of[torch.randperm(columns, generator=generator)]
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            g, b = int(group_of[j]), i // shared
            scale = float(scale_ranges[0, b, g]) + float(scale_ranges[1, b, g]) * int(scales[i, g])
            zero = float(zero_ranges[0, b, g]) + float(zero_ranges[1, b, g]) * int(zeros[i, g])
            weight[i, j] = scale * (int(codes[i, j]) - zero)
    packed = BilevelAffine.pack(
        codes,
        scales,
        zeros,
        scale_ranges,
        zero_ranges,
        bits=bits,
        group_size=group_size,
        statistic_bits=width,
        statistic_group_size=shared,
        column_groups=group_of if scattered else None,
    )
    return packed, weight


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 50),
    bits=st.sampled_from([2, 3, 4, 8]),
    width=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 16]),
    shared=st.sampled_from([1, 3, 16]),
    scattered=st.booleans(),
)
def test_bits_stand_for_what_a_loop_makes_of_them(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    bits: int,
    width: int,
    group_size: int,
    shared: int,
    scattered: bool,
) -> None:
    packed, weight = example(
        rows,
        columns,
        bits=bits,
        width=width,
        group_size=group_size,
        shared=shared,
        scattered=scattered,
    )
    found = packed.dequantize()
    assert torch.allclose(found.double(), weight, rtol=1e-5, atol=1e-3)
    again, stored = reloaded(packed, tmp_path_factory.mktemp("packed") / "file")
    assert torch.equal(again.dequantize(), found)
    groups = packed.scales().shape[1]
    blocks = -(-rows // shared)
    expected = rows * (-(-columns * bits // 8) + 2 * -(-groups * width // 8))
    expected += 2 * blocks * groups * (2 + 4) + (2 * columns if scattered else 0)
    assert packed.nbytes == again.nbytes == expected
    assert stored - 8 < expected <= stored
    index = torch.randint(0, rows, (2 * rows,), generator=torch.Generator().manual_seed(rows))
    taken = packed.take_rows(index)
    assert torch.equal(taken.dequantize(), found[index])
    assert torch.equal(taken.take_rows(index).dequantize(), found[index][index])
    restored, _ = reloaded(taken, tmp_path_factory.mktemp("taken") / "file")
    assert torch.equal(restored.dequantize(), found[index])


def test_ranges_that_would_be_rounded_when_stored_are_refused() -> None:
    codes, ranges = torch.zeros(1, 8), torch.ones(2, 1, 1)
    for pair in ((ranges.double(), ranges), (ranges, ranges.double())):
        with pytest.raises(ValueError, match="float64"):
            BilevelAffine.pack(
                codes,
                codes[:, :1],
                codes[:, :1],
                *pair,
                bits=3,
                group_size=8,
                statistic_bits=3,
                statistic_group_size=16,
            )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: ({**t, "codes": t["codes"][:1]}, m), "codes.*shape"),
        (lambda t, m: ({**t, "scales": t["scales"][:, :0]}, m), "scales.*shape"),
        (lambda t, m: ({k: v for k, v in t.items() if k != "zeros"}, m), "zeros.*missing"),
        (lambda t, m: ({**t, "scale_ranges": t["scale_ranges"][:1]}, m), "scale_ranges.*shape"),
        (lambda t, m: ({**t, "zero_ranges": t["zero_ranges"][:, :1]}, m), "zero_ranges.*shape"),
        (lambda t, m: (t, {**m, "bits": 5}), "codes of 5 bits"),
        (lambda t, m: (t, {**m, "statistic_bits": 7}), "7 bits for scales"),
        (lambda t, m: (t, {**m, "statistic_group_size": 0}), "0 rows share"),
        (lambda t, m: ({**t, "column_groups": torch.full((20,), 3)}, m), "none of its 3"),
    ],
)
def test_damage_is_found(damage: Any, message: str) -> None:
    packed, _ = example(5, 20, scattered=True)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)
