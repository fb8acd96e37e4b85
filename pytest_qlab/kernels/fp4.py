"""E2M1 weights and inputs in blocks: multiplied as they are by `torch.nn.functional.scaled_mm`.

On CUDA only, from compute capability 10.0 on. NVFP4 is cuBLAS's; for MXFP4 torch has a kernel on
some processors only, and says so. Inputs are rounded by the same rule, to the same codes, as where
the layer is simulated; nothing but the rounding of outputs to bfloat16 is added.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.formats.activations import ActivationQuantizer, PerBlockMxfp4, PerBlockNvfp4
from pytest_qlab.formats.bits import unpack
from pytest_qlab.formats.e2m1 import (
    BITS,
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    e2m1_values,
    e8m0_values,
)
from pytest_qlab.formats.float4 import MicroscaledFloat4
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import KernelLinear, capability_refusal

IN_MULTIPLE, OUT_MULTIPLE = 32, 16
"""Of inputs and outputs: rows of 16 bytes, and what the operator asks of the second matrix."""
CAPABILITY = (10, 0)
"""Of the first NVIDIA processors that multiply E2M1 numbers: Blackwell."""
TILE_ROWS, TILE_BLOCKS, TILE_PARTS = 128, 4, 4
_ORDER = (0, 3, 2, 1, 4)


def tiled(scales: Tensor) -> Tensor:
    """Scales of blocks (m, G) in the order in which the processor reads them, of one byte each.

    Tiles of 128 rows by 4 blocks, row by row of tiles, filled up with zeros. In its tile, the scale
    of block b of row r is at r % 32 * 16 + r // 32 * 4 + b (cuBLAS, "1D Block Scaling Factors
    Layout"; torch's SWIZZLE_32_4_4).
    """
    rows, blocks = scales.shape
    padded = pad(scales.view(torch.uint8), (0, -blocks % TILE_BLOCKS, 0, -rows % TILE_ROWS))
    return padded.reshape(_parts(rows, blocks)).permute(_ORDER).flatten().view(scales.dtype)


def untiled(tiles: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of `tiled`: (rows, blocks)."""
    down, part, within, across, block = _parts(rows, blocks)
    parts = tiles.view(torch.uint8).view(down, across, within, part, block)
    padded = parts.permute(_ORDER).reshape(down * TILE_ROWS, across * TILE_BLOCKS)
    return padded[:rows, :blocks].contiguous().view(tiles.dtype)


def _parts(rows: int, blocks: int) -> tuple[int, int, int, int, int]:
    """Tiles down, parts of a tile, rows of a part; tiles across, blocks of a tile."""
    down, across = -(-rows // TILE_ROWS), -(-blocks // TILE_BLOCKS)
    return down, TILE_PARTS, TILE_ROWS // TILE_PARTS, across, TILE_BLOCKS


def pairs(codes: Tensor) -> Tensor:
    """Codes (k, n) two to a byte, the first in the low half; as `pack`, which makes a GPU wait."""
    return codes[:, ::2] | codes[:, 1::2] << BITS


def multiply_mxfp4(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """The kernel: E2M1 pairs (k, n / 2) and (m, n / 2), tiles of biased exponents; all uint8.

    Returns:
        bfloat16 (k, m).
    """
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    return scaled_mm(
        codes.view(torch.float4_e2m1fn_x2),
        weight.view(torch.float4_e2m1fn_x2).t(),
        scales.view(torch.float8_e8m0fnu),
        ScalingType.BlockWise1x32,
        weight_scales.view(torch.float8_e8m0fnu),
        ScalingType.BlockWise1x32,
        SwizzleType.SWIZZLE_32_4_4,
        SwizzleType.SWIZZLE_32_4_4,
        output_dtype=torch.bfloat16,
    )


def multiply_nvfp4(
    codes: Tensor,
    scales: tuple[Tensor, Tensor],
    weight: Tensor,
    weight_scales: tuple[Tensor, Tensor],
) -> Tensor:
    """The kernel: E2M1 pairs (k, n / 2) and (m, n / 2), uint8.

    Args:
        scales, weight_scales: tiles of E4M3 scales, and the float32 scale (1,) above them.

    Returns:
        bfloat16 (k, m).
    """
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    order = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    return scaled_mm(
        codes.view(torch.float4_e2m1fn_x2),
        weight.view(torch.float4_e2m1fn_x2).t(),
        list(scales),
        recipe,
        list(weight_scales),
        recipe,
        order,
        order,
        output_dtype=torch.bfloat16,
    )


class Float4CudaLinear(KernelLinear):
    """`scaled_mm` on the packed codes themselves: what MXFP4 and NVFP4 share."""

    block_size: ClassVar[int]
    rounds: ClassVar[type[ActivationQuantizer]]

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = source.packed
        assert isinstance(weight, MicroscaledFloat4)
        self.codes: Tensor
        self.register_buffer("codes", weight.tensors()["codes"])
        self.scales: Tensor
        self.register_buffer("scales", tiled(weight.scales))

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        return (
            source.metadata["format"] == MicroscaledFloat4.format
            and source.metadata["block_size"] == cls.block_size
            and isinstance(source.activation, cls.rounds)
            and source.device.type == "cuda"
            and hasattr(torch.nn.functional, "scaled_mm")  # not in every torch that is supported
        )

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        if source.in_features % IN_MULTIPLE or source.out_features % OUT_MULTIPLE:
            return (
                f"{cls.kernel} takes multiples of {IN_MULTIPLE} inputs and {OUT_MULTIPLE} outputs "
                "only"
            )
        return capability_refusal(cls.kernel, source.device, CAPABILITY)

    def paths(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (self.multiply,)

    def dequantized(self) -> Tensor:
        scales = untiled(self.scales, self.out_features, self.in_features // self.block_size)
        each = self.block_scales(scales).repeat_interleave(self.block_size, 1)
        return e2m1_values(unpack(self.codes, BITS, self.in_features)).mul_(each)

    @abstractmethod
    def block_scales(self, scales: Tensor) -> Tensor:
        """What the weight's elements are multiplied by, from stored scales: float32 (m, G)."""


class Mxfp4CudaLinear(Float4CudaLinear):
    """Blocks of 32 under powers of two."""

    kernel: ClassVar[str] = "scaled_mm-mxfp4-cuda"
    block_size: ClassVar[int] = MXFP4_BLOCK
    rounds: ClassVar[type[ActivationQuantizer]] = PerBlockMxfp4

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        assert isinstance(source.activation, PerBlockMxfp4)
        self.activation = source.activation

    def multiply(self, rows: Tensor) -> Tensor:
        codes, exponents = self.activation.codes(rows)
        return multiply_mxfp4(pairs(codes), tiled(exponents), self.codes, self.scales)

    def block_scales(self, scales: Tensor) -> Tensor:
        return e8m0_values(scales)


class Nvfp4CudaLinear(Float4CudaLinear):
    """Blocks of 16 under E4M3 scales, below scales of the weight and of inputs.

    The operator takes one scale of all inputs; those of tokens are multiplied by afterwards.
    """

    kernel: ClassVar[str] = "scaled_mm-nvfp4-cuda"
    block_size: ClassVar[int] = NVFP4_BLOCK
    rounds: ClassVar[type[ActivationQuantizer]] = PerBlockNvfp4

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = source.packed
        assert isinstance(weight, MicroscaledFloat4)
        assert isinstance(source.activation, PerBlockNvfp4)
        self.activation = source.activation
        self.tensor_scale: Tensor
        self.register_buffer("tensor_scale", weight.tensor_scale)

    def multiply(self, rows: Tensor) -> Tensor:
        codes, scales, above = self.activation.codes(rows)
        own = self.activation.tensor_scale is None
        product = multiply_nvfp4(
            pairs(codes),
            (tiled(scales), torch.ones_like(self.tensor_scale) if own else above),
            self.codes,
            (self.scales, self.tensor_scale),
        )
        return product * above if own else product

    def block_scales(self, scales: Tensor) -> Tensor:
        return scales.to(torch.float32) * self.tensor_scale
