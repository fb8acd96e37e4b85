"""NF4 and FP4 as bitsandbytes makes them: blocks normalized by their largest magnitude.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA (arXiv 2305.14314), section 3, and bitsandbytes,
whose bytes these are: `x * (1 / absmax)` in float32, then the nearest number of the table; halfway
between two, the lower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.formats.blockwise import (
    ABSMAX_BLOCK,
    TABLES,
    BlockwiseTable,
    QuantizedAbsmax,
    dynamic_map,
)

BLOCK_SIZE = 64
SMALLEST_ABSMAX = 1e-38
"""Blocks below it are zeros, as in bitsandbytes: the reciprocal is to be a number."""


class Table(NamedTuple):
    """A table of `TABLES` as it is searched.

    Attributes:
        numbers: float32 (16,), by code.
        order: uint8 (16,), codes by rising number.
        middles: float32 (15,), halfway between neighbours.
    """

    numbers: Tensor
    order: Tensor
    middles: Tensor

    @classmethod
    def named(cls, name: str, device: torch.device) -> Self:
        """The table of that name, on a device."""
        numbers = torch.tensor(TABLES[name], device=device)
        order = numbers.argsort(stable=True)
        rising = numbers[order]
        return cls(numbers, order.to(torch.uint8), (rising[:-1] + rising[1:]) / 2)

    def nearest(self, normalized: Tensor) -> Tensor:
        """Codes of the nearest numbers, uint8; the lower one of two as near."""
        return self.order[torch.bucketize(normalized.contiguous(), self.middles)]


@dataclass(frozen=True)
class BlockwisePoints:
    """The points of a matrix (m, n) whose blocks' absmax is settled.

    Args:
        name: of the table, in `TABLES`.
        table: the same as it is searched.
        stored: absmax of each block as it is stored.
        reciprocals: by which weights are normalized, float32 (B,).
        absmax: by which the table's numbers are multiplied, float32 (B,). With quantized absmax, it
            is not quite the reciprocal's: bitsandbytes chooses codes before absmax is quantized.
        shape: (m, n).
        block_size: weights that share an absmax.
    """

    name: str
    table: Table
    stored: Tensor | QuantizedAbsmax
    reciprocals: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    block_size: int

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes uint8 (m, k); see `Points.nearest`."""
        return self.table.nearest(values * self.reciprocals[self._blocks(columns)])

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """See `Points.decode`."""
        return self.table.numbers[codes.to(torch.int64)] * self.absmax[self._blocks(columns)]

    def pack(self, codes: Tensor) -> BlockwiseTable:
        """See `Points.pack`."""
        return BlockwiseTable.pack(codes, self.stored, table=self.name, block_size=self.block_size)

    def _blocks(self, columns: Tensor) -> Tensor:
        rows, width = self.shape
        starts = torch.arange(rows, device=columns.device).unsqueeze(1) * width
        return (starts + columns) // self.block_size


@dataclass(frozen=True)
class _Blockwise:
    """A codebook of the table's numbers times a block's absmax.

    Args:
        block_size: weights of the flattened matrix that share an absmax.
        double_quant: store absmax in 8 bits.
    """

    table: ClassVar[str]

    block_size: int = BLOCK_SIZE
    double_quant: bool = False

    def fit(self, weight: Tensor) -> BlockwisePoints:
        """See `Codebook.fit`."""
        flat = weight.to(torch.float32).reshape(-1)
        blocks = pad(flat, (0, -len(flat) % self.block_size)).view(-1, self.block_size)
        exact = blocks.abs().amax(-1)
        reciprocals = 1 / exact.clamp(min=SMALLEST_ABSMAX)
        stored: Tensor | QuantizedAbsmax = exact
        absmax = exact
        if self.double_quant:
            stored = quantize_absmax(exact)
            absmax = stored.values()
        rows, columns = weight.shape
        table = Table.named(self.table, weight.device)
        shape = (rows, columns)
        return BlockwisePoints(
            self.table, table, stored, reciprocals, absmax, shape, self.block_size
        )


class NormalFloat4(_Blockwise):
    """Quantiles of the normal distribution, with an exact zero: QLoRA's NF4."""

    table = "nf4"


class Float4(_Blockwise):
    """bitsandbytes' FP4: a sign, 2 bits of exponent, 1 of mantissa. It is not E2M1."""

    table = "fp4"


def quantize_absmax(absmax: Tensor) -> QuantizedAbsmax:
    """8-bit codes of absmax (B,) around their mean, in blocks of 256 with a scale each."""
    offset = absmax.mean()
    centred = absmax - offset
    blocks = pad(centred, (0, -len(centred) % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
    scales = blocks.abs().amax(-1)
    normalized = blocks / scales.clamp(min=SMALLEST_ABSMAX).unsqueeze(1)
    levels = dynamic_map(absmax.device)
    middles = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(normalized.view(-1)[: len(absmax)], middles)
    return QuantizedAbsmax(codes.to(torch.uint8), scales, offset.reshape(1))
