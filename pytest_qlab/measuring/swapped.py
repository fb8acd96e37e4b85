"""A quantized layer as it acts in the original model: what was scaled and rotated is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.measuring.layers import original_terms
from pytest_qlab.models.rotation import LayerRotation

if TYPE_CHECKING:
    from pytest_qlab.methods.base import QuantizedLayer
    from pytest_qlab.models.structure import LinearSite


def swapped(
    site: LinearSite,
    layer: QuantizedLayer,
    bias: Tensor | None,
    scales: Mapping[str, Tensor],
    rotation: LayerRotation | None,
) -> nn.Module:
    """A module that stands for a quantized layer in the original model, on the same device.

    Args:
        site: of the layer in the original model.
        layer: its bits.
        bias: as the quantized model has it; None where the layer has none.
        scales: `column` and `row` scale that folds applied before it was quantized.
        rotation: what was rotated after that.
    """
    own, dtype, device = site.bias, site.stored.dtype, site.stored.device
    if own is None or bias is None:
        bias = own
    else:
        if rotation is not None and rotation.outputs is not None:
            bias = rotation.outputs.backward(bias.double())
        bias = bias.float() * scales["row"] if "row" in scales else bias
        bias = bias.to(dtype=own.dtype, device=own.device)
    if not scales and rotation is None:
        module = PackedLinear(layer.weight, bias, layer.activation, dtype)
    elif layer.activation is None:
        weight = original_terms(layer.weight.dequantize(), scales, rotation)
        module = PackedLinear(PlainWeight(weight), bias, None, dtype)
    else:
        inner = PackedLinear(layer.weight, None, layer.activation, dtype).to(device)
        inner.materialize()
        whole = _OnOriginalInputs(inner, scales, rotation or LayerRotation(), bias, dtype)
        return whole.to(device)
    module = module.to(device)
    module.materialize()
    return module


class _OnOriginalInputs(nn.Module):
    """A layer with quantized inputs that was scaled and rotated, on the original ones.

    y = row * unrotated(inner(rotated(x / column))) + bias.
    """

    _column: Tensor | None
    _row: Tensor | None
    _bias: Tensor | None

    def __init__(
        self,
        inner: nn.Module,
        scales: Mapping[str, Tensor],
        rotation: LayerRotation,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._inner = inner
        self._rotation = rotation
        for name in ("column", "row"):
            scale = scales.get(name)
            if scale is not None and name == "column":  # Channels that a norm makes 0 stay 0.
                scale = torch.where(scale == 0, 1, scale)
            self.register_buffer(f"_{name}", None if scale is None else scale.to(dtype))
        self.register_buffer("_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to (..., m)."""
        if self._column is not None:
            x = x / self._column
        if self._rotation.inputs is not None:
            x = self._rotation.inputs.forward(x)
        y: Tensor = self._inner(x)
        if self._rotation.outputs is not None:
            y = self._rotation.outputs.backward(y)
        if self._row is not None:
            y = y * self._row
        return y if self._bias is None else y + self._bias
