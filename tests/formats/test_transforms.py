"""Transforms that a seed makes: orthogonal, invertible, the same everywhere, known when damaged."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.transforms import Kind, Transform, balanced_divisors

KINDS: list[Kind] = ["kronecker", "hadamard"]


def dense(transform: Transform) -> Tensor:
    """V, whose columns are what it makes of the unit vectors."""
    return transform.apply(torch.eye(transform.order)).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 7, 12, 36, 41, 64, 100, 172, 210])
def test_transforms_are_orthogonal_products_and_can_be_undone(kind: Kind, order: int) -> None:
    transform = Transform.of(kind, order, 5)
    matrix = dense(transform)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    x = torch.randn(2, 3, order, generator=torch.Generator().manual_seed(order)).double()
    assert torch.allclose(transform.apply(x), x @ matrix.T, atol=1e-12)
    assert torch.allclose(transform.undo(x), x @ matrix, atol=1e-12)


def test_a_hadamard_matrix_spreads_evenly_where_there_is_one() -> None:
    for order in (1, 2, 12, 64, 96):
        transform = Transform.of("hadamard", order, 0)
        assert transform.kind == "hadamard"
        entries = dense(transform).abs()
        assert torch.allclose(entries, torch.full_like(entries, order**-0.5))
    for order in (3, 7, 41, 92):
        assert Transform.of("hadamard", order, 0) == Transform("kronecker", order, 0)


def test_kronecker_is_a_kronecker_product_with_rows_and_columns_in_any_order() -> None:
    """Order 36: a row is the product of one of 6 rows of A and one of 6 of B.

    Two rows that share one of them have 6 different quotients, any two others 36.
    """
    matrix = dense(Transform("kronecker", 36, 3))
    counts = []
    for row in matrix[1:]:
        quotients = (matrix[0] / row).sort().values
        counts.append(1 + int(((quotients[1:] / quotients[:-1] - 1).abs() > 1e-6).sum()))
    assert sorted(counts) == [6] * 10 + [36] * 25


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (1, (1, 1)),
        (7, (1, 7)),
        (12, (3, 4)),
        (4096, (64, 64)),
        (11008, (86, 128)),
        (50257, (29, 1733)),
    ],
)
def test_factors_are_as_close_as_divisors_allow(order: int, expected: tuple[int, int]) -> None:
    assert balanced_divisors(order) == expected
    assert expected[0] * expected[1] == order


def test_seeds_orders_and_kinds_make_different_transforms() -> None:
    found = [
        dense(Transform(kind, order, seed))[:4, :4]
        for kind in KINDS
        for order in (4, 8)
        for seed in (0, 1, 2)
    ]
    signs = {tuple(matrix.sign().flatten().tolist()) for matrix in found}
    assert len(signs) > 8
    square = dense(Transform("kronecker", 16, 0))
    # The two factors of a square order must not be the same matrix: A x A is its own mirror image.
    a = dense(Transform("kronecker", 4, 0))
    assert not torch.allclose(square[:4, :4].abs().sort().values, a.abs().sort().values)


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_makes_the_same(kind: Kind) -> None:
    code = (
        "import torch; torch.set_num_threads(1); torch.manual_seed(99)\n"
        "from pytest_qlab.formats.transforms import Transform\n"
        f"print(Transform({kind!r}, 24, 7).apply(torch.arange(24.0)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    expected = Transform(kind, 24, 7).apply(torch.arange(24.0)).tolist()
    assert [float(each) for each in done.stdout.strip("[]\n").split(",")] == pytest.approx(
        expected, abs=1e-12
    )


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    dense(Transform("kronecker", 22, 123))
    dense(Transform("hadamard", 24, 123))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_names_a_transform(kind: Kind) -> None:
    transform = Transform(kind, 12, 4)
    assert Transform.from_metadata(transform.metadata(), 12) == transform


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        "kronecker",
        {"kind": "fourier", "order": 12, "seed": 0},
        {"kind": "kronecker", "order": 13, "seed": 0},
        {"kind": "kronecker", "order": 12, "seed": "0"},
        {"kind": "kronecker", "order": 12},
    ],
)
def test_damaged_metadata_is_refused(damaged: Any) -> None:
    with pytest.raises(CorruptEntryError, match="order 12"):
        Transform.from_metadata(damaged, 12)
    with pytest.raises(CorruptEntryError, match="order 7"):
        Transform.from_metadata({"kind": "hadamard", "order": 7, "seed": 0}, 7)
