"""Orthogonal changes of basis: of the residual stream, of attention heads, and taken back.

Vectors are rows: x becomes x Q. A layer y = x W^T, whose inputs are rotated by R and whose outputs
are to be rotated by S, has the weight S^T W R and the bias b S.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pytest_qlab.hadamard import has_hadamard, random_orthogonal, random_signs, rotate, rotate_back
from pytest_qlab.models.structure import decoder_blocks

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q that a seed makes; wider vectors are rotated piece by piece.

    Attributes:
        width: n.
        seed: of random signs in front of the Hadamard matrix, or of the random orthogonal matrix;
            None for a Hadamard matrix without signs.
        hadamard: Q = diag(signs) H^T / sqrt(n); otherwise drawn evenly from all orthogonal ones.
    """

    width: int
    seed: int | None
    hadamard: bool

    @classmethod
    def of(cls, width: int, seed: int, *, signs: bool = True) -> Rotation:
        """With a Hadamard matrix where there is one of that width, else a random one."""
        known = has_hadamard(width)
        return cls(width, seed if signs or not known else None, known)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k n) times Q for each of k pieces; half types are rotated in float32."""
        pieces, like = self._pieces(x), x
        if not self.hadamard:
            rotated = pieces @ _matrix(self.width, self.seed, pieces.dtype, pieces.device)
        elif self.seed is None:
            rotated = rotate(pieces)
        else:
            rotated = rotate(pieces * _signs(self.width, self.seed, pieces.dtype, pieces.device))
        return rotated.reshape(like.shape).to(like.dtype)

    def backward(self, x: Tensor) -> Tensor:
        """x (..., k n) times Q^T for each of k pieces: the inverse of `forward`."""
        pieces, like = self._pieces(x), x
        if not self.hadamard:
            rotated = pieces @ _matrix(self.width, self.seed, pieces.dtype, pieces.device).T
        elif self.seed is None:
            rotated = rotate_back(pieces)
        else:
            rotated = rotate_back(pieces) * _signs(
                self.width, self.seed, pieces.dtype, pieces.device
            )
        return rotated.reshape(like.shape).to(like.dtype)

    def _pieces(self, x: Tensor) -> Tensor:
        pieces = x.reshape(*x.shape[:-1], -1, self.width)
        return pieces.float() if x.dtype.itemsize < torch.float32.itemsize else pieces

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Rotation:
        """The inverse of `to_dict`."""
        return cls(**stored)


# Kept where they are used; made outside of inference mode, because what is made in it cannot take
# part in training later.


@lru_cache(maxsize=16)
def _signs(width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return random_signs(width, seed).to(device, dtype)


@lru_cache(maxsize=4)
def _matrix(width: int, seed: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return random_orthogonal(width, seed or 0).to(device, dtype)


@dataclass(frozen=True)
class LayerRotation:
    """What was done to a layer's inputs and outputs; None where nothing was."""

    inputs: Rotation | None = None
    outputs: Rotation | None = None

    def weight(self, weight: Tensor) -> Tensor:
        """The rotated layer's weight S^T W R of a weight W (m, n); type preserved."""
        if self.inputs is not None:
            weight = self.inputs.forward(weight)
        if self.outputs is not None:
            weight = self.outputs.forward(weight.T).T
        return weight

    def original(self, weight: Tensor) -> Tensor:
        """W of a rotated layer's weight (m, n): the inverse of `weight`."""
        if self.inputs is not None:
            weight = self.inputs.backward(weight)
        if self.outputs is not None:
            weight = self.outputs.backward(weight.T).T
        return weight.contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        parts = {"inputs": self.inputs, "outputs": self.outputs}
        return {key: each.to_dict() for key, each in parts.items() if each is not None}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> LayerRotation:
        """The inverse of `to_dict`."""
        return cls(**{key: Rotation.from_dict(each) for key, each in stored.items()})


def attach(
    block: nn.Module, rotation: Rotation, *, first: bool, last: bool
) -> list[RemovableHandle]:
    """Rotate the hidden states that enter the first block, and back those that leave the last.

    The block keeps to it, and copies of it do, until the handles are removed.
    """
    handles: list[RemovableHandle] = []
    if first:
        handles.append(block.register_forward_pre_hook(_Entry(rotation), with_kwargs=True))
    if last:
        handles.append(block.register_forward_hook(_Exit(rotation)))
    return handles


def attach_to_model(model: nn.Module, rotation: Rotation) -> None:
    """`attach` to the first and the last of a model's decoder blocks, whose layers are rotated."""
    blocks = [block for _, block in decoder_blocks(model)]
    for index, block in enumerate(blocks):
        attach(block, rotation, first=index == 0, last=index + 1 == len(blocks))


@dataclass(frozen=True)
class _Entry:
    rotation: Rotation

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.rotation.forward(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.rotation.forward(kwargs["hidden_states"])}


@dataclass(frozen=True)
class _Exit:
    rotation: Rotation

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.rotation.backward(output)
        return (self.rotation.backward(output[0]), *output[1:])
