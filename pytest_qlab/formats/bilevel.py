"""Codes on small affine grids whose scales and zero points are codes themselves (SpQR).

A group is some columns of one row. Its scale and its zero point, a real number, are codes of
`statistic_bits` on grids that `statistic_group_size` consecutive rows share. For m rows, n columns,
groups of g columns and 16 rows that share, with 16-bit numbers: bits + 2 statistic_bits / g +
64 / (16 g) bits per weight, and 16 / m where groups are scattered columns. Codes of a row, and
those of its scales and zero points, are padded to whole bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.affine import group_count, group_length
from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor
from pytest_qlab.formats.bits import WIDTHS, pack, packed_width, unpack


def decode_statistics(
    codes: Tensor, ranges: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Scales or zero points (m, G): `least + step * code`, computed in `dtype`.

    Args:
        codes: (m, G).
        ranges: (2, C, G), least and step, of the C groups of `group_size` consecutive rows.
        dtype: float32, in which packed weights are dequantized, or a wider one.
    """
    groups = torch.arange(len(codes), device=codes.device) // group_size
    least, step = ranges.to(dtype)
    decoded: Tensor = least.index_select(0, groups) + step.index_select(0, groups) * codes
    return decoded


@register_format
class BilevelAffine(PackedWeight):
    """`scale * (code - zero)` with scales and zero points that are quantized over rows.

    Args:
        codes: uint8 (m, packed_width(n, bits)), packed.
        scales: uint8 (m, packed_width(G, statistic_bits)), packed codes.
        zeros: the same, of zero points.
        scale_ranges: float16 or float32 (2, C, G): the least scale of `statistic_group_size` rows,
            and the step from one code to the next.
        zero_ranges: the same, of zero points.
        shape: (m, n).
        bits: width of a weight's code.
        group_size: columns of a group, or -1 for the whole row.
        statistic_bits: width of the code of a scale or zero point.
        statistic_group_size: rows that share a range; the last ones may be fewer.
        column_groups: uint16 or int32 (n,), the group of each column, where groups are not
            consecutive columns.
    """

    format: ClassVar[str] = "bilevel-affine"

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        scale_ranges: Tensor,
        zero_ranges: Tensor,
        *,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
        statistic_bits: int,
        statistic_group_size: int,
        column_groups: Tensor | None = None,
    ) -> None:
        self._shape = shape
        self.bits = bits
        self.group_size = group_size
        self.statistic_bits = statistic_bits
        self.statistic_group_size = statistic_group_size
        self._codes, self._scales, self._zeros = codes, scales, zeros
        self.scale_ranges, self.zero_ranges = scale_ranges, zero_ranges
        self.column_groups = column_groups

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        scale_ranges: Tensor,
        zero_ranges: Tensor,
        *,
        bits: int,
        group_size: int,
        statistic_bits: int,
        statistic_group_size: int,
        column_groups: Tensor | None = None,
    ) -> Self:
        """Pack codes (m, n), and codes of scales and zero points (m, G), whole numbers of any type.

        Raises:
            ValueError: a code does not fit, or ranges are neither float16 nor float32.
        """
        for ranges in (scale_ranges, zero_ranges):
            if ranges.dtype not in (torch.float16, torch.float32):
                raise ValueError(f"ranges are stored as float16 or float32, not as {ranges.dtype}")
        narrow = scales.shape[1] <= 2**16
        rows, columns = codes.shape
        return cls(
            pack(codes, bits),
            pack(scales, statistic_bits),
            pack(zeros, statistic_bits),
            scale_ranges.contiguous(),
            zero_ranges.contiguous(),
            shape=(rows, columns),
            bits=bits,
            group_size=group_size,
            statistic_bits=statistic_bits,
            statistic_group_size=statistic_group_size,
            column_groups=None
            if column_groups is None
            else column_groups.to(torch.uint16 if narrow else torch.int32),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def codes(self) -> Tensor:
        """uint8 (m, n)."""
        return unpack(self._codes, self.bits, self._shape[1])

    def scales(self) -> Tensor:
        """float32 (m, G)."""
        codes = unpack(self._scales, self.statistic_bits, self.scale_ranges.shape[2])
        return decode_statistics(codes, self.scale_ranges, self.statistic_group_size)

    def zeros(self) -> Tensor:
        """float32 (m, G)."""
        codes = unpack(self._zeros, self.statistic_bits, self.zero_ranges.shape[2])
        return decode_statistics(codes, self.zero_ranges, self.statistic_group_size)

    def tensors(self) -> dict[str, Tensor]:
        stored = {
            "codes": self._codes,
            "scales": self._scales,
            "zeros": self._zeros,
            "scale_ranges": self.scale_ranges,
            "zero_ranges": self.zero_ranges,
        }
        if self.column_groups is not None:
            stored["column_groups"] = self.column_groups
        return stored

    def metadata(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "shape": list(self._shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "statistic_bits": self.statistic_bits,
            "statistic_group_size": self.statistic_group_size,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        bits, width = metadata["bits"], metadata["statistic_bits"]
        shared, group_size = metadata["statistic_group_size"], metadata["group_size"]
        rows, columns = metadata["shape"]
        if bits not in WIDTHS or width not in WIDTHS or not shared >= 1:
            raise CorruptEntryError(
                f"A packed weight claims codes of {bits!r} bits, and of {width!r} bits for scales "
                f"and zero points that {shared!r} rows share; expected widths of {WIDTHS} and at "
                "least one row. The stored artefact is damaged: delete it and run again."
            )
        groups = group_count(columns, group_size)
        column_groups = None
        if "column_groups" in tensors:
            column_groups = stored_tensor(tensors, "column_groups", (columns,))
            found = column_groups.to(torch.int64)
            if not 0 <= int(found.min()) <= int(found.max()) < groups:
                raise CorruptEntryError(
                    f"A column of a packed weight names a group that is none of its {groups}. The "
                    "stored artefact is damaged: delete it and run again."
                )
        ranges = (2, -(-rows // shared), groups)
        return cls(
            stored_tensor(tensors, "codes", (rows, packed_width(columns, bits))),
            stored_tensor(tensors, "scales", (rows, packed_width(groups, width))),
            stored_tensor(tensors, "zeros", (rows, packed_width(groups, width))),
            stored_tensor(tensors, "scale_ranges", ranges),
            stored_tensor(tensors, "zero_ranges", ranges),
            shape=(rows, columns),
            bits=bits,
            group_size=group_size,
            statistic_bits=width,
            statistic_group_size=shared,
            column_groups=column_groups,
        )

    def take_rows(self, index: Tensor) -> Self:
        """Every row takes its own copy of the ranges that it shared."""
        shared = index // self.statistic_group_size
        return type(self)(
            self._codes.index_select(0, index),
            self._scales.index_select(0, index),
            self._zeros.index_select(0, index),
            self.scale_ranges.index_select(1, shared),
            self.zero_ranges.index_select(1, shared),
            shape=(len(index), self._shape[1]),
            bits=self.bits,
            group_size=self.group_size,
            statistic_bits=self.statistic_bits,
            statistic_group_size=1,
            column_groups=self.column_groups,
        )

    def dequantize(self) -> Tensor:
        columns = self._shape[1]
        if self.column_groups is not None:
            groups = self.column_groups.to(torch.int64)
        else:
            length = group_length(columns, self.group_size)
            groups = torch.arange(columns, device=self._codes.device) // length
        scales, zeros = (each.index_select(1, groups) for each in (self.scales(), self.zeros()))
        return self.codes().to(torch.float32).sub_(zeros).mul_(scales)
