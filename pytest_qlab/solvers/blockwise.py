"""NF4 and FP4 as bitsandbytes makes them: blocks normalized by their largest magnitude.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA (arXiv 2305.14314), section 3, and bitsandbytes,
whose bytes these are: `x * (1 / absmax)` in float32, then the nearest number of the table; halfway
between two, the lower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True)
class BlockwisePoints:
    """The points of a matrix (m, n) whose blocks' absmax is settled.

    Args:
        table: a name in `TABLES`.
        stored: absmax of each block as it is stored.
        reciprocals: by which weights are normalized, float32 (B,).
        absmax: by which the table's numbers are multiplied, float32 (B,). With quantized absmax, it
            is not quite the reciprocal's: bitsandbytes chooses codes before absmax is quantized.
        shape: (m, n).
        block_size: weights that share an absmax.
    """

    table: str
    stored: Tensor | QuantizedAbsmax
    reciprocals: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    block_size: int

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes uint8 (m, k); see `Points.nearest`."""
        return table_codes(values * self.reciprocals[self._blocks(columns)], self.table)

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """See `Points.decode`."""
        table = torch.tensor(TABLES[self.table], device=codes.device)
        return table[codes.to(torch.int64)] * self.absmax[self._blocks(columns)]

    def pack(self, codes: Tensor) -> BlockwiseTable:
        """See `Points.pack`."""
        return BlockwiseTable.pack(codes, self.stored, table=self.table, block_size=self.block_size)

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
        return BlockwisePoints(
            self.table, stored, reciprocals, absmax, (rows, columns), self.block_size
        )


class NormalFloat4(_Blockwise):
    """Quantiles of the normal distribution, with an exact zero: QLoRA's NF4."""

    table = "nf4"


class Float4(_Blockwise):
    """bitsandbytes' FP4: a sign, 2 bits of exponent, 1 of mantissa. It is not E2M1."""

    table = "fp4"


def table_codes(normalized: Tensor, table: str) -> Tensor:
    """Codes of the table's numbers nearest to each value, uint8; the lower one of two as near."""
    values = torch.tensor(TABLES[table], device=normalized.device)
    order = values.argsort(stable=True)
    ordered = values[order]
    middles = (ordered[:-1] + ordered[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(normalized.contiguous(), middles)]


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
