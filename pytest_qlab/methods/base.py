"""What a quantization method is: a frozen set of options, and a way to choose codes.

This module imports no torch, so that method specifications can be read, checked and listed while
tests are collected. The tensors' side is imported where a method runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.formats.activations import ActivationQuantizer
    from pytest_qlab.formats.base import PackedWeight
    from pytest_qlab.methods.blocks import BlockContext

Bits = Literal[2, 3, 4, 8]
Statistic = Literal["channels", "gram"]
Stream = Literal["none", "original", "quantized"]


@dataclass(frozen=True)
class QuantizedLayer:
    """What a method returns for one linear layer: its bits and how its inputs are quantized."""

    weight: PackedWeight
    activation: ActivationQuantizer | None = None


class Method(BaseModel):
    """A quantization method with its options, which carry the field's own names.

    Subclasses declare options as pydantic fields with defaults; equal options make equal, hashable
    methods. `needs` says which calibration statistics are wanted, and `stream` on which inputs they
    are collected: the original model's, or those of a model whose earlier blocks are quantized.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    cost: ClassVar[float] = 1.0

    @property
    def stream(self) -> Stream:
        """The activations that calibration statistics are collected on."""
        return "original" if self.needs else "none"

    @property
    def id(self) -> str:
        """A readable name, different for every set of options: `gptq-w3g64-sym`."""
        return "-".join([self.name, *self._id_parts()])

    def _id_parts(self) -> list[str]:
        """The width and group, then every option that differs from its default."""
        values = self.model_dump(mode="json")
        parts = []
        if "bits" in values:
            width = f"w{values.pop('bits')}"
            if "activation_bits" in values:
                width += f"a{values.pop('activation_bits')}"
            if "group_size" in values:
                group = values.pop("group_size")
                width += f"g{group}" if group > 0 else "-channel"
            parts.append(width)
        for key, value in sorted(values.items()):
            if value == type(self).model_fields[key].get_default(call_default_factory=True):
                continue
            if isinstance(value, bool):
                parts.append(key if value else f"no_{key}")
            else:
                parts.append(f"{key}={value}")
        return parts

    def identity(self) -> dict[str, Any]:
        """Everything of the method that determines its codes; part of every artefact's key."""
        return {
            "method": self.name,
            "version": self.version,
            "options": self.model_dump(mode="json"),
        }

    def transform_block(self, block: BlockContext) -> None:
        """Change a decoder block in a function-preserving way before its layers are quantized."""

    def groups_of(self, block: BlockContext) -> list[list[str]]:
        """Names of the block's linears in the batches that are quantized between two forwards.

        One batch by default: all layers see statistics of the same forward. Methods that collect
        statistics anew after each sublayer return one batch for each.
        """
        return [[layer.name for layer in block.layers]]

    def quantize(
        self,
        weight: Tensor,
        statistics: LayerStatistics | None,
        *,
        name: str = "",
    ) -> QuantizedLayer:
        """Choose codes for one linear layer.

        Args:
            weight: float32 of shape (out_features, in_features).
            statistics: what `needs` asks for, or None.
            name: the layer's dotted name, for messages.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to quantize a layer")
