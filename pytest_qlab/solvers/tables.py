"""The codebook of a lookup table for each row, fitted by exact weighted k-means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats.lookup import RowLookup, table_length, table_storage_dtype
from pytest_qlab.solvers.kmeans import kmeans_rows


class RowTablePoints:
    """What each weight of a matrix can become: the entries of its row's table.

    Args:
        tables: float16 or float32 (m, entries), rising.
        bits: width of a code.
    """

    def __init__(self, tables: Tensor, bits: int) -> None:
        self.tables = tables
        self.bits = bits
        wide = tables.to(torch.float64)
        self._between = ((wide[:, 1:] + wide[:, :-1]) / 2).contiguous()

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes (m, k) of the entries nearest to `values` (m, k), whatever the columns."""
        return torch.searchsorted(self._between, values.to(torch.float64).contiguous())

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """The entries that codes (m, k) stand for: float32 (m, k)."""
        return self.tables.to(torch.float32).gather(1, codes.to(torch.int64))

    def pack(self, codes: Tensor) -> RowLookup:
        """Lay out the codes (m, n)."""
        return RowLookup.pack(codes, self.tables, bits=self.bits)


@dataclass(frozen=True)
class RowTables:
    """Tables of 2**bits entries with the least weighted squared error of each row.

    The entries are rounded to the type they are stored in before codes are chosen.

    Args:
        bits: width of a code.
        importance: (m, n), at least 0, of each weight's squared error; all the same if None.
    """

    bits: int
    importance: Tensor | None = None

    def fit(self, weight: Tensor) -> RowTablePoints:
        """The points for a weight, float32 (m, n)."""
        importance = torch.ones_like(weight) if self.importance is None else self.importance
        tables = kmeans_rows(weight, importance, table_length(weight.shape[1], self.bits))
        return RowTablePoints(tables.to(table_storage_dtype(tables)), self.bits)
