"""E4M3 weights and E4M3 inputs: multiplied as they are by `torch._scaled_mm`, scaled row by row.

On CUDA only, from compute capability 8.9 on. The operator is right on a CPU, too, but gains nothing
there: one row by 4096 x 4096 takes as long as dequantizing and multiplying, 60 times a product in
bfloat16. Inputs are rounded by the same rule, to the same codes, as where the layer is simulated;
nothing but the rounding of outputs to bfloat16 is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from pytest_qlab.formats.activations import PerTokenFloat8
from pytest_qlab.formats.float8 import ScaledFloat8
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import KernelLinear, capability_refusal, has_operator

MULTIPLE = 16
CAPABILITY = (8, 9)
"""Of the first NVIDIA processors that multiply E4M3 numbers: Ada."""


def multiply_scaled(codes: Tensor, scale: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """The kernel: E4M3 (k, n) and (m, n) with float32 scales (k, 1) and (m, 1); bfloat16 (k, m)."""
    product: Tensor = torch._scaled_mm(
        codes, weight.t(), scale_a=scale, scale_b=scales.t(), out_dtype=torch.bfloat16
    )
    return product


class Float8CudaLinear(KernelLinear):
    """`_scaled_mm` on the packed codes themselves."""

    kernel: ClassVar[str] = "scaled_mm-cuda"

    def __init__(self, source: PackedLinear) -> None:
        super().__init__(source)
        weight = source.packed
        assert isinstance(weight, ScaledFloat8)
        assert isinstance(source.activation, PerTokenFloat8)
        self.activation = source.activation
        self.codes: Tensor
        self.register_buffer("codes", weight.codes)
        self.scales: Tensor
        self.register_buffer("scales", weight.scales)

    @classmethod
    def applies(cls, source: PackedLinear) -> bool:
        return (
            source.metadata["format"] == ScaledFloat8.format
            and isinstance(source.activation, PerTokenFloat8)
            and source.device.type == "cuda"
            and has_operator("aten", "_scaled_mm")
        )

    @classmethod
    def refusal(cls, source: PackedLinear) -> str:
        if source.in_features % MULTIPLE or source.out_features % MULTIPLE:
            return f"{cls.kernel} takes multiples of {MULTIPLE} inputs and outputs only"
        return capability_refusal(cls.kernel, source.device, CAPABILITY)

    def paths(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (self.multiply,)

    def multiply(self, rows: Tensor) -> Tensor:
        codes, scale = self.activation.codes(rows)
        return multiply_scaled(codes, scale, self.codes, self.scales)

    def dequantized(self) -> Tensor:
        return self.codes.to(torch.float32) * self.scales
