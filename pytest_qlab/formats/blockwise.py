"""Codes into a table of 16 numbers, in blocks of the flattened matrix: bitsandbytes' NF4 and FP4.

The matrix is read row by row as one sequence, which is cut into blocks; where the block size does
not divide a row, blocks go on in the next. A code stands for `table[code] * absmax` of its block.
Two codes share a byte, the first in its high half. The bytes are those of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor

TABLES: dict[str, tuple[float, ...]] = {
    # Dettmers et al., QLoRA (arXiv 2305.14314), appendix E.
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # bitsandbytes: a sign, 2 bits of exponent, 1 of mantissa; divided by the largest, 12.
    "fp4": (
        *(0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12),
        *(-0.0, -0.0625 / 12, -8 / 12, -12 / 12, -4 / 12, -6 / 12, -2 / 12, -3 / 12),
    ),
}
ABSMAX_BLOCK = 256
"""Values of absmax that share a scale where they are quantized, too."""


def dynamic_map(device: torch.device) -> Tensor:
    """What the 8-bit codes of absmax stand for: float32 (256,), rising from -0.993 to 1.

    The signed dynamic map of Dettmers, 8-bit Approximations for Parallelism (arXiv 1511.04561): for
    each of 7 exponents, twice as many fractions as for the one below, evenly between 0.1 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (exponent - 6) * middles).tolist()
        values += (-(10 ** (exponent - 6)) * middles).tolist()
    return torch.tensor(sorted(values), device=device)


class QuantizedAbsmax(NamedTuple):
    """8-bit absmax: `dynamic_map[code] * scale + offset`.

    Attributes:
        codes: uint8 (B,).
        scales: float32 (ceil(B / 256),).
        offset: float32 (1,).
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor

    def values(self) -> Tensor:
        """float32 (B,)."""
        each = self.scales.repeat_interleave(ABSMAX_BLOCK)[: len(self.codes)]
        return dynamic_map(each.device)[self.codes.to(torch.int64)] * each + self.offset


def block_count(count: int, block_size: int) -> int:
    """Blocks of `count` weights; the last one may be shorter."""
    return -(-count // block_size)


@register_format
class BlockwiseTable(PackedWeight):
    """`table[code] * absmax` with one absmax for each block of the flattened matrix.

    Args:
        codes: uint8 (ceil(m n / 2),), two in a byte.
        absmax: float32 (B,), or quantized.
        table: a name in `TABLES`.
        shape: (m, n).
        block_size: weights that share an absmax.
        row_offsets: int32 (m,), for rows that were taken out of a matrix whose blocks go across
            rows: how many weights of its first block come before each row. Every row then has
            `row_blocks` blocks of its own; None for a matrix that is cut as a whole.
    """

    format: ClassVar[str] = "blockwise-table"

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor | QuantizedAbsmax,
        *,
        table: str,
        shape: tuple[int, int],
        block_size: int,
        row_offsets: Tensor | None = None,
    ) -> None:
        self._shape = shape
        self._codes = codes
        self._absmax = absmax
        self.table = table
        self.block_size = block_size
        self.row_offsets = row_offsets

    @classmethod
    def pack(
        cls, codes: Tensor, absmax: Tensor | QuantizedAbsmax, *, table: str, block_size: int
    ) -> Self:
        """Pack codes (m, n), uint8 0 .. 15, row by row.

        Raises:
            ValueError: the table is unknown, a code does not fit, or an absmax is not float32.
        """
        if table not in TABLES:
            raise ValueError(f"there is no table {table!r}; expected one of {', '.join(TABLES)}")
        if isinstance(absmax, Tensor) and absmax.dtype != torch.float32:
            raise ValueError(f"absmax is stored as float32, not as {absmax.dtype}")
        rows, columns = codes.shape
        return cls(
            _pack_halves(codes, TABLES[table].index(0.0)),
            absmax,
            table=table,
            shape=(rows, columns),
            block_size=block_size,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def packed_codes(self) -> Tensor:
        """uint8 (ceil(m n / 2),), two codes in a byte."""
        return self._codes

    def codes(self) -> Tensor:
        """uint8 (m, n)."""
        return _unpack_halves(self._codes)[: self._shape[0] * self._shape[1]].view(self._shape)

    def absmax(self) -> Tensor:
        """What tables are multiplied by: float32 (B,), or (m * row_blocks,) of single rows."""
        if isinstance(self._absmax, QuantizedAbsmax):
            return self._absmax.values()
        return self._absmax

    @property
    def row_blocks(self) -> int:
        """The most blocks that a row can be in."""
        return _row_blocks(self._shape[1], self.block_size)

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": self._codes}
        if isinstance(self._absmax, QuantizedAbsmax):
            stored["absmax_codes"] = self._absmax.codes
            stored["absmax_scales"] = self._absmax.scales
            stored["absmax_offset"] = self._absmax.offset
        else:
            stored["absmax"] = self._absmax
        if self.row_offsets is not None:
            stored["row_offsets"] = self.row_offsets
        return stored

    def metadata(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "table": self.table,
            "shape": list(self._shape),
            "bits": 4,
            "block_size": self.block_size,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        rows, columns = metadata["shape"]
        block_size, table = int(metadata["block_size"]), str(metadata["table"])
        if table not in TABLES:
            raise CorruptEntryError(
                f"A packed weight has the unknown table {table!r}; expected one of "
                f"{', '.join(TABLES)}. The stored artefact is damaged: delete it and run again."
            )
        row_offsets = None
        blocks = block_count(rows * columns, block_size)
        if "row_offsets" in tensors:
            row_offsets = stored_tensor(tensors, "row_offsets", (rows,))
            blocks = rows * _row_blocks(columns, block_size)
            if rows and not 0 <= int(row_offsets.min()) <= int(row_offsets.max()) < block_size:
                raise CorruptEntryError(
                    "A row of a packed weight begins outside of its first block. The stored "
                    "artefact is damaged: delete it and run again."
                )
        absmax: Tensor | QuantizedAbsmax
        if "absmax_codes" in tensors:
            absmax = QuantizedAbsmax(
                stored_tensor(tensors, "absmax_codes", (blocks,)),
                stored_tensor(tensors, "absmax_scales", (block_count(blocks, ABSMAX_BLOCK),)),
                stored_tensor(tensors, "absmax_offset", (1,)),
            )
        else:
            absmax = stored_tensor(tensors, "absmax", (blocks,))
        return cls(
            stored_tensor(tensors, "codes", (-(-rows * columns // 2),)),
            absmax,
            table=table,
            shape=(rows, columns),
            block_size=block_size,
            row_offsets=row_offsets,
        )

    def take_rows(self, index: Tensor) -> Self:
        """The same codes and absmax; quantized absmax become the float32 that they stand for.

        The blocks that a row is in are not cut where the rows around it are others, so that each
        row brings its own.
        """
        columns = self._shape[1]
        aligned = self.row_offsets is None and columns % self.block_size == 0
        first, offsets = (each.index_select(0, index) for each in self._row_starts())
        count = columns // self.block_size if aligned else self.row_blocks
        absmax = self.absmax()
        # A row that begins with a block may be in fewer than others: what is beyond is not read.
        blocks = first.unsqueeze(1) + torch.arange(count, device=first.device)
        return type(self)(
            _pack_halves(self.codes().index_select(0, index), TABLES[self.table].index(0.0)),
            absmax[blocks.clamp(max=len(absmax) - 1)].reshape(-1),
            table=self.table,
            shape=(len(index), columns),
            block_size=self.block_size,
            row_offsets=None if aligned else offsets.to(torch.int32),
        )

    def _row_starts(self) -> tuple[Tensor, Tensor]:
        """Each row's first block, and where it begins within it: int64 (m,) each."""
        rows = torch.arange(self._shape[0], device=self._codes.device)
        if self.row_offsets is not None:
            return rows * self.row_blocks, self.row_offsets.to(torch.int64)
        starts = rows * self._shape[1]
        return starts // self.block_size, starts % self.block_size

    def dequantize(self) -> Tensor:
        table = torch.tensor(TABLES[self.table], device=self._codes.device)
        rows, columns = self._shape
        absmax = self.absmax()
        codes = self.codes()
        if self.row_offsets is None:
            flat = pad(codes.reshape(-1), (0, -codes.numel() % self.block_size)).to(torch.int64)
            values = table[flat].view(-1, self.block_size).mul_(absmax.unsqueeze(1))
            return values.view(-1)[: codes.numel()].view(rows, columns)
        first, offsets = self._row_starts()
        column = torch.arange(columns, device=codes.device)
        blocks = first.unsqueeze(1) + (offsets.unsqueeze(1) + column) // self.block_size
        return table[codes.to(torch.int64)].mul_(absmax[blocks])


def _row_blocks(columns: int, block_size: int) -> int:
    """The most blocks that `columns` neighbours can be in: all but one weight of the first one
    may be before them."""
    return (columns + 2 * block_size - 2) // block_size


def _pack_halves(codes: Tensor, filling: int) -> Tensor:
    """Codes in any shape, flattened: uint8 (ceil(count / 2),), the first of two in the high half.

    An odd number is filled up with the code of zero, as in bitsandbytes.
    """
    flat = codes.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 16:
        raise ValueError("a code outside of 0 .. 15 cannot be packed into 4 bits")
    pairs = pad(flat.to(torch.uint8), (0, flat.numel() % 2), value=filling).view(-1, 2)
    packed: Tensor = pairs[:, 0] << 4 | pairs[:, 1]
    return packed


def _unpack_halves(packed: Tensor) -> Tensor:
    """uint8 (2 * bytes,)."""
    return torch.stack([packed >> 4, packed & 15], -1).view(-1)
