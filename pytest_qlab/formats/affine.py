"""Packed codes on affine grids, one grid for each group of consecutive inputs of a row.

The layout is that of GPTQ and AWQ checkpoints in content, row by row in order: codes, scales and
zero points; a group index per column only where the groups are not consecutive columns. In bits per
weight it takes `bits + (16 + bits) / group_size`, rows padded to whole bytes. Zero points that are
no codes, as HQQ's, are float16: `bits + 32 / group_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor, stored_width
from pytest_qlab.formats.bits import pack, packed_width, unpack

SMALLEST_FLOAT16_SCALE = 2.0**-17


def group_length(columns: int, group_size: int) -> int:
    """Columns in a full group: all of the row's for -1, or where the row is shorter."""
    return columns if group_size == -1 else min(group_size, columns)


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row; the last one is shorter where the size does not divide the row."""
    return -(-columns // group_length(columns, group_size))


def scale_storage_dtype(scales: Tensor) -> torch.dtype:
    """The type in which a tensor's scales are stored: float16 unless they do not survive it.

    They do not where one overflows, or is so small (below 2**-17) that float16, whose spacing there
    is 2**-24, would keep less than 8 significant bits.
    """
    smallest, largest = (float(edge) for edge in torch.aminmax(scales))
    fits = smallest >= SMALLEST_FLOAT16_SCALE and largest <= torch.finfo(torch.float16).max
    return torch.float16 if fits else torch.float32


@register_format
class AffineGroups(PackedWeight):
    """`scale * (code - zero)` with one scale and zero point for each row and group.

    Args:
        codes: uint8 (m, packed_width(n, bits)), packed.
        scales: float16 or float32 (m, G).
        zeros: uint8 (m, packed_width(G, bits)), packed; or float16 (m, G), real numbers; None for a
            symmetric grid, whose zero point is 2**(bits - 1).
        shape: (m, n).
        bits: width of a code.
        group_size: columns of a group, or -1 for the whole row.
        column_groups: int32 (n,), the group of each column, where groups are not consecutive
            columns (act-order without static groups: `g_idx`).
    """

    format: ClassVar[str] = "affine-groups"

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        *,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
        column_groups: Tensor | None = None,
    ) -> None:
        self._shape = shape
        self.bits = bits
        self.group_size = group_size
        self._codes = codes
        self.scales = scales
        self._zeros = zeros
        self.column_groups = column_groups

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        *,
        bits: int,
        group_size: int,
        column_groups: Tensor | None = None,
        real_zeros: bool = False,
    ) -> Self:
        """Pack codes (m, n) and zero points (m, G), given as whole numbers in any type.

        With `real_zeros`, zero points are any numbers, in float16. Scales and such zero points are
        stored in the type they have, so that nothing is rounded after the codes have been chosen.

        Raises:
            ValueError: a code or zero point does not fit, the scales are neither float16 nor
                float32, or real zero points are not float16.
        """
        if scales.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"scales are stored as float16 or float32, not as {scales.dtype}")
        if real_zeros and (zeros is None or zeros.dtype != torch.float16):
            found = "missing" if zeros is None else zeros.dtype
            raise ValueError(f"real zero points are stored as float16; they are {found}")
        rows, columns = codes.shape
        if zeros is not None:
            zeros = zeros.contiguous() if real_zeros else pack(zeros, bits)
        return cls(
            pack(codes, bits),
            scales.contiguous(),
            zeros,
            shape=(rows, columns),
            bits=bits,
            group_size=group_size,
            column_groups=None if column_groups is None else column_groups.to(torch.int32),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is implied."""
        return self._zeros is None

    def codes(self) -> Tensor:
        """uint8 (m, n)."""
        return unpack(self._codes, self.bits, self._shape[1])

    def zeros(self) -> Tensor:
        """uint8 (m, G), or float16 if they are real."""
        if self._zeros is not None and self._zeros.is_floating_point():
            return self._zeros
        if self._zeros is None:
            return torch.full(
                self.scales.shape,
                2 ** (self.bits - 1),
                dtype=torch.uint8,
                device=self.scales.device,
            )
        return unpack(self._zeros, self.bits, self.scales.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": self._codes, "scales": self.scales}
        if self._zeros is not None:
            stored["zeros"] = self._zeros
        if self.column_groups is not None:
            stored["column_groups"] = self.column_groups
        return stored

    def metadata(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "shape": list(self._shape),
            "bits": self.bits,
            "group_size": self.group_size,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        bits, group_size = stored_width(metadata["bits"]), metadata["group_size"]
        rows, columns = metadata["shape"]
        groups = group_count(columns, group_size)
        zeros, column_groups = None, None
        if "zeros" in tensors:
            real = tensors["zeros"].is_floating_point()
            width = groups if real else packed_width(groups, bits)
            zeros = stored_tensor(tensors, "zeros", (rows, width))
        if "column_groups" in tensors:
            column_groups = stored_tensor(tensors, "column_groups", (columns,))
        return cls(
            stored_tensor(tensors, "codes", (rows, packed_width(columns, bits))),
            stored_tensor(tensors, "scales", (rows, groups)),
            zeros,
            shape=(rows, columns),
            bits=bits,
            group_size=group_size,
            column_groups=column_groups,
        )

    def take_rows(self, index: Tensor) -> Self:
        return type(self)(
            self._codes.index_select(0, index),
            self.scales.index_select(0, index),
            None if self._zeros is None else self._zeros.index_select(0, index),
            shape=(len(index), self._shape[1]),
            bits=self.bits,
            group_size=self.group_size,
            column_groups=self.column_groups,
        )

    def dequantize(self) -> Tensor:
        columns = self._shape[1]
        scales, zeros = self.scales.to(torch.float32), self.zeros().to(torch.float32)
        codes = self.codes().to(torch.float32)
        if self.column_groups is not None:
            groups = self.column_groups
        elif scales.shape[1] == 1:
            return codes.sub_(zeros).mul_(scales)
        else:
            length = group_length(columns, self.group_size)
            groups = torch.arange(columns, dtype=torch.int32, device=codes.device) // length
        return codes.sub_(zeros.index_select(1, groups)).mul_(scales.index_select(1, groups))
