"""Packed codes of a weight that was rotated on both sides before it was rounded (QuIP).

Stored are `bits` for each weight, one scale for the whole matrix in float32, and, where columns
were rescaled, a float16 for each column: bits + 16 / m + 32 / (m n) bits per weight. The rotations
are a kind and a seed each; they are made anew, and undone, whenever the weight is dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor, stored_width
from pytest_qlab.formats.bits import pack, packed_width, unpack
from pytest_qlab.formats.transforms import Transform


@register_format
class Incoherent(PackedWeight):
    """W = U^T C V / d, C = scale * (2 code / (2**bits - 1) - 1), U and V orthogonal, d by column.

    Args:
        codes: uint8 (m, packed_width(n, bits)), packed.
        scale: float32 (1,), the end of the grid, which is symmetric around 0 and has no point
            there.
        column_scales: float16 (n,), d; None where columns were not rescaled.
        row_transform: U, of order m.
        column_transform: V, of order n.
        bits: width of a code.
        rows: int32 (k,), the rows of W that this weight consists of; None for all m in their order.
            Every row of W needs all codes, so that all are kept.
    """

    format: ClassVar[str] = "incoherent"

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        column_scales: Tensor | None,
        *,
        row_transform: Transform,
        column_transform: Transform,
        bits: int,
        rows: Tensor | None = None,
    ) -> None:
        self._codes = codes
        self.scale = scale
        self.column_scales = column_scales
        self.row_transform = row_transform
        self.column_transform = column_transform
        self.bits = bits
        self.rows = rows

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        column_scales: Tensor | None,
        *,
        row_transform: Transform,
        column_transform: Transform,
        bits: int,
    ) -> Self:
        """Pack codes (m, n), whole numbers in any type; scales in the types they are stored in.

        Raises:
            ValueError: a code does not fit, or a scale has another type.
        """
        if scale.dtype != torch.float32 or (
            column_scales is not None and column_scales.dtype != torch.float16
        ):
            raise ValueError("the scale is stored as float32, scales of columns as float16")
        return cls(
            pack(codes, bits),
            scale.reshape(1),
            column_scales,
            row_transform=row_transform,
            column_transform=column_transform,
            bits=bits,
        )

    @property
    def shape(self) -> tuple[int, int]:
        rows = self.row_transform.order if self.rows is None else len(self.rows)
        return rows, self.column_transform.order

    def codes(self) -> Tensor:
        """uint8 (m, n), of the rotated weight."""
        return unpack(self._codes, self.bits, self.column_transform.order)

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": self._codes, "scale": self.scale}
        if self.column_scales is not None:
            stored["column_scales"] = self.column_scales
        if self.rows is not None:
            stored["rows"] = self.rows
        return stored

    def metadata(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "shape": list(self.shape),
            "bits": self.bits,
            "rotated_rows": self.row_transform.order,
            "row_transform": self.row_transform.metadata(),
            "column_transform": self.column_transform.metadata(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        bits, order = stored_width(metadata["bits"]), metadata["rotated_rows"]
        rows, columns = metadata["shape"]
        taken, column_scales = None, None
        if "rows" in tensors:
            taken = stored_tensor(tensors, "rows", (rows,))
        if "column_scales" in tensors:
            column_scales = stored_tensor(tensors, "column_scales", (columns,))
        outside = taken is not None and not bool(((taken >= 0) & (taken < order)).all())
        if outside or (taken is None and rows != order):
            raise CorruptEntryError(
                f"A packed weight of {rows} rows was rotated as one of {order} rows, and does not "
                "say which of these it has. The stored artefact is damaged: delete it and run "
                "again."
            )
        return cls(
            stored_tensor(tensors, "codes", (order, packed_width(columns, bits))),
            stored_tensor(tensors, "scale", (1,)),
            column_scales,
            row_transform=Transform.from_metadata(metadata["row_transform"], order),
            column_transform=Transform.from_metadata(metadata["column_transform"], columns),
            bits=bits,
            rows=taken,
        )

    def take_rows(self, index: Tensor) -> Self:
        rows = index if self.rows is None else self.rows.index_select(0, index)
        return type(self)(
            self._codes,
            self.scale,
            self.column_scales,
            row_transform=self.row_transform,
            column_transform=self.column_transform,
            bits=self.bits,
            rows=rows.to(torch.int32),
        )

    def dequantize(self) -> Tensor:
        codes = self.codes().to(torch.float64)
        rotated = codes.mul_(2 / (2**self.bits - 1)).sub_(1).mul_(self.scale)
        weight = self.row_transform.undo(self.column_transform.undo(rotated).T.contiguous()).T
        if self.column_scales is not None:
            weight = weight / self.column_scales
        if self.rows is not None:
            weight = weight.index_select(0, self.rows)
        return weight.to(torch.float32).contiguous()
