"""Weights of 4 bits, E2M1, with a scale for each block of a row: MXFP4 and NVFP4.

MXFP4 has blocks of 32 with powers of two, E8M0, as scales; NVFP4 has blocks of 16 with scales in
E4M3 and one more scale for the whole tensor. Both are `element * scale` along the inputs; codes of
two neighbours share a byte, the first in its low half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.affine import group_count, group_length
from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor
from pytest_qlab.formats.bits import pack, packed_width, unpack
from pytest_qlab.formats.e2m1 import BITS, LARGEST_E8M0, e2m1_values, e8m0_values

LARGEST_E4M3_BITS = 0x7E
"""Bits of the largest scales; what is above is no number, or negative."""


@register_format
class MicroscaledFloat4(PackedWeight):
    """E2M1 elements in blocks of a row that share a scale.

    Args:
        codes: uint8 (m, packed_width(n, 4)), packed.
        scales: (m, G): biased exponents in uint8 (E8M0), or float8_e4m3fn.
        tensor_scale: float32 (1,), which scales in float8_e4m3fn are multiplied by; None for E8M0.
        shape: (m, n).
        block_size: columns that share a scale.
    """

    format: ClassVar[str] = "microscaled-float4"

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        tensor_scale: Tensor | None,
        *,
        shape: tuple[int, int],
        block_size: int,
    ) -> None:
        self._shape = shape
        self._codes = codes
        self.scales = scales
        self.tensor_scale = tensor_scale
        self.block_size = block_size

    @classmethod
    def pack(
        cls, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, *, block_size: int
    ) -> Self:
        """Pack codes (m, n), whole numbers 0 .. 15, with the scales of their blocks (m, G).

        Raises:
            ValueError: a code does not fit, or the scales are of another type.
        """
        wanted = torch.uint8 if tensor_scale is None else torch.float8_e4m3fn
        if scales.dtype != wanted:
            raise ValueError(f"scales are {scales.dtype}; expected {wanted}")
        rows, columns = codes.shape
        return cls(
            pack(codes, BITS),
            scales.contiguous(),
            tensor_scale,
            shape=(rows, columns),
            block_size=block_size,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def codes(self) -> Tensor:
        """uint8 (m, n)."""
        return unpack(self._codes, BITS, self._shape[1])

    def block_scales(self) -> Tensor:
        """What the elements of each block are multiplied by: float32 (m, G)."""
        if self.tensor_scale is None:
            return e8m0_values(self.scales)
        return self.scales.to(torch.float32) * self.tensor_scale

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": self._codes, "scales": self.scales}
        if self.tensor_scale is not None:
            stored["tensor_scale"] = self.tensor_scale
        return stored

    def metadata(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "shape": list(self._shape),
            "bits": BITS,
            "block_size": self.block_size,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        rows, columns = metadata["shape"]
        block_size = int(metadata["block_size"])
        scales = stored_tensor(tensors, "scales", (rows, group_count(columns, block_size)))
        tensor_scale = None
        if "tensor_scale" in tensors:
            tensor_scale = stored_tensor(tensors, "tensor_scale", (1,))
        wanted = torch.uint8 if tensor_scale is None else torch.float8_e4m3fn
        if scales.dtype != wanted:
            raise CorruptEntryError(
                f"The scales of a packed weight are {scales.dtype}; expected {wanted}. The stored "
                "artefact is damaged: delete it and run again."
            )
        largest = LARGEST_E8M0 if tensor_scale is None else LARGEST_E4M3_BITS
        if scales.numel() and int(scales.view(torch.uint8).max()) > largest:
            raise CorruptEntryError(
                "A scale of a packed weight is negative or no number. The stored artefact is "
                "damaged: delete it and run again."
            )
        return cls(
            stored_tensor(tensors, "codes", (rows, packed_width(columns, BITS))),
            scales,
            tensor_scale,
            shape=(rows, columns),
            block_size=block_size,
        )

    def take_rows(self, index: Tensor) -> Self:
        return type(self)(
            self._codes.index_select(0, index),
            self.scales.view(torch.uint8).index_select(0, index).view(self.scales.dtype),
            self.tensor_scale,
            shape=(len(index), self._shape[1]),
            block_size=self.block_size,
        )

    def dequantize(self) -> Tensor:
        columns = self._shape[1]
        blocks = torch.arange(columns, device=self._codes.device) // group_length(
            columns, self.block_size
        )
        return e2m1_values(self.codes()).mul_(self.block_scales().index_select(1, blocks))
