"""What every format of packed weights can do: be dequantized, counted, saved and loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from pytest_qlab.errors import CorruptEntryError
from pytest_qlab.formats.bits import WIDTHS


class PackedWeight(ABC):
    """The bits of one weight matrix of m = out_features rows and n = in_features columns."""

    format: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """What is needed beside the tensors, in plain JSON types; `format` names the class."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """The inverse of `tensors` and `metadata`.

        Raises:
            CorruptEntryError: they do not fit together.
        """

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight that the bits stand for: float32 of shape (m, n)."""

    @abstractmethod
    def take_rows(self, index: Tensor) -> Self:
        """The same bits of some rows only, int64 (k,), in that order and with repetitions."""

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: codes, scales, zeros, indices, padding."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight."""
        rows, columns = self.shape
        return 8 * self.nbytes / (rows * columns)


P = TypeVar("P", bound=PackedWeight)
_formats: dict[str, type[PackedWeight]] = {}


def register_format(cls: type[P]) -> type[P]:
    """Make `load_packed` know a format; usable as a class decorator."""
    _formats[cls.format] = cls
    return cls


def load_packed(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Restore a packed weight of any registered format.

    Raises:
        CorruptEntryError: the format is unknown, or the tensors do not fit the metadata.
    """
    name = metadata.get("format")
    if name not in _formats:
        raise CorruptEntryError(
            f"A packed weight has the unknown format {name!r}; known are "
            f"{', '.join(sorted(_formats))}. It was written by another version or by a plugin that "
            "is not installed: delete the stored artefact, or install what wrote it."
        )
    return _formats[str(name)].from_tensors(tensors, metadata)


def stored_width(bits: Any) -> int:
    """The width of stored codes, which must be one that can be packed.

    Raises:
        CorruptEntryError: it is not.
    """
    if bits not in WIDTHS:
        raise CorruptEntryError(
            f"A packed weight claims codes of {bits!r} bits; expected one of {WIDTHS}. The stored "
            "artefact is damaged: delete it and run again."
        )
    width: int = bits
    return width


def stored_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name, which must have that shape.

    Raises:
        CorruptEntryError: it is missing or has another shape.
    """
    tensor = tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
        raise CorruptEntryError(
            f"The tensor {name!r} of a packed weight {found}; expected the shape {shape}. The "
            "stored artefact is damaged: delete it and run again."
        )
    return tensor
