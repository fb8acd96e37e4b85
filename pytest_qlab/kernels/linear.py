"""The linear layer that runs any packed format: dequantize, then an ordinary matmul."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pytest_qlab.formats.activations import ActivationQuantizer
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.plain import PlainWeight


class PackedLinear(nn.Module):
    """`y = quantized(x) W^T + b` with W dequantized from packed bits.

    The packed tensors are buffers, so that the module's resident bytes are the format's. Speed is
    not: unless the weight is stored plain, `simulated` is True and `wanted_kernel` names what would
    have to run instead.

    Args:
        weight: packed, (m, n).
        bias: (m,) or None; kept in the type it has.
        activation: rounds the inputs, or None.
        dtype: the type W is dequantized to, that of the inputs.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        activation: ActivationQuantizer | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.dtype = dtype
        self._format = type(weight)
        self._metadata = weight.metadata()
        self._names = tuple(weight.tensors())
        self._first = f"packed_{self._names[0]}"
        for name, tensor in weight.tensors().items():
            self.register_buffer(f"packed_{name}", tensor)
        for name, tensor in (activation.tensors() if activation is not None else {}).items():
            self.register_buffer(f"activation_{name}", tensor)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())
        # In a list, which neither `buffers()` nor `state_dict()` looks into.
        self._cache: list[Tensor] = []

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, on the device that the module is on."""
        tensors = {name: self.get_buffer(f"packed_{name}") for name in self._names}
        return self._format.from_tensors(tensors, self._metadata)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (m, n), of the module's dtype; for code that asks a linear."""
        if self._cache and self._cache[0].device == self.get_buffer(self._first).device:
            return self._cache[0]
        packed = self.packed
        if isinstance(packed, PlainWeight):
            return packed.weight.to(self.dtype)
        return packed.dequantize().to(self.dtype)

    @property
    def simulated(self) -> bool:
        """Whether the time of a forward says nothing about the format."""
        return not self._is_plain

    @property
    def kernel(self) -> str:
        """What runs."""
        return "torch.nn.functional.linear" if self._is_plain else "dequantize-matmul"

    @property
    def wanted_kernel(self) -> str:
        """What would have to run for its time to be the format's."""
        if self._is_plain:
            return self.kernel
        bits = self._metadata.get("bits", 16)
        width = f"W{bits}" if self.activation is None else f"W{bits}A{self.activation.bits}"
        return f"{width} matmul on {self._metadata['format']}"

    @property
    def _is_plain(self) -> bool:
        return self._format is PlainWeight and self.activation is None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to (..., m)."""
        if self.activation is not None:
            x = self.activation(x)
        return linear(x, self.weight, self.bias)

    def materialize(self) -> None:
        """Keep the dequantized weight for the forwards to come; it is no buffer."""
        self._cache[:] = [self.weight]

    def release(self) -> None:
        """Drop what `materialize` keeps."""
        self._cache.clear()

    def extra_repr(self) -> str:
        """Shape, format and kernel."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"format={self._metadata['format']}, kernel={self.kernel}"
        )


def set_materialized(model: nn.Module, on: bool) -> None:
    """Materialize or release every packed layer of a model."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            if on:
                module.materialize()
            else:
                module.release()
