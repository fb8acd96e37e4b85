"""The identity: a weight stored as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor


@register_format
class PlainWeight(PackedWeight):
    """A weight of shape (m, n) in the floating-point type it is stored in."""

    format: ClassVar[str] = "plain"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @classmethod
    def lossless(cls, weight: Tensor) -> Self:
        """Store a float32 weight in the narrowest type that holds every value exactly.

        A checkpoint in bfloat16 or float16 that was upcast for computing gets its own type back.
        """
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.to(dtype)
            if torch.equal(narrow.to(weight.dtype), weight):
                return cls(narrow)
        return cls(weight)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def metadata(self) -> dict[str, Any]:
        return {"format": self.format, "shape": list(self.shape)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        rows, columns = metadata["shape"]
        return cls(stored_tensor(tensors, "weight", (rows, columns)))

    def take_rows(self, index: Tensor) -> Self:
        return type(self)(self.weight.index_select(0, index))

    def dequantize(self) -> Tensor:
        return self.weight.to(torch.float32)
