"""Finite or not, by the extremes: as torch says it number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.finite import is_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=16)


@given(st.lists(NUMBERS, max_size=70), st.sampled_from(FLOATS))
def test_it_is_what_torch_says_of_each_number(numbers: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(numbers, dtype=dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_found_wherever_it_is(bad: float, dtype: torch.dtype) -> None:
    """In the middle of a vector register, at its ends, in what remains after the last."""
    plain = torch.linspace(-3, 3, 3 * 67).to(dtype).reshape(3, 67)
    assert is_finite(plain)
    assert is_finite(plain.t())
    for place in range(plain.numel()):
        broken = plain.clone()
        broken.view(-1)[place] = bad
        assert not is_finite(broken)
        assert not is_finite(broken.t())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits(dtype: torch.dtype) -> None:
    plain = torch.linspace(-3, 3, 67).to(dtype)
    assert is_finite(plain)
    broken = plain.float()
    broken[40] = float("nan")
    assert not is_finite(broken.to(dtype))


def test_nothing_is_finite() -> None:
    assert is_finite(torch.zeros(0, 4))
