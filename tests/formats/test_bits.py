"""Packing of codes into bytes: against a bit-by-bit loop, and there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.formats.bits import WIDTHS, pack, packed_width, unpack


def packed_slowly(codes: Tensor, bits: int) -> Tensor:
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append(list(number.to_bytes(packed_width(len(row), bits), "little")))
    return torch.tensor(rows, dtype=torch.uint8)


def random_codes(rows: int, count: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)


@settings(deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    rows=st.integers(1, 4),
    count=st.integers(1, 67),
    seed=st.integers(0, 2**31),
)
def test_packing_follows_the_layout_and_inverts(
    bits: int, rows: int, count: int, seed: int
) -> None:
    codes = random_codes(rows, count, bits, seed)
    packed = pack(codes, bits)
    assert torch.equal(packed, packed_slowly(codes, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("fill", ["lowest", "highest"])
def test_extreme_codes(bits: int, fill: str) -> None:
    codes = torch.full((3, 13), 0 if fill == "lowest" else 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 13), codes)


def test_codes_of_any_number_type_can_be_packed() -> None:
    codes = torch.tensor([[0.0, 7.0, 3.0]])
    assert unpack(pack(codes, 3), 3, 3).tolist() == [[0, 7, 3]]


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 7"):
        pack(torch.tensor([[8]]), 3)
    with pytest.raises(ValueError, match="outside"):
        pack(torch.tensor([[-1]]), 4)


def test_an_unknown_width_is_refused() -> None:
    with pytest.raises(ValueError, match="5 bits"):
        pack(torch.tensor([[1]]), 5)
    with pytest.raises(ValueError, match="5 bits"):
        unpack(torch.zeros(1, 5, dtype=torch.uint8), 5, 8)
