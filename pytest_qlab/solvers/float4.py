"""Scales and codes of 4-bit floating-point blocks: OCP's MXFP4 and NVIDIA's NVFP4.

MXFP4: OCP Microscaling Formats, version 1.0, section 6.3, whose rule for the shared exponent is
`floor`; `ceil` is the rule that never saturates, `even` lies between them and is that of torchao's
`EVEN` and of compressed-tensors. NVFP4: block scales in E4M3 below a scale of the tensor (NVIDIA,
arXiv 2509.25149). Four over six: Cook et al., arXiv 2512.02010.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pytest_qlab.formats.affine import group_length
from pytest_qlab.formats.float4 import (
    E8M0_BIAS,
    LARGEST,
    LARGEST_E8M0,
    MicroscaledFloat4,
    e2m1_values,
    e8m0_values,
)
from pytest_qlab.solvers.grid import grouped

ScaleRule = Literal["floor", "ceil", "even"]
MXFP4_BLOCK = 32
NVFP4_BLOCK = 16
LARGEST_E4M3 = 448.0
SMALLEST_E4M3 = 2.0**-9
SIX_OVER_FOUR = 1.5
LARGEST_SCALE_OF_SIX = 256.0
"""The largest block scale with four over six: 1.5 times as much is still in E4M3."""


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes of the E2M1 numbers nearest to `values`, uint8; ties go to the even code.

    Beyond 6 they saturate. The sign is kept where a value is rounded to zero, as by a conversion.
    """
    size = values.abs().clamp_(max=LARGEST)
    # Spacing is 0.5 below 2, 1 below 4, then 2; `round` takes ties to even, which is the even code.
    steps = torch.where(size < 2, (2 * size).round(), size.round() + 2)
    steps = torch.where(size < 4, steps, (size / 2).round() + 4)
    return steps.to(torch.uint8) | values.signbit().to(torch.uint8) << 3


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
        fraction, exponent = torch.frexp(largest)  # the fraction is in [0.5, 1)
        exponent = exponent - 3
        if self.scale == "ceil":
            exponent = exponent + (fraction > LARGEST / 8).to(exponent.dtype)
        elif self.scale == "even":
            # From 7 times the scale on: 8 is as near as 6, and then the even one.
            exponent = exponent + (fraction >= 7 / 8).to(exponent.dtype)
        exponent = exponent.masked_fill(largest == 0, -E8M0_BIAS)
        stored = (exponent + E8M0_BIAS).clamp(0, LARGEST_E8M0).to(torch.uint8)
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
        tiny = torch.finfo(torch.float32).tiny
        # Not subnormal, where little of it would be left.
        tensor_scale = (largest.amax() / (top * LARGEST)).clamp(min=tiny).to(torch.float32)
        wanted = largest / LARGEST / tensor_scale
        stored = _to_e4m3(wanted)
        if self.four_over_six:
            wider = _to_e4m3(wanted * SIX_OVER_FOUR)
            better = _errors(groups, wider, tensor_scale) < _errors(groups, stored, tensor_scale)
            stored = torch.where(better, wider, stored)
        return Float4Points(
            stored.to(torch.float8_e4m3fn),
            tensor_scale.reshape(1),
            stored * tensor_scale,
            group_length(weight.shape[1], NVFP4_BLOCK),
            NVFP4_BLOCK,
        )


def _to_e4m3(scales: Tensor) -> Tensor:
    """Rounded to E4M3, ties to even; never to 0, which would lose the block. float32."""
    held = scales.to(torch.float32).clamp(SMALLEST_E4M3, LARGEST_E4M3)
    return held.to(torch.float8_e4m3fn).to(torch.float32)


def _errors(groups: Tensor, stored: Tensor, tensor_scale: Tensor) -> Tensor:
    """Sum of squared errors of each block (m, G), in units of the tensor's scale."""
    scale = stored.unsqueeze(-1)
    relative = groups / tensor_scale
    return (e2m1_values(e2m1_codes(relative / scale)) * scale - relative).square().sum(-1)
