"""The linear layer that runs any packed format: dequantize, then an ordinary matmul."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pytest_qlab.formats.activations import ActivationQuantizer
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.kernels.packed import PackedModule


class PackedLinear(PackedModule):
    """`y = quantized(x) W^T + b` with W dequantized from packed bits.

    The module's resident bytes are the format's. Its speed is not: unless the weight is stored
    plain, `simulated` is True and `wanted_kernel` names what would have to run instead.

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
        super().__init__(weight, dtype)
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        for name, tensor in (activation.tensors() if activation is not None else {}).items():
            self.register_buffer(f"activation_{name}", tensor)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def metadata(self) -> dict[str, Any]:
        """The packed weight's."""
        return self._metadata

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return self.get_buffer(self._first).device

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
        if "type" in self._metadata and self.activation is None:
            return f"{self._metadata['type']} matmul"
        width = f"W{self._metadata.get('bits', 16)}"
        if self.activation is not None:
            width += f"A{self.activation.bits}"
        return f"{width} matmul on {self._metadata['format']}"

    @property
    def _is_plain(self) -> bool:
        return self._format is PlainWeight and self.activation is None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to (..., m)."""
        if self.activation is not None:
            x = self.activation(x)
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape, format and kernel."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"format={self._metadata['format']}, kernel={self.kernel}"
        )
