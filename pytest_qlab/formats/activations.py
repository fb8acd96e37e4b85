"""Quantizers for a linear layer's inputs: quantize and dequantize at once, type preserved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.float8 import row_scales, to_e4m3


class ActivationQuantizer(ABC):
    """Rounds a layer's input to `bits`-bit codes and returns what they stand for."""

    format: ClassVar[str]
    bits: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """`x` of shape (..., n), rounded; same shape and type, computed in float32."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored; empty where ranges are found at run time."""

    def metadata(self) -> dict[str, Any]:
        """Plain JSON types; `format` names the class."""
        return {"format": self.format, "bits": self.bits}


class PerTokenSymmetric(ActivationQuantizer):
    """One scale for each token, found at run time: max |x| / (2**(bits-1) - 1)."""

    format: ClassVar[str] = "per-token-symmetric"

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self._quantize(x)
        return (codes * scale).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes of the shape of `x`, and float32 scales (..., 1)."""
        codes, scale = self._quantize(x)
        return codes.to(torch.int8), scale

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        limit = 2 ** (self.bits - 1) - 1
        values = x.to(torch.float32)
        # A token of zeros has the scale 0; any other divisor leaves it zero. The largest value's
        # code is `limit` up to rounding, so there is nothing to clamp.
        scale = values.abs().amax(-1, keepdim=True) / limit
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (values / scale).round_(), scale

    def tensors(self) -> dict[str, Tensor]:
        return {}


class PerTokenFloat8(ActivationQuantizer):
    """E4M3 numbers with one scale for each token, found at run time: max |x| / 448."""

    format: ClassVar[str] = "per-token-float8"
    bits = 8

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self.codes(x)
        return codes.to(torch.float32).mul_(scale).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float8_e4m3fn of the shape of `x`, and float32 scales (..., 1)."""
        scale = row_scales(x)
        return to_e4m3(x.to(torch.float32) / scale), scale

    def tensors(self) -> dict[str, Tensor]:
        return {}


class PerTensorAffine(ActivationQuantizer):
    """One scale and zero point for all tokens, fixed by calibration; values outside saturate."""

    format: ClassVar[str] = "per-tensor-affine"

    def __init__(self, bits: int, scale: float, zero_point: int) -> None:
        self.bits = bits
        # Rounded to float32 here, so that a loaded quantizer equals the saved one to the bit.
        self.scale = float(torch.tensor(scale, dtype=torch.float32))
        self.zero_point = zero_point

    @classmethod
    def from_range(cls, minimum: float, maximum: float, bits: int) -> PerTensorAffine:
        """The grid whose ends are the range's, widened to contain 0; a zero range becomes ±1."""
        low, high = min(minimum, 0.0), max(maximum, 0.0)
        if low == high:
            low, high = -1.0, 1.0
        limit = 2**bits - 1
        scale = max((high - low) / limit, torch.finfo(torch.float32).tiny)
        return cls(bits, scale, min(max(round(-low / scale), 0), limit))

    def __call__(self, x: Tensor) -> Tensor:
        return (self._centred(x) * self.scale).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """uint8 codes of the shape of `x`, which stand for `scale * (code - zero_point)`."""
        return self._centred(x).add_(self.zero_point).to(torch.uint8)

    def _centred(self, x: Tensor) -> Tensor:
        low, high = -self.zero_point, 2**self.bits - 1 - self.zero_point
        return (x.to(torch.float32) / self.scale).round_().clamp_(low, high)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "scale": torch.tensor([self.scale], dtype=torch.float32),
            "zero_point": torch.tensor([self.zero_point], dtype=torch.int32),
        }


def load_activation(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ActivationQuantizer:
    """Restore an activation quantizer.

    Raises:
        CorruptEntryError: the format is unknown, or a tensor is missing.
    """
    kind = metadata.get("format")
    if kind == PerTokenSymmetric.format:
        return PerTokenSymmetric(int(metadata["bits"]))
    if kind == PerTokenFloat8.format:
        return PerTokenFloat8()
    if kind == PerTensorAffine.format and {"scale", "zero_point"} <= tensors.keys():
        return PerTensorAffine(
            int(metadata["bits"]), float(tensors["scale"]), int(tensors["zero_point"])
        )
    raise CorruptEntryError(
        f"An activation quantizer of the format {kind!r} with the tensors "
        f"{', '.join(sorted(tensors)) or '(none)'} cannot be restored. The stored artefact is "
        "damaged or from another version: delete it and run again."
    )
