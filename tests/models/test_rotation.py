"""Rotations against explicit matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qlab.hadamard import hadamard_matrix, random_orthogonal, random_signs
from pytest_qlab.models.rotation import LayerRotation, Rotation, attach


def explicit(rotation: Rotation, features: int) -> Tensor:
    """The block diagonal matrix (features, features) by its definition, float64."""
    width = rotation.width
    if not rotation.hadamard:
        matrix = random_orthogonal(width, rotation.seed or 0)
    else:
        hadamard = hadamard_matrix(width)
        assert hadamard is not None
        signs = torch.ones(width) if rotation.seed is None else random_signs(width, rotation.seed)
        matrix = torch.diag(signs.double()) @ hadamard.T / width**0.5
    found: Tensor = torch.kron(torch.eye(features // width).to(matrix), matrix.contiguous())
    return found


WIDTHS = [1, 2, 5, 6, 12, 20, 24, 32, 48, 96]


@given(st.sampled_from(WIDTHS), st.integers(0, 5), st.booleans(), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_is_the_matrix_that_its_definition_says(
    width: int, seed: int, signs: bool, pieces: int
) -> None:
    rotation = Rotation.of(width, seed, signs=signs)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, width * pieces, generator=generator, dtype=torch.float64)
    matrix = explicit(rotation, width * pieces)
    torch.testing.assert_close(rotation.forward(x), x @ matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotation.backward(x), x @ matrix.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotation.backward(rotation.forward(x)), x, atol=1e-12, rtol=0)


def test_widths_without_a_hadamard_matrix_get_a_random_one() -> None:
    assert Rotation.of(12, 3) == Rotation(12, 3, hadamard=True)
    assert Rotation.of(12, 3, signs=False) == Rotation(12, None, hadamard=True)
    assert Rotation.of(6, 3) == Rotation(6, 3, hadamard=False)
    assert Rotation.of(6, 3, signs=False) == Rotation(6, 3, hadamard=False)


@pytest.mark.parametrize("width", [6, 32])
def test_seeds_differ_and_repeat(width: int) -> None:
    x = torch.eye(width)
    first, again, other = (Rotation.of(width, seed).forward(x) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rotated_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotation = Rotation.of(64, 1)
    assert torch.equal(rotation.forward(x), rotation.forward(x.float()).to(dtype))
    assert torch.equal(rotation.backward(x), rotation.backward(x.float()).to(dtype))


@pytest.mark.parametrize("outputs", [None, Rotation.of(8, 4), Rotation.of(6, 1)])
@pytest.mark.parametrize("inputs", [None, Rotation.of(20, 2), Rotation.of(5, 2)])
def test_a_layer_maps_rotated_inputs_to_rotated_outputs(
    inputs: Rotation | None, outputs: Rotation | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 20, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    rotation = LayerRotation(inputs, outputs)
    y = x @ weight.T
    into = torch.eye(20).double() if inputs is None else explicit(inputs, 20)
    out = torch.eye(24).double() if outputs is None else explicit(outputs, 24)
    rotated = rotation.weight(weight)
    torch.testing.assert_close((x @ into) @ rotated.T, y @ out, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotation.original(rotated), weight, atol=1e-12, rtol=0)
    assert LayerRotation.from_dict(rotation.to_dict()) == rotation


class Returns(nn.Module):
    """Gives back what it was given, alone or with something beside it."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, hidden_states: Tensor, mask: Any = None) -> Any:
        return (hidden_states, mask) if self.beside else hidden_states


@pytest.mark.parametrize("beside", [True, False])
def test_the_first_and_last_block_rotate_until_they_are_let_go(beside: bool) -> None:
    rotation = Rotation.of(12, 0)
    x = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0))
    block = Returns(beside)

    def run(keyword: bool = False) -> Tensor:
        found: Any = block(hidden_states=x, mask=1) if keyword else block(x, 1)
        hidden: Tensor = found[0] if beside else found
        assert not beside or found[1] == 1
        return hidden

    handles = attach(block, rotation, first=True, last=False)
    for keyword in (True, False):
        assert torch.equal(run(keyword), rotation.forward(x))
    handles += attach(block, rotation, first=False, last=True)
    torch.testing.assert_close(run(), x)
    for handle in handles:
        handle.remove()
    assert torch.equal(run(), x)
    assert attach(block, rotation, first=False, last=False) == []


def test_what_was_first_made_in_inference_mode_can_be_trained_through() -> None:
    rotation = Rotation.of(12, 12345)
    with torch.inference_mode():
        rotation.forward(torch.ones(12))
    x = torch.ones(12, requires_grad=True)
    (found,) = torch.autograd.grad(rotation.forward(x)[0], x)
    torch.testing.assert_close(found, explicit(rotation, 12)[:, 0].float())
