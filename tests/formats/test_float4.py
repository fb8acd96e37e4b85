"""E2M1 in blocks: what codes and scales stand for, what they take, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import MicroscaledFloat4, load_packed
from pytest_qlab.formats.e2m1 import e2m1_values, e8m0_values
from tests.formats.test_packed_weights import reloaded

E4M3 = torch.float8_e4m3fn


def e2m1(code: int) -> float:
    """By the bits: sign, two of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def e4m3(code: int) -> float:
    """By the bits of a code without sign, 0 .. 126: four of exponent with bias 7, three more."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa / 512 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)


def test_codes_stand_for_e2m1() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert e2m1_values(codes).tolist() == [e2m1(code) for code in range(16)]


def test_exponents_stand_for_powers_of_two() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)
    assert e8m0_values(exponents).double().tolist() == [2.0 ** (e - 127) for e in range(255)]


def example(rows: int, columns: int, *, nvfp4: bool, seed: int) -> tuple[MicroscaledFloat4, Tensor]:
    """Random bits, and what they stand for by a loop."""
    generator = torch.Generator().manual_seed(seed)
    block = 16 if nvfp4 else 32
    length = min(block, columns)
    groups = -(-columns // length)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    tensor_scale = torch.tensor([0.75]) if nvfp4 else None
    if nvfp4:
        bits = torch.randint(0, 127, (rows, groups), generator=generator, dtype=torch.uint8)
        scales = bits.view(torch.float8_e4m3fn)
    else:
        bits = scales = torch.randint(100, 150, (rows, groups), generator=generator).to(torch.uint8)
    weight = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            code, scale = int(codes[i, j]), int(bits[i, j // length])
            value = 0.75 * e4m3(scale) if nvfp4 else 2.0 ** (scale - 127)
            weight[i, j] = e2m1(code) * value
    return MicroscaledFloat4.pack(codes, scales, tensor_scale, block_size=block), weight


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 70), nvfp4=st.booleans(), seed=st.integers(0, 99)
)
def test_blocks_are_what_their_bits_say(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, nvfp4: bool, seed: int
) -> None:
    packed, weight = example(rows, columns, nvfp4=nvfp4, seed=seed)
    assert packed.shape == (rows, columns)
    assert torch.equal(packed.dequantize(), weight)
    again, payload = reloaded(packed, tmp_path_factory.mktemp("packed") / "w.safetensors")
    assert torch.equal(again.dequantize(), weight)
    assert again.metadata() == packed.metadata()
    assert packed.nbytes == again.nbytes <= payload < packed.nbytes + 8
    blocks = -(-columns // (16 if nvfp4 else 32))
    assert packed.nbytes == rows * ((columns + 1) // 2 + blocks) + 4 * nvfp4
    index = torch.randint(0, rows, (2 * rows,), generator=torch.Generator().manual_seed(seed))
    taken = packed.take_rows(index)
    assert torch.equal(taken.dequantize(), weight[index])
    assert torch.equal(load_packed(taken.metadata(), taken.tensors()).dequantize(), weight[index])


def test_two_neighbours_share_a_byte_the_first_in_its_low_half() -> None:
    codes = torch.tensor([[1, 2, 15]])
    packed = MicroscaledFloat4.pack(
        codes, torch.full((1, 1), 127, dtype=torch.uint8), None, block_size=32
    )
    assert packed.tensors()["codes"].tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize(("nvfp4", "expected"), [(False, 4.25), (True, 4.5 + 32 / (8 * 64))])
def test_bits_per_weight_is_the_formula(nvfp4: bool, expected: float) -> None:
    packed, _ = example(8, 64, nvfp4=nvfp4, seed=0)
    assert packed.bits_per_weight == expected


Damage = Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: ({k: v for k, v in t.items() if k != "codes"}, m), "codes.*missing"),
        (lambda t, m: ({**t, "scales": t["scales"][:, :1]}, m), "scales.*shape"),
        (lambda t, m: ({**t, "scales": t["scales"].view(torch.uint8)}, m), "torch.uint8; expected"),
        (lambda t, m: ({k: v for k, v in t.items() if k != "tensor_scale"}, m), "float8"),
        (lambda t, m: ({**t, "tensor_scale": torch.ones(2)}, m), "tensor_scale.*shape"),
        (lambda t, m: ({**t, "scales": (-t["scales"].float()).to(E4M3)}, m), "negative or no"),
        (lambda t, m: (t, {**m, "block_size": 32}), "scales.*shape"),
    ],
)
def test_damaged_tensors_are_refused(damage: Damage, message: str) -> None:
    packed, _ = example(3, 40, nvfp4=True, seed=0)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)


def test_scales_of_another_type_are_refused() -> None:
    codes = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"float32; expected torch\.uint8"):
        MicroscaledFloat4.pack(codes, torch.ones(1, 1), None, block_size=32)
    with pytest.raises(ValueError, match=r"expected torch\.float8_e4m3fn"):
        MicroscaledFloat4.pack(codes, torch.ones(1, 1), torch.ones(1), block_size=16)


def test_an_exponent_that_is_no_number_is_refused() -> None:
    packed, _ = example(3, 40, nvfp4=False, seed=0)
    scales = torch.full_like(packed.scales, 255)
    with pytest.raises(CorruptEntryError, match="no number"):
        load_packed(packed.metadata(), {**packed.tensors(), "scales": scales})
