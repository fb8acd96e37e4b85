"""Reading GGUF files, versions 2 and 3, without believing them.

Every count, length and offset is checked against the size of the file before it is used, so that a
damaged or hostile file gives an error that says where it is wrong. The `gguf` package's reader does
not: a small file that claims an array of 2**40 numbers keeps it looping while its memory grows, and
it accepts tensors that overlap and strings that are cut off. Source: `docs/gguf.md` of ggml, and
`gguf.cpp` of llama.cpp; as there, tensors must follow each other without gaps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytest_qlab.engines.gguf.stream import UINT32, GgufStream, Source, quoted
from pytest_qlab.errors import DataError
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.ggml import GGML_TYPES, PLAIN_TYPES, GgmlBlocks, GgmlType
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.store import file_digest

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNDECODED = (
    GgmlType("Q8_1", 9, 32, 36),
    GgmlType("Q8_K", 15, 256, 292),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("NVFP4", 40, 64, 36),
    GgmlType("Q1_0", 41, 128, 18),
    GgmlType("Q2_0", 42, 64, 18),
)
_TYPES = {type.id: type for type in (*GGML_TYPES.values(), *PLAIN_TYPES.values(), *_UNDECODED)}
# The fewest bytes of a metadata entry (two lengths or types and one value) and of a description of
# a tensor (a name's length, rank, type, offset).
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 13, 24


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file; nothing of it is read before it is asked for.

    Args:
        name: as in the file.
        type: as llama.cpp prints it: `Q4_K`, `F16`.
        shape: rows first, as torch has it: the reverse of the file's.
        offset: byte of the file at which it begins.
        nbytes: bytes it takes there.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    _source: Source = field(repr=False, compare=False)

    def data(self) -> Tensor:
        """The bytes as they are, of any type: a new uint8 tensor (nbytes,).

        Raises:
            DataError: the file cannot be read any more, or has changed since it was opened.
        """
        source, data = self._source, torch.empty(self.nbytes, dtype=torch.uint8)
        try:
            with source.path.open("rb") as stream:
                unchanged = Source.of(source.path, stream) == source
                stream.seek(self.offset)
                # Read, not mapped: where the file shrinks meanwhile, a mapping would kill Python.
                complete = unchanged and stream.readinto(data.numpy().data) == self.nbytes
        except OSError as error:
            raise source.error(
                f"{error}", "It was there when it was opened: put it back."
            ) from error
        if not complete:
            raise source.error(
                "it has changed since it was opened", "Run again when nothing writes to it."
            )
        return data

    def tensor(self) -> Tensor:
        """The values, of the shape `shape`, in float32, float16 or bfloat16 as they are stored.

        Raises:
            DataError: as by `data`; or it is quantized, or of a type that is not decoded.
        """
        if self.type not in _DTYPES:
            raise self._unsuitable(
                f"has the type {self.type}; expected one of {', '.join(_DTYPES)} for a tensor that "
                "is used as it is"
            )
        return self.data().view(_DTYPES[self.type]).reshape(self.shape)

    def packed(self) -> PackedWeight:
        """The matrix: `GgmlBlocks`, or `PlainWeight` for F32, F16 and BF16.

        Raises:
            DataError: as by `data`; or it has not two dimensions, or a type that is not decoded.
        """
        if len(self.shape) != 2:
            raise self._unsuitable(f"has the shape {self.shape}; expected a matrix")
        if self.type in _DTYPES:
            return PlainWeight(self.tensor())
        if self.type not in GGML_TYPES:
            raise self._unsuitable(
                f"has the type {self.type}, which is not decoded; known are "
                f"{', '.join((*_DTYPES, *GGML_TYPES))}"
            )
        rows, columns = self.shape
        return GgmlBlocks(self.type, self.data().view(rows, -1), (rows, columns))

    def _unsuitable(self, what: str) -> DataError:
        return self._source.error(
            f"its tensor {quoted(self.name)} {what}",
            "Use a file of the same model with other types; llama-quantize makes them.",
        )


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: everything but the tensors' data.

    Args:
        path: the file.
        version: 2 or 3.
        metadata: numbers, booleans, strings and (nested) lists of them, by key, in file order.
        tensors: by name, in file order.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read and check the header.

        Raises:
            DataError: there is no such file; it is no GGUF file, or one of another version, byte
                order or in several parts; or it contradicts itself or is shorter than it says.
        """
        try:
            # A pipe or a device would block or never end.
            if not path.is_file():
                raise DataError(
                    f"The GGUF file {path} does not exist, or is no regular file. Check the path."
                )
            with path.open("rb", buffering=2**18) as stream:
                header = GgufStream(Source.of(path, stream), stream)
                return cls(path, *_read_header(header))
        except OSError as error:
            raise DataError(
                f"The GGUF file {path} cannot be read: {error}. Check its permissions."
            ) from error

    def digest(self) -> str:
        """Hex SHA-256 of the whole file."""
        return file_digest(self.path)


def _read_header(header: GgufStream) -> tuple[int, dict[str, Any], dict[str, GgufTensor]]:
    version = _read_version(header)
    tensor_count = header.integer(8, "the number of tensors")
    entry_count = header.integer(8, "the number of metadata entries")
    header.check_room(entry_count, _SMALLEST_ENTRY, "metadata entries", at=16)
    metadata, alignment = _read_metadata(header, entry_count)
    if metadata.get("split.count", 1) not in (0, 1):
        raise header.source.error(
            f"it is one of {quoted(metadata['split.count'])} parts of a model (split.count)",
            "Merge them first: llama-gguf-split --merge FIRST_PART.gguf MERGED.gguf",
        )
    header.check_room(tensor_count, _SMALLEST_TENSOR, "tensors", at=8)
    described = [_read_tensor(header, index) for index in range(tensor_count)]
    return version, metadata, _place(header, described, alignment)


def _read_version(header: GgufStream) -> int:
    magic = header.take(4, "the magic number")
    if magic != MAGIC:
        raise header.source.error(
            f"it begins with {magic!r}, not with {MAGIC!r}: it is no GGUF file",
            "Name a .gguf file. Older GGML, GGMF and GGJT files have to be converted by llama.cpp; "
            "in place of a Git LFS pointer, get the file by git lfs pull.",
        )
    version = header.integer(4, "the version")
    # llama.cpp's own rule: versions are small, so only the other byte order puts zeros there.
    if version and not version & 0xFFFF:
        raise header.source.error(
            f"it is big-endian (version {version:#010x} at byte 4)",
            "Convert it: gguf-convert-endian FILE little",
        )
    if version not in VERSIONS:
        raise header.source.error(
            f"it has the version {version} (at byte 4); expected 2 or 3",
            "Convert the model again with a current llama.cpp; where the version is a newer one, "
            "update pytest-qlab.",
        )
    return version


def _read_metadata(header: GgufStream, count: int) -> tuple[dict[str, Any], int]:
    """All entries, and the alignment of the tensors' data."""
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(count):
        start = header.position
        key = header.string(f"the key of metadata entry {index}")
        what = f"the metadata {quoted(key)}"
        if not key:
            # Padding, read as an entry, is one with an empty key.
            raise header.source.damaged(
                f"metadata entry {index} of {count} has an empty key, as if there were fewer", start
            )
        if key in metadata:
            raise header.source.damaged(f"{what} appears twice", start)
        type = header.integer(4, f"the type of {what}")
        metadata[key] = header.value(type, what)
        if key == "general.alignment":
            alignment = metadata[key]
            # Only powers of two, as in llama.cpp; the specification has all multiples of 8.
            if type != UINT32 or alignment < 1 or alignment & (alignment - 1):
                raise header.source.damaged(
                    f"general.alignment is {quoted(alignment)}; expected a power of two, as uint32",
                    start,
                )
    return metadata, alignment


@dataclass(frozen=True, slots=True)
class _Description:
    """What a file says about a tensor, at the byte `start`; `offset` counts from the data."""

    start: int
    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.type.block_size * self.type.block_bytes


def _read_tensor(header: GgufStream, index: int) -> _Description:
    start = header.position
    name = header.string(f"the name of tensor {index}")
    what = f"the tensor {quoted(name)}"
    if not name:
        raise header.source.damaged(f"tensor {index} has an empty name", start)
    rank = header.integer(4, f"the number of dimensions of {what}")
    if rank > MOST_DIMENSIONS:
        raise header.source.damaged(
            f"{what} has {rank} dimensions; expected at most {MOST_DIMENSIONS}", start
        )
    shape = tuple(header.integer(8, f"a dimension of {what}") for _ in range(rank))[::-1]
    number = header.integer(4, f"the type of {what}")
    offset = header.integer(8, f"the offset of {what}")
    if not all(0 < size < 2**63 for size in shape):
        raise header.source.damaged(
            f"{what} has the dimensions {shape}; expected each from 1 to 2**63 - 1", start
        )
    type = _TYPES.get(number)
    if type is None:
        raise header.source.error(
            f"{what} has the unknown type number {number} (described at byte {start})",
            "Use a file of another type; where llama.cpp knows the number, updating pytest-qlab "
            "may help, otherwise the file is damaged.",
        )
    columns = shape[-1] if shape else 1
    if columns % type.block_size:
        raise header.source.damaged(
            f"{what} has rows of {columns}, not a multiple of the block size of {type.name}, "
            f"{type.block_size}",
            start,
        )
    return _Description(start, name, type, shape, offset)


def _place(
    header: GgufStream, described: list[_Description], alignment: int
) -> dict[str, GgufTensor]:
    """The tensors, where they fill the rest of the file one after the other."""
    source, count, header_end = header.source, len(described), header.position
    begin = _aligned(header_end, alignment)
    # A tensor count that is too small leaves descriptions here, and with them every offset would
    # count from a wrong byte. Files without tensors may end before the padding does.
    if any(header.take(min(begin - header_end, header.left), "the padding before the data")):
        raise source.damaged(
            f"the padding after the description of the last of {count} tensors is not zero, as if "
            "there were more of them",
            header_end,
        )
    tensors: dict[str, GgufTensor] = {}
    end = begin
    for tensor in described:
        what = f"the tensor {quoted(tensor.name)}"
        offset = begin + tensor.offset
        if tensor.name in tensors:
            raise source.damaged(f"{what} appears twice", tensor.start)
        if tensor.offset % alignment:
            raise source.damaged(
                f"the offset {tensor.offset} of {what} is not a multiple of the alignment, "
                f"{alignment}",
                tensor.start,
            )
        if offset + tensor.nbytes > source.size:
            raise source.damaged(
                f"{what} lies outside the file: it would end at byte {offset + tensor.nbytes} of "
                f"{source.size}",
                tensor.start,
            )
        if offset != end:
            how = "overlaps the one before it" if offset < end else "leaves a gap"
            raise source.damaged(
                f"{what} {how}: its offset is {tensor.offset}; expected {end - begin}", tensor.start
            )
        tensors[tensor.name] = GgufTensor(
            tensor.name, tensor.type.name, tensor.shape, offset, tensor.nbytes, source
        )
        end = _aligned(offset + tensor.nbytes, alignment)
    if source.size > end:
        raise source.damaged(
            f"{source.size - end} bytes belong to none of its {count} tensors", end
        )
    return tensors


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
