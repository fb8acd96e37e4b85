"""Linear layers whose packed bits are multiplied by an operator that was made for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from pytest_qlab.kernels.linear import PackedLinear


class KernelLinear(nn.Module, ABC):
    """`y = x W^T + b` through a kernel that reads the packed bits.

    Args:
        source: the same layer as it dequantizes and multiplies, on the device to run on. Its bias
            is shared; its packed tensors are not kept, unless a subclass says so.
    """

    kernel: ClassVar[str]
    simulated: ClassVar[bool] = False
    opaque_bytes: int = 0
    """Bytes that are resident in a layout of the kernel's own, which no buffer shows."""

    def __init__(self, source: PackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.dtype = source.dtype
        self.bias: Tensor | None
        self.register_buffer("bias", source.bias)

    @classmethod
    @abstractmethod
    def applies(cls, source: PackedLinear) -> bool:
        """Whether the kernel is made for this format on this device."""

    @classmethod
    @abstractmethod
    def refusal(cls, source: PackedLinear) -> str:
        """Why the kernel cannot take this layer, to which it applies; empty if it can."""

    @abstractmethod
    def paths(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """All ways by which rows (k, n) may become (k, m) without the bias; each is checked."""

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """(k, n) to (k, m), without the bias."""

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The weight that the kernel multiplies by, float32 (m, n); no kernel runs for it."""

    @property
    def weight(self) -> Tensor:
        """The same in the module's dtype; for code that asks a module."""
        return self.dequantized().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to (..., m)."""
        product = self.multiply(x.reshape(-1, self.in_features)).to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and kernel."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"kernel={self.kernel}"
        )


class CrossedLinear(KernelLinear):
    """A kernel that is fast for few rows only: more than `most_rows` are multiplied densely.

    The dense path dequantizes from the kernel's own bits, a tile at a time: no dense copy of the
    weight is resident.
    """

    most_rows: int = 1

    @property
    def crossover_key(self) -> tuple[object, ...]:
        """Layers with the same key take equally long."""
        return (self.kernel, self.out_features, self.in_features, self.dtype)

    @abstractmethod
    def packed_multiply(self, rows: Tensor) -> Tensor:
        """(k, n) to (k, m) through the kernel."""

    @abstractmethod
    def dense_multiply(self, rows: Tensor) -> Tensor:
        """(k, n) to (k, m) through dequantized tiles."""

    def paths(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (self.packed_multiply, self.dense_multiply)

    def multiply(self, rows: Tensor) -> Tensor:
        if len(rows) <= self.most_rows:
            return self.packed_multiply(rows)
        return self.dense_multiply(rows)


def has_operator(space: str, name: str) -> bool:
    """Whether this build of torch has `torch.ops.SPACE.NAME`."""
    return hasattr(getattr(torch.ops, space), name)


def capability_refusal(kernel: str, device: torch.device, needed: tuple[int, int]) -> str:
    """Why a GPU of less than the compute capability that a kernel needs is refused; else empty."""
    found = torch.cuda.get_device_capability(device)
    if found >= needed:
        return ""
    least, present = (".".join(map(str, each)) for each in (needed, found))
    return f"{kernel} takes compute capability {least} or more; this GPU has {present}"
