"""8-bit weights and 8-bit inputs: whole numbers are multiplied, and scaled in float32.

On a CPU by onednn's int8 linear, which takes a third to two thirds of `torch._int_mm`'s time (from
1 to 128 rows); on CUDA by `_int_mm`. Inputs are quantized by the same rule, to the same codes, as
where the layer is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pytest_qlab.formats.activations import PerTensorAffine, PerTokenSymmetric
from pytest_qlab.formats.affine import AffineGroups
from pytest_qlab.kernels.int8 import row_grid_refusal, signed_codes
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import KernelLinear, has_operator

FEWEST_CUDA_ROWS = 17


def multiply_onednn(
    codes: Tensor, scale: float, zero_point: int, prepacked: Tensor, scales: Tensor
) -> Tensor:
    """`scale * (codes - zero_point) @ (scales * weight)^T`, float32 (k, m), from uint8 codes.

    Of signed codes onednn makes the same, but on processors without an instruction for them (before
    AMX and AVX-VNNI-INT8) in a reference loop that takes hundreds of times as long.
    """
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes,
        scale,
        zero_point,
        prepacked,
        scales,
        zeros,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return product


def multiply_cuda(codes: Tensor, weight: Tensor) -> Tensor:
    """int8 (k, n) times int8 (m, n) transposed, int32 (k, m); a few rows are padded with zeros."""
    padded = pad(codes, (0, 0, 0, max(0, FEWEST_CUDA_ROWS - len(codes))))
    product: Tensor = torch._int_mm(padded, weight.t())
    return product[: len(codes)]


class W8A8Linear(KernelLinear):
    """What both devices share: the weights' scales, and how inputs become codes."""

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = source.packed
        assert isinstance(weight, AffineGroups)
        assert isinstance(source.activation, PerTokenSymmetric | PerTensorAffine)
        self.activation = source.activation
        self.scales: Tensor
        self.register_buffer("scales", weight.scales.flatten().to(torch.float32))

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        described, activation = source.metadata, source.activation
        return (
            described["format"] == AffineGroups.format
            and described["bits"] == 8
            and isinstance(activation, PerTokenSymmetric | PerTensorAffine)
            and activation.bits == 8
        )

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        weight = source.packed
        assert isinstance(weight, AffineGroups)
        return row_grid_refusal(weight, cls.kernel)

    def paths(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (self.multiply,)


class W8A8CpuLinear(W8A8Linear):
    """onednn's int8 linear; the weight is kept in its own layout alone."""

    kernel: ClassVar[str] = "onednn-int8"

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = source.packed
        assert isinstance(weight, AffineGroups)
        # In a list: its layout is opaque, and a module's buffers are looked into by many.
        self._prepacked: list[Tensor] = [
            torch.ops.onednn.qlinear_prepack(signed_codes(weight).contiguous(), None)
        ]
        self.opaque_bytes = torch.ops.mkldnn._nbytes(self._prepacked[0])

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        known = has_operator("onednn", "qlinear_prepack") and has_operator("mkldnn", "_nbytes")
        return super().applies(source) and source.device.type == "cpu" and known

    def multiply(self, rows: Tensor) -> Tensor:
        prepacked = self._prepacked[0]
        if isinstance(self.activation, PerTensorAffine):
            codes = self.activation.codes(rows)
            fixed = self.activation.scale, self.activation.zero_point
            return multiply_onednn(codes, *fixed, prepacked, self.scales)
        codes, scale = self.activation.codes(rows)
        shifted = codes.view(torch.uint8) ^ 128
        return multiply_onednn(shifted, 1.0, 128, prepacked, self.scales).mul_(scale)

    def dequantized(self) -> Tensor:
        codes = self._prepacked[0].to_dense().t().to(torch.float32)
        return codes.contiguous() * self.scales.unsqueeze(1)


class W8A8CudaLinear(W8A8Linear):
    """`torch._int_mm`; unsigned codes are shifted by 128, which sums of the weights take back."""

    kernel: ClassVar[str] = "int_mm-cuda"

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = source.packed
        assert isinstance(weight, AffineGroups)
        self.codes: Tensor
        self.register_buffer("codes", signed_codes(weight).contiguous())
        self.sums: Tensor
        self.register_buffer("sums", self.codes.sum(1, dtype=torch.int32))

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        return super().applies(source) and source.device.type == "cuda"

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        if source.in_features % 8 or source.out_features % 8:
            return f"{cls.kernel} takes multiples of 8 inputs and outputs only"
        return super().refusal(source)

    def multiply(self, rows: Tensor) -> Tensor:
        if isinstance(self.activation, PerTensorAffine):
            codes = (self.activation.codes(rows) ^ 128).view(torch.int8)
            product = multiply_cuda(codes, self.codes)
            product = product + (128 - self.activation.zero_point) * self.sums
            return product.to(torch.float32) * (self.scales * self.activation.scale)
        codes, scale = self.activation.codes(rows)
        return multiply_cuda(codes, self.codes).to(torch.float32) * self.scales * scale

    def dequantized(self) -> Tensor:
        return self.codes.to(torch.float32) * self.scales.unsqueeze(1)
