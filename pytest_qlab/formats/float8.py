"""Numbers of 8 bits, E4M3, with a scale for each row.

E4M3 is the element of Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433),
section 3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, and one code of
each sign that is no number. In bits per weight it takes `8 + 32 / n`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor

BITS = 8
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
NO_NUMBER = 0x7F
"""The bits of the code that is no number, less its sign."""


def row_scales(values: Tensor) -> Tensor:
    """Scales with which the largest magnitude of each row becomes 448: float32 (..., 1).

    Never less than the smallest number of float32 that has all its bits, so that rows of zeros have
    one, too.
    """
    largest = values.to(torch.float32).abs().amax(-1, keepdim=True)
    return (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)


def to_e4m3(values: Tensor) -> Tensor:
    """The nearest numbers of E4M3, ties to even, as float8_e4m3fn; beyond 448 they saturate."""
    # Some versions of torch make what is beyond 448 NaN instead.
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


@register_format
class ScaledFloat8(PackedWeight):
    """`element * scale`.

    Args:
        codes: float8_e4m3fn (m, n).
        scales: float32 (m, 1).

    Raises:
        ValueError: they are of other types.
    """

    format: ClassVar[str] = "scaled-float8"

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        if (codes.dtype, scales.dtype) != (E4M3, torch.float32):
            raise ValueError(
                f"elements and scales are {codes.dtype} and {scales.dtype}; expected {E4M3} and "
                "torch.float32"
            )
        self.codes = codes
        self.scales = scales

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def metadata(self) -> dict[str, Any]:
        return {"format": self.format, "shape": list(self.shape), "bits": BITS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        rows, columns = metadata["shape"]
        codes = stored_tensor(tensors, "codes", (rows, columns))
        scales = stored_tensor(tensors, "scales", (rows, 1))
        try:
            packed = cls(codes, scales)
        except ValueError as error:
            raise CorruptEntryError(
                f"The tensors of a packed weight do not fit its format: {error}. The stored "
                "artefact is damaged: delete it and run again."
            ) from error
        sizes = codes.view(torch.uint8) & NO_NUMBER
        if bool((sizes == NO_NUMBER).any()) or not bool((scales.isfinite() & (scales > 0)).all()):
            raise CorruptEntryError(
                "An element of a packed weight is no number, or a scale is not a positive one. The "
                "stored artefact is damaged: delete it and run again."
            )
        return packed

    def take_rows(self, index: Tensor) -> Self:
        codes = self.codes.view(torch.uint8).index_select(0, index).view(E4M3)
        return type(self)(codes, self.scales.index_select(0, index))

    def dequantize(self) -> Tensor:
        return self.codes.to(torch.float32).mul_(self.scales)
