"""E4M3 with a scale for each row: what codes stand for, what numbers become, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats import ScaledFloat8, load_packed
from pytest_qlab.formats.float8 import E4M3, LARGEST, row_scales, to_e4m3
from tests.formats.test_packed_weights import reloaded

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
FINITE = [code for code in range(256) if code & 0x7F != 0x7F]


def e4m3(code: int) -> float:
    """By the bits: sign, four of exponent with bias 7, three of mantissa; all ones are NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code >> 7 else size


VALUES = np.array([e4m3(code) for code in FINITE[:127]])
"""The positive numbers, which rise with their codes 0 .. 126."""


def nearest(value: float) -> int:
    """By trying all finite codes; of two as near, the even one. The sign is the value's."""
    distances = np.abs(VALUES - min(abs(value), 512))  # exact in float64
    codes = np.flatnonzero(distances == distances.min())
    (code,) = codes if len(codes) == 1 else [each for each in codes if each % 2 == 0]
    return int(code) | int(np.signbit(value)) << 7


def bits(values: Tensor) -> list[int]:
    found: list[int] = to_e4m3(values).view(torch.uint8).tolist()
    return found


def from_bits(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).view(E4M3)


def test_codes_stand_for_e4m3() -> None:
    found = from_bits(torch.arange(256)).double().numpy()
    expected = np.array([e4m3(code) for code in range(256)])
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[FINITE]), np.signbit(expected[FINITE]))
    assert VALUES[-1] == LARGEST == 448


def test_halfway_between_two_numbers_the_even_code_is_taken_and_beside_it_the_nearer() -> None:
    halves = torch.from_numpy((VALUES[:-1] + VALUES[1:]) / 2).float()
    infinity = torch.tensor(torch.inf)
    low = torch.arange(126)
    for sign in (1, -1):
        flag = 128 if sign < 0 else 0
        assert bits(sign * halves) == (low + low % 2 + flag).tolist()
        assert bits(sign * torch.nextafter(halves, -infinity)) == (low + flag).tolist()
        assert bits(sign * torch.nextafter(halves, infinity)) == (low + 1 + flag).tolist()


@given(values=st.lists(FLOAT32 | st.floats(-500, 500, width=32), min_size=1, max_size=40))
def test_numbers_become_the_nearest(values: list[float]) -> None:
    assert bits(torch.tensor(values)) == [nearest(value) for value in values]


@pytest.mark.parametrize("value", [448.0, 448.1, 464.0, 465.0, 480.0, 1e30, float("inf")])
def test_beyond_the_largest_they_saturate(value: float) -> None:
    assert bits(torch.tensor([value, -value])) == [0x7E, 0xFE]


def test_what_is_no_number_stays_none() -> None:
    assert bool(to_e4m3(torch.tensor([float("nan")])).float().isnan().all())


@given(values=st.lists(FLOAT32, min_size=1, max_size=8))
def test_no_row_leaves_the_range_of_its_scale(values: list[float]) -> None:
    """The scale is a normal number, and 448 times it does not overflow."""
    row = torch.tensor([values])
    scale = row_scales(row)
    assert scale.shape == (1, 1)
    assert 2.0**-126 <= float(scale) < torch.inf
    largest = max(map(abs, values))
    assert 448 * float(scale) >= largest * (1 - 2.0**-23)
    assert bool((448 * scale).isfinite().all())
    if largest >= 448 * 2.0**-126:
        assert float(scale) == pytest.approx(largest / 448, rel=2.0**-23)


def example(rows: int, columns: int, seed: int = 0) -> tuple[ScaledFloat8, Tensor]:
    """Random bits, and what they stand for by a loop."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, (rows, columns), generator=generator)
    codes += codes > 126  # 127 and 255 are no numbers
    scales = torch.rand(rows, 1, generator=generator) + 0.01
    weight = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            weight[i, j] = scales[i, 0] * e4m3(int(codes[i, j]))
    return ScaledFloat8(from_bits(codes), scales), weight


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_rows_are_what_their_bits_say(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, seed: int
) -> None:
    packed, weight = example(rows, columns, seed)
    assert packed.shape == (rows, columns)
    assert torch.equal(packed.dequantize(), weight)
    again, payload = reloaded(packed, tmp_path_factory.mktemp("packed") / "w.safetensors")
    assert torch.equal(again.dequantize(), weight)
    assert again.metadata() == packed.metadata()
    assert again.nbytes == packed.nbytes == payload == rows * (columns + 4)
    index = torch.randint(0, rows, (7,), generator=torch.Generator().manual_seed(seed))
    taken = packed.take_rows(index)
    assert torch.equal(taken.dequantize(), weight[index])
    assert torch.equal(load_packed(taken.metadata(), taken.tensors()).dequantize(), weight[index])


def test_bits_per_weight_is_the_formula() -> None:
    assert example(3, 256)[0].bits_per_weight == 8 + 32 / 256


def test_other_types_are_refused() -> None:
    codes, scales = from_bits(torch.zeros(1, 4)), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"torch\.float16; expected torch\.float8_e4m3fn"):
        ScaledFloat8(codes, scales.half())
    with pytest.raises(ValueError, match=r"are torch\.uint8 and"):
        ScaledFloat8(codes.view(torch.uint8), scales)


Damage = Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: ({"codes": t["codes"]}, m), "scales.*missing"),
        (lambda t, m: ({**t, "scales": t["scales"].flatten()}, m), "scales.*shape"),
        (lambda t, m: (t, {**m, "shape": [3, 8]}), "codes.*shape"),
        (lambda t, m: ({**t, "codes": t["codes"].view(torch.uint8)}, m), r"torch\.uint8 and"),
        (lambda t, m: ({**t, "scales": t["scales"].double()}, m), r"torch\.float64; expected"),
        (lambda t, m: ({**t, "scales": -t["scales"]}, m), "not a positive"),
        (lambda t, m: ({**t, "scales": t["scales"] * torch.inf}, m), "not a positive"),
        (lambda t, m: ({**t, "codes": from_bits(torch.full((3, 9), 127))}, m), "no number"),
        (lambda t, m: ({**t, "codes": from_bits(torch.full((3, 9), 255))}, m), "no number"),
    ],
)
def test_damage_is_found(damage: Damage, message: str) -> None:
    packed, _ = example(3, 9)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)
