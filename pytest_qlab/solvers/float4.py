"""Scales and codes of 4-bit floating-point blocks: OCP's MXFP4 and NVIDIA's NVFP4.

MXFP4: OCP Microscaling Formats, version 1.0, section 6.3, whose rule for the shared exponent is
`floor`; `ceil` is the rule that never saturates, `even` lies between them and is that of torchao's
`EVEN` and of compressed-tensors. NVFP4: block scales in E4M3 below a scale of the tensor (NVIDIA,
arXiv 2509.25149). Four over six: Cook et al., arXiv 2512.02010.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats.affine import group_length
from pytest_qlab.formats.e2m1 import (
    LARGEST,
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    ScaleRule,
    e2m1_codes,
    e2m1_values,
    e4m3_scales,
    e8m0_scales,
    e8m0_values,
    scale_above,
)
from pytest_qlab.formats.float4 import MicroscaledFloat4
from pytest_qlab.formats.float8 import LARGEST as LARGEST_E4M3
from pytest_qlab.solvers.grid import grouped

SIX_OVER_FOUR = 1.5
LARGEST_SCALE_OF_SIX = 256.0
"""The largest block scale with four over six: 1.5 times as much is still in E4M3."""


@dataclass(frozen=True)
class Float4Points:
    """The points of a matrix (m, n) whose block scales are settled.

    Args:
        scales: as they are stored, (m, G); see `MicroscaledFloat4`.
        tensor_scale: float32 (1,), or None for E8M0.
        block_scales: what elements are multiplied by, float32 (m, G).
        length: columns of a full block.
        block_size: as asked for; more than `length` where a row is shorter.
    """

    scales: Tensor
    tensor_scale: Tensor | None
    block_scales: Tensor
    length: int
    block_size: int

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes uint8 (m, k); see `Points.nearest`."""
        return e2m1_codes(values / self._of(columns))

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """See `Points.decode`."""
        return e2m1_values(codes) * self._of(columns)

    def pack(self, codes: Tensor) -> MicroscaledFloat4:
        """See `Points.pack`."""
        return MicroscaledFloat4.pack(
            codes, self.scales, self.tensor_scale, block_size=self.block_size
        )

    def _of(self, columns: Tensor) -> Tensor:
        return self.block_scales.index_select(1, columns // self.length)


@dataclass(frozen=True)
class Mxfp4:
    """Blocks of 32 columns under a power of two.

    Args:
        scale: `floor`: the exponent of the block's largest weight less that of the largest element,
            so that weights beyond 6 times the scale saturate; `ceil`: the least power of two with
            which none does; `even`: the one with which the largest weight, rounded to two bits,
            does not.
    """

    scale: ScaleRule = "floor"

    def fit(self, weight: Tensor) -> Float4Points:
        """See `Codebook.fit`."""
        largest = grouped(weight, MXFP4_BLOCK).abs().amax(-1)
        stored = e8m0_scales(largest, self.scale)
        length = group_length(weight.shape[1], MXFP4_BLOCK)
        return Float4Points(stored, None, e8m0_values(stored), length, MXFP4_BLOCK)


@dataclass(frozen=True)
class Nvfp4:
    """Blocks of 16 columns under a scale in E4M3, below one scale of the whole tensor.

    A block's largest weight becomes 6, or the nearest to it that E4M3 allows.

    Args:
        four_over_six: let it become 4 in blocks where the sum of squared errors is less so. The
            tensor's scale then leaves room: the largest block scale is 256 instead of 448.
    """

    four_over_six: bool = False

    def fit(self, weight: Tensor) -> Float4Points:
        """See `Codebook.fit`."""
        groups = grouped(weight, NVFP4_BLOCK)
        largest = groups.abs().amax(-1)
        top = LARGEST_SCALE_OF_SIX if self.four_over_six else LARGEST_E4M3
        tensor_scale = scale_above(largest.amax(), top)
        wanted = largest / LARGEST / tensor_scale
        stored = e4m3_scales(wanted).to(torch.float32)
        if self.four_over_six:
            wider = e4m3_scales(wanted * SIX_OVER_FOUR).to(torch.float32)
            better = _errors(groups, wider, tensor_scale) < _errors(groups, stored, tensor_scale)
            stored = torch.where(better, wider, stored)
        return Float4Points(
            stored.to(torch.float8_e4m3fn),
            tensor_scale.reshape(1),
            stored * tensor_scale,
            group_length(weight.shape[1], NVFP4_BLOCK),
            NVFP4_BLOCK,
        )


def _errors(groups: Tensor, stored: Tensor, tensor_scale: Tensor) -> Tensor:
    """Sum of squared errors of each block (m, G), in units of the tensor's scale."""
    scale = stored.unsqueeze(-1)
    relative = groups / tensor_scale
    return (e2m1_values(e2m1_codes(relative / scale)) * scale - relative).square().sum(-1)
