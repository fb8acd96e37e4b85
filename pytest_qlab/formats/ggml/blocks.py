"""A weight matrix in the blocks of a GGUF file, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.base import PackedWeight, register_format, stored_tensor
from pytest_qlab.formats.ggml.dequantize import dequantize_blocks
from pytest_qlab.formats.ggml.types import GGML_TYPES, find_type, row_bytes


@register_format
class GgmlBlocks(PackedWeight):
    """Rows of blocks of one quantized GGML type.

    Args:
        type: a name in `GGML_TYPES`, in capitals or not.
        data: uint8 (m, row_bytes(type, n)), as in the file.
        shape: (m, n).

    Raises:
        SpecError: there is no type of that name.
        ValueError: the type is not a quantized one, n is not a multiple of its block size, or
            `data` has another shape or dtype.
    """

    format: ClassVar[str] = "ggml"

    def __init__(self, type: str, data: Tensor, shape: tuple[int, int]) -> None:
        self.type = find_type(type).name
        if self.type not in GGML_TYPES:
            raise ValueError(f"{self.type} is not a quantized type, so it has no blocks")
        expected = (shape[0], row_bytes(self.type, shape[1]))
        if data.dtype != torch.uint8 or tuple(data.shape) != expected:
            raise ValueError(
                f"a weight {shape} in {self.type} is uint8 {expected}, not {data.dtype} "
                f"{tuple(data.shape)}"
            )
        self.data = data
        self._shape = shape

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": self.data}

    def metadata(self) -> dict[str, Any]:
        return {"format": self.format, "type": self.type, "shape": list(self._shape)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        rows, columns = metadata["shape"]
        found = GGML_TYPES.get(metadata["type"])
        if found is None or columns % found.block_size:
            raise CorruptEntryError(
                f"A packed weight claims {columns} columns of the GGML type {metadata['type']!r}; "
                f"expected one of {', '.join(GGML_TYPES)}, and whole blocks. The stored artefact "
                "is damaged: delete it and run again."
            )
        data = stored_tensor(tensors, "blocks", (rows, row_bytes(found, columns)))
        if data.dtype != torch.uint8:
            raise CorruptEntryError(
                f"The tensor 'blocks' of a packed weight is {data.dtype}; expected bytes, "
                "torch.uint8. The stored artefact is damaged: delete it and run again."
            )
        return cls(found.name, data, (rows, columns))

    def dequantize(self) -> Tensor:
        blocks = self.data.reshape(-1, GGML_TYPES[self.type].block_bytes)
        return dequantize_blocks(self.type, blocks).view(self._shape)

    def take_rows(self, index: Tensor) -> Self:
        return type(self)(self.type, self.data.index_select(0, index), (len(index), self._shape[1]))
