"""Random orthogonal transforms that are stored as a kind, an order and a seed.

A packed weight that was rotated names its transforms by these three, and they are made anew where
it is dequantized. All numbers are float64, so that nothing is lost on the way there and back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.hadamard import (
    has_hadamard,
    random_orthogonal,
    random_signs,
    rotate,
    rotate_back,
)

Kind = Literal["kronecker", "hadamard"]


@dataclass(frozen=True)
class Transform:
    """An orthogonal matrix V of n rows and columns.

    Args:
        kind: `kronecker`: V = P (A x B) P', A and B random orthogonal, of orders as close to
            sqrt(n) as n has divisors, P and P' random permutations (QuIP, arXiv 2307.13304,
            section 4). `hadamard`: V = H S / sqrt(n), H a Hadamard matrix, S random signs (QuIP#,
            arXiv 2402.04396, section 3).
        order: n.
        seed: makes A, B, P, P' or S, together with kind and order.
    """

    kind: Kind
    order: int
    seed: int

    @classmethod
    def of(cls, kind: Kind, order: int, seed: int) -> Self:
        """That transform; `kronecker` where no Hadamard matrix of the order is known."""
        return cls(kind if kind != "hadamard" or has_hadamard(order) else "kronecker", order, seed)

    def apply(self, x: Tensor) -> Tensor:
        """x V^T for x (..., n): every vector of the last axis is multiplied by V; float64."""
        x = x.to(torch.float64)
        if self.kind == "hadamard":
            return rotate(x * _signs(self.order, self.seed).to(x.device))
        made = _factors(self.order, self.seed, x.device)
        return _multiply(x[..., made.first], made.a, made.b)[..., made.second]

    def undo(self, x: Tensor) -> Tensor:
        """x V for x (..., n), which undoes `apply`; float64."""
        x = x.to(torch.float64)
        if self.kind == "hadamard":
            return rotate_back(x) * _signs(self.order, self.seed).to(x.device)
        made = _factors(self.order, self.seed, x.device)
        x = _multiply(x[..., made.second.argsort()], made.a.T, made.b.T)
        return x[..., made.first.argsort()]

    def metadata(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"kind": self.kind, "order": self.order, "seed": self.seed}

    @classmethod
    def from_metadata(cls, metadata: Any, order: int) -> Self:
        """The inverse of `metadata`, for a weight that wants a transform of that order.

        Raises:
            CorruptEntryError: it is no transform, or one of another order.
        """
        known = isinstance(metadata, dict) and metadata.get("kind") in ("kronecker", "hadamard")
        if (
            not known
            or metadata.get("order") != order
            or not isinstance(metadata.get("seed"), int)
            or (metadata["kind"] == "hadamard" and not has_hadamard(order))
        ):
            raise CorruptEntryError(
                f"A packed weight names the transform {metadata!r}; expected the kind 'kronecker' "
                f"or 'hadamard', the order {order} and a seed. The stored artefact is damaged: "
                "delete it and run again."
            )
        return cls(metadata["kind"], order, metadata["seed"])


@dataclass(frozen=True)
class _Kronecker:
    a: Tensor
    b: Tensor
    first: Tensor
    second: Tensor


def _multiply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x (A x B)^T for x (..., len(a) * len(b))."""
    grid = x.reshape(-1, len(a), len(b))
    return (a @ grid @ b.T).reshape(x.shape)


def balanced_divisors(order: int) -> tuple[int, int]:
    """The two divisors of a number whose product it is that are closest to each other."""
    small = next(each for each in range(int(order**0.5) + 1, 0, -1) if order % each == 0)
    return min(small, order // small), max(small, order // small)


@lru_cache(maxsize=64)
def _signs(order: int, seed: int) -> Tensor:
    return random_signs(order, _seed("signs", order, seed))


@lru_cache(maxsize=64)
def _factors(order: int, seed: int, device: torch.device) -> _Kronecker:
    small, large = balanced_divisors(order)

    def permutation(part: str) -> Tensor:
        generator = torch.Generator().manual_seed(_seed(part, order, seed))
        return torch.randperm(order, generator=generator).to(device)

    return _Kronecker(
        random_orthogonal(small, _seed("a", order, seed)).to(device),
        random_orthogonal(large, _seed("b", order, seed)).to(device),
        permutation("first"),
        permutation("second"),
    )


def _seed(part: str, order: int, seed: int) -> int:
    """A seed for a part of a transform, unrelated to those of other parts, orders and seeds."""
    digest = hashlib.sha256(f"{part} {order} {seed}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
