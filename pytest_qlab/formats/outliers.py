"""A dense format with some weights replaced by values of their own: a compressed sparse matrix.

An outlier takes 16 bits for its value and 16 for its column (32 where a row has more than 65,536),
a row 32 bits for where its outliers begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.finite import is_finite
from pytest_qlab.formats.base import PackedWeight, load_packed, register_format, stored_tensor

DENSE = "dense_"


@register_format
class WithOutliers(PackedWeight):
    """`dense`, except where an outlier stands in its place.

    Args:
        dense: what all other weights are in, of shape (m, n).
        values: float16 (or float32, where float16 does not hold them) (k,), row by row.
        columns: uint16 or int32 (k,), of each outlier, rising within a row.
        row_starts: int32 (m + 1,), where each row's outliers begin.
    """

    format: ClassVar[str] = "with-outliers"

    def __init__(
        self, dense: PackedWeight, values: Tensor, columns: Tensor, row_starts: Tensor
    ) -> None:
        self.dense = dense
        self.values = values
        self.columns = columns
        self.row_starts = row_starts

    @classmethod
    def pack(cls, dense: PackedWeight, weight: Tensor, mask: Tensor) -> Self:
        """Keep those weights of (m, n) as outliers for which `mask`, bool (m, n), is true."""
        rows, columns = mask.nonzero(as_tuple=True)
        values = weight[rows, columns]
        half = values.to(torch.float16)
        counts = torch.bincount(rows, minlength=mask.shape[0])
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        narrow = mask.shape[1] <= 2**16
        return cls(
            dense,
            half if is_finite(half) else values.to(torch.float32),
            columns.to(torch.uint16 if narrow else torch.int32),
            starts.to(torch.int32),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.dense.shape

    def mask(self) -> Tensor:
        """bool (m, n), true for outliers."""
        found = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        found[self._rows(), self.columns.to(torch.int64)] = True
        return found

    def _rows(self) -> Tensor:
        counts = self.row_starts.diff().to(torch.int64)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def tensors(self) -> dict[str, Tensor]:
        inner = {f"{DENSE}{name}": tensor for name, tensor in self.dense.tensors().items()}
        return {
            **inner,
            "outlier_values": self.values,
            "outlier_columns": self.columns,
            "row_starts": self.row_starts,
        }

    def metadata(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "shape": list(self.shape),
            "outliers": len(self.values),
            "dense": self.dense.metadata(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        inner = {
            name.removeprefix(DENSE): tensor
            for name, tensor in tensors.items()
            if name.startswith(DENSE)
        }
        dense = load_packed(metadata["dense"], inner)
        count, (rows, columns) = int(metadata["outliers"]), dense.shape
        found = cls(
            dense,
            stored_tensor(tensors, "outlier_values", (count,)),
            stored_tensor(tensors, "outlier_columns", (count,)),
            stored_tensor(tensors, "row_starts", (rows + 1,)),
        )
        places, starts = found.columns.to(torch.int64), found.row_starts
        sound = (
            int(starts[0]) == 0 and int(starts[-1]) == count and bool((starts.diff() >= 0).all())
        )
        if not sound or (count and not 0 <= int(places.min()) <= int(places.max()) < columns):
            raise CorruptEntryError(
                f"The outliers of a packed weight of shape {(rows, columns)} point outside of it. "
                "The stored artefact is damaged: delete it and run again."
            )
        return found

    def take_rows(self, index: Tensor) -> Self:
        starts = self.row_starts.to(torch.int64)
        counts = starts.diff()[index]
        taken = torch.repeat_interleave(starts[index], counts)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        offset = torch.arange(int(ends[-1]), device=taken.device)
        offset = offset - torch.repeat_interleave(ends[:-1], counts)
        places = taken + offset
        return type(self)(
            self.dense.take_rows(index),
            self.values[places],
            self.columns.to(torch.int32)[places].to(self.columns.dtype),
            ends.to(torch.int32),
        )

    def dequantize(self) -> Tensor:
        weight = self.dense.dequantize()
        weight[self._rows(), self.columns.to(torch.int64)] = self.values.to(torch.float32)
        return weight
