"""Hadamard matrices: of every order that Paley and Sylvester give, and fast products with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.hadamard import (
    hadamard_matrix,
    has_hadamard,
    random_orthogonal,
    random_signs,
    rotate,
    rotate_back,
)

KNOWN = [order for order in range(1, 161) if has_hadamard(order)]


def test_orders_are_those_of_paley_and_sylvester() -> None:
    # Every multiple of 4 up to 160 but these has one (Wallis, Street, Wallis 1972: the orders
    # below are Williamson's or of other constructions).
    multiples = {1, 2, *range(4, 161, 4)}
    assert multiples - set(KNOWN) == {92, 116, 156}
    assert set(KNOWN) <= multiples


@pytest.mark.parametrize("order", KNOWN)
def test_hadamard_matrices_are_orthogonal_and_of_ones(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix is not None
    assert set(matrix.flatten().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("width", [768, 896, 2560, 4864, 11008, 13824, 14336, 18944, 29568])
def test_widths_of_real_models_have_one(width: int) -> None:
    assert has_hadamard(width)


@settings(deadline=None)
@given(order=st.sampled_from(KNOWN), rows=st.integers(0, 3), seed=st.integers(0, 9))
def test_rotating_is_the_product_with_the_matrix(order: int, rows: int, seed: int) -> None:
    x = torch.randn(2, rows, order, generator=torch.Generator().manual_seed(seed)).double()
    matrix = hadamard_matrix(order)
    assert matrix is not None
    torch.testing.assert_close(rotate(x), x @ matrix.T / order**0.5)
    torch.testing.assert_close(rotate_back(rotate(x)), x)


def test_a_width_without_one_is_refused() -> None:
    assert not has_hadamard(172)
    with pytest.raises(ValueError, match="172"):
        rotate(torch.zeros(1, 172))


def test_random_matrices_are_orthogonal_and_the_seeds() -> None:
    first, again, other = (random_orthogonal(20, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first @ first.T, torch.eye(20, dtype=torch.float64))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(random_signs(20, 1), random_signs(20, 2))
    assert set(random_signs(50, 3).tolist()) == {-1.0, 1.0}
