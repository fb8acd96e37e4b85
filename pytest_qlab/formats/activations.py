"""Quantizers for a linear layer's inputs: quantize and dequantize at once, type preserved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.e2m1 import (
    BITS,
    LARGEST,
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    ScaleRule,
    e2m1_codes,
    e2m1_values,
    e4m3_scales,
    e8m0_scales,
    e8m0_values,
    scale_above,
)
from pytest_qlab.formats.float8 import LARGEST as LARGEST_E4M3
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

    @property
    def largest(self) -> float | None:
        """The largest magnitude that is held; None where ranges are found at run time."""
        return None


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

    @property
    def largest(self) -> float:
        top: int = 2**self.bits - 1
        return max(self.zero_point, top - self.zero_point) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {
            "scale": torch.tensor([self.scale], dtype=torch.float32),
            "zero_point": torch.tensor([self.zero_point], dtype=torch.int32),
        }


class PerBlockMxfp4(ActivationQuantizer):
    """E2M1 numbers with a power of two for each 32 inputs of a token, found at run time.

    Args:
        scale: how it follows from the block's largest magnitude; see `e8m0_scales`.
    """

    format: ClassVar[str] = "per-block-mxfp4"
    bits = BITS

    def __init__(self, scale: ScaleRule = "floor") -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        codes, exponents = self.codes(x)
        return _scaled(codes, e8m0_values(exponents), MXFP4_BLOCK).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E2M1 codes 0 .. 15, uint8 of the shape of `x`, and biased exponents, uint8 (..., G)."""
        blocks = _blocks(x, MXFP4_BLOCK)
        exponents = e8m0_scales(blocks.abs().amax(-1), self.scale)
        codes = e2m1_codes(blocks / e8m0_values(exponents).unsqueeze(-1))
        return codes.flatten(-2)[..., : x.shape[-1]], exponents

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def metadata(self) -> dict[str, Any]:
        return {**super().metadata(), "scale": self.scale}


class PerBlockNvfp4(ActivationQuantizer):
    """E2M1 numbers with an E4M3 scale for each 16 inputs of a token, found at run time.

    Above the scales of blocks is one in float32, fixed by calibration for all tokens: magnitudes
    beyond 6 * 448 times it saturate.

    Args:
        tensor_scale: that scale; None for one of each token, found at run time as well, with which
            nothing saturates.
    """

    format: ClassVar[str] = "per-block-nvfp4"
    bits = BITS

    def __init__(self, tensor_scale: float | None = None) -> None:
        self.tensor_scale = tensor_scale
        if tensor_scale is not None:  # as it is stored, so that a loaded quantizer is the same
            self.tensor_scale = float(torch.tensor(tensor_scale, dtype=torch.float32))

    @classmethod
    def from_largest(cls, largest: float) -> PerBlockNvfp4:
        """With the scale by which `largest`, of calibration, is the largest input that is held.

        With one of each token if it is 0.
        """
        return cls(float(scale_above(torch.tensor(largest))) if largest else None)

    @property
    def largest(self) -> float | None:
        return None if self.tensor_scale is None else LARGEST * LARGEST_E4M3 * self.tensor_scale

    def __call__(self, x: Tensor) -> Tensor:
        codes, scales, above = self.codes(x)
        return _scaled(codes, scales.to(torch.float32) * above, NVFP4_BLOCK).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E2M1 codes 0 .. 15, uint8 of the shape of `x`; scales of blocks; the scale above them.

        float8_e4m3fn (..., G), and float32: (1,), or (..., 1) where each token has its own.
        """
        blocks = _blocks(x, NVFP4_BLOCK)
        largest = blocks.abs().amax(-1)
        if self.tensor_scale is None:
            above = scale_above(largest.amax(-1, keepdim=True))
        else:
            above = torch.full((1,), self.tensor_scale, device=x.device)
        scales = e4m3_scales(largest / LARGEST / above)
        codes = e2m1_codes(blocks / (scales.to(torch.float32) * above).unsqueeze(-1))
        return codes.flatten(-2)[..., : x.shape[-1]], scales, above

    def tensors(self) -> dict[str, Tensor]:
        if self.tensor_scale is None:
            return {}
        return {"tensor_scale": torch.tensor([self.tensor_scale], dtype=torch.float32)}

    def metadata(self) -> dict[str, Any]:
        return {**super().metadata(), "calibrated": self.tensor_scale is not None}


def _blocks(x: Tensor, size: int) -> Tensor:
    """`x` (..., n) as blocks (..., G, size), float32; zeros fill a last block that is shorter."""
    padded = pad(x.to(torch.float32), (0, -x.shape[-1] % size))
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // size, size)  # of no tokens as well


def _scaled(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    """What codes (..., n) with scales of blocks (..., G) stand for: float32 (..., n)."""
    each = scales.repeat_interleave(size, -1)[..., : codes.shape[-1]]
    return e2m1_values(codes).mul_(each)


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
    if kind == PerBlockMxfp4.format and metadata.get("scale") in get_args(ScaleRule):
        return PerBlockMxfp4(metadata["scale"])
    if kind == PerBlockNvfp4.format and metadata.get("calibrated") is False:
        return PerBlockNvfp4()
    if kind == PerBlockNvfp4.format and "tensor_scale" in tensors:
        return PerBlockNvfp4(float(tensors["tensor_scale"]))
    raise CorruptEntryError(
        f"An activation quantizer of the format {kind!r} with the tensors "
        f"{', '.join(sorted(tensors)) or '(none)'} cannot be restored. The stored artefact is "
        "damaged or from another version: delete it and run again."
    )
