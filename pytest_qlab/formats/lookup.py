"""Packed codes that are looked up in a table of each row.

In bits per weight it takes `bits + 16 * 2**bits / n`, rows padded to whole bytes. Where a row has
fewer than 2**bits columns, its table has only as many entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor, stored_width
from pytest_qlab.formats.bits import pack, packed_width, unpack

SMALLEST_FLOAT16_ENTRY = 2.0**-14


def table_length(columns: int, bits: int) -> int:
    """Entries in the table of a row."""
    return min(1 << bits, columns)


def table_storage_dtype(tables: Tensor) -> torch.dtype:
    """The type in which tables (m, entries) are stored: float16 unless they do not survive it.

    They do not where an entry overflows, or where a row that is not all 0 lies below 2**-14 as a
    whole, from where on float16 loses significant bits.
    """
    largest = tables.abs().amax(1)
    tiny = (largest > 0) & (largest < SMALLEST_FLOAT16_ENTRY)
    fits = not bool(tiny.any()) and float(largest.max()) <= torch.finfo(torch.float16).max
    return torch.float16 if fits else torch.float32


@register_format
class RowLookup(PackedWeight):
    """`table[row, code]`.

    Args:
        codes: uint8 (m, packed_width(n, bits)), packed.
        tables: float16 or float32 (m, table_length(n, bits)).
        shape: (m, n).
        bits: width of a code.
    """

    format: ClassVar[str] = "row-lookup"

    def __init__(self, codes: Tensor, tables: Tensor, *, shape: tuple[int, int], bits: int) -> None:
        self._codes = codes
        self.tables = tables
        self._shape = shape
        self.bits = bits

    @classmethod
    def pack(cls, codes: Tensor, tables: Tensor, *, bits: int) -> Self:
        """Pack codes (m, n); the tables are stored in the type they have.

        Raises:
            ValueError: a code has no entry, or the tables are neither float16 nor float32.
        """
        if tables.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"tables are stored as float16 or float32, not as {tables.dtype}")
        rows, columns = codes.shape
        if int(codes.max()) >= tables.shape[1]:
            raise ValueError(
                f"the code {int(codes.max())} has no entry in a table of {tables.shape[1]}"
            )
        return cls(pack(codes, bits), tables.contiguous(), shape=(rows, columns), bits=bits)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def codes(self) -> Tensor:
        """uint8 (m, n)."""
        return unpack(self._codes, self.bits, self._shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self._codes, "tables": self.tables}

    def metadata(self) -> dict[str, Any]:
        return {"format": self.format, "shape": list(self._shape), "bits": self.bits}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        bits = stored_width(metadata["bits"])
        rows, columns = metadata["shape"]
        length = table_length(columns, bits)
        found = cls(
            stored_tensor(tensors, "codes", (rows, packed_width(columns, bits))),
            stored_tensor(tensors, "tables", (rows, length)),
            shape=(rows, columns),
            bits=bits,
        )
        if length < 2**bits and int(found.codes().max()) >= length:
            raise CorruptEntryError(
                f"A code of a packed weight has no entry in its table of {length}. The stored "
                "artefact is damaged: delete it and run again."
            )
        return found

    def take_rows(self, index: Tensor) -> Self:
        return type(self)(
            self._codes.index_select(0, index),
            self.tables.index_select(0, index),
            shape=(len(index), self._shape[1]),
            bits=self.bits,
        )

    def dequantize(self) -> Tensor:
        return self.tables.to(torch.float32).gather(1, self.codes().to(torch.int64))
