"""How many bytes and bits a quantized model takes, from what is stored and nothing else.

Conventions differ between tools; each number here says what it counts. Linear-only bits per weight
count the quantized layers with their scales, zeros, indices and padding. Whole-model bits per
weight and the compression ratio count every stored tensor, embeddings and norms too. The ratio is
against the base model in the dtypes of its own checkpoint, never against float32 that it was merely
evaluated in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import Estimate


@dataclass(frozen=True)
class LayerSize:
    """One quantized layer: its shape (out, in) and the bytes of everything stored for it."""

    name: str
    shape: tuple[int, int]
    nbytes: int

    @property
    def elements(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return 8 * self.nbytes / self.elements


@dataclass(frozen=True)
class Size:
    """Sizes of a quantized model.

    Attributes:
        layers: the quantized linear layers.
        others: bytes of every other stored tensor by name, tied ones once.
        parameters: of the base model, tied ones once.
        base_bytes: of the base model, in the dtypes of its checkpoint.
    """

    layers: tuple[LayerSize, ...]
    others: Mapping[str, int]
    parameters: int
    base_bytes: int

    @classmethod
    def of(
        cls,
        layers: Iterable[tuple[str, tuple[int, int], int]],
        others: Mapping[str, int],
        *,
        parameters: int,
        base_bytes: int,
    ) -> Self:
        """From (name, shape, bytes) of each quantized layer and the bytes of the other tensors.

        Raises:
            MetricError: there is nothing to measure, or a number cannot be a size.
        """
        found = cls(
            tuple(LayerSize(*layer) for layer in layers), dict(others), parameters, base_bytes
        )
        negative = [layer.name for layer in found.layers if layer.nbytes < 0 or not layer.elements]
        negative += [name for name, nbytes in found.others.items() if nbytes < 0]
        weights = sum(layer.elements for layer in found.layers)
        if negative or parameters < max(weights, 1) or base_bytes <= 0 or found.nbytes <= 0:
            raise MetricError(
                f"These are no sizes of a model: {parameters:,} parameters, of which {weights:,} "
                f"in quantized layers, {base_bytes:,} bytes before and {found.nbytes:,} after"
                f"{f', impossible: {negative[0]}' if negative else ''}. Count every parameter of "
                "the base model once, in the dtype of its checkpoint."
            )
        return found

    @property
    def layer_bytes(self) -> int:
        """Bytes of the quantized layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors; the file is longer by its header only."""
        return self.layer_bytes + sum(self.others.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per weight of the quantized layers alone; None where no layer is quantized."""
        weights = sum(layer.elements for layer in self.layers)
        return 8 * self.layer_bytes / weights if weights else None

    @property
    def model_bits_per_weight(self) -> float:
        """Bits of all stored tensors over all parameters."""
        return 8 * self.nbytes / self.parameters

    @property
    def compression_ratio(self) -> float:
        """Bytes of the base model as its checkpoint stores it, over bytes of this one."""
        return self.base_bytes / self.nbytes

    def estimates(self, candidate: str = "") -> dict[str, Estimate]:
        """size, model_bits_per_weight, bits_per_weight, compression_ratio; all exact."""
        detail = f"{self.base_bytes:,} -> {self.nbytes:,} bytes"
        values: dict[str, tuple[float | None, str]] = {
            "size": (self.nbytes, "bytes"),
            "model_bits_per_weight": (self.model_bits_per_weight, "bits"),
            "bits_per_weight": (self.bits_per_weight, "bits"),
            "compression_ratio": (self.compression_ratio, ""),
        }
        return Estimate.exactly(
            values, candidate=candidate, convention="stored tensors", detail=detail
        )
