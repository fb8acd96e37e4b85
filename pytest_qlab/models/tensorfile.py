"""Safetensors files read and written one tensor at a time, so that no file has to fit in memory.

The layout is safetensors': eight bytes with the length of a JSON header, the header, the data. What
is written here is, byte for byte, what `safetensors.torch.save_file` writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pytest_qlab.errors import ModelError
from pytest_qlab.models.source import SAFETENSORS_DTYPES

PIECE = 2**20
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# The order of types in a file, as in safetensors: widest first.
_RANK = (
    "I64",
    "F64",
    "F32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where its bytes are, and what they mean."""

    path: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, in its own dtype or another.

        Only its part of the file is mapped, and no longer than it takes to copy or cast it.
        """
        tensor = torch.empty(self.shape, dtype=dtype or self.dtype)
        if self.nbytes:
            raw: Any = np.memmap(self.path, np.uint8, "c", self.start, (self.nbytes,))
            tensor.copy_(_view(torch.from_numpy(raw), self.dtype, self.shape))
        return tensor


def _view(raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes as a tensor; a copy where they start at an address that the dtype does not allow."""
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises:
        ModelError: the file is damaged, or holds a dtype that torch has not.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if length > size - 8:
                raise ValueError(f"its header claims {length} bytes, and it has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {name: _stored(path, 8 + length, facts) for name, facts in header.items()}
        if any(each.start + each.nbytes > size for each in found.values()):
            raise ValueError("it is shorter than its header says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"The weight file {path} is damaged or cannot be read tensor by tensor: {error}. "
            "Download or write it again."
        ) from error
    return found


def _stored(path: Path, data: int, facts: Mapping[str, Any]) -> Stored:
    dtype = SAFETENSORS_DTYPES[facts["dtype"]]
    shape = tuple(int(each) for each in facts["shape"])
    first, last = facts["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{last - first} bytes are no tensor of shape {shape} and type {dtype}")
    return Stored(path, data + first, last - first, dtype, shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a new file and wait until they are on the disk."""
    facts = {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}

    def copy(name: str, stream: BinaryIO) -> None:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        stream.write(flat.view(torch.uint8).numpy().data)

    _write(path, facts, copy)


def join_files(path: Path, files: Iterable[Path]) -> None:
    """Write the tensors of several files, whose names differ, into one."""
    found = {name: each for file in files for name, each in read_header(file).items()}

    def copy(name: str, stream: BinaryIO) -> None:
        with found[name].path.open("rb") as source:
            source.seek(found[name].start)
            left = found[name].nbytes
            while left:
                piece = source.read(min(left, PIECE))
                stream.write(piece)
                left -= len(piece)

    _write(path, {name: (each.dtype, each.shape) for name, each in found.items()}, copy)


def _write(
    path: Path,
    facts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    copy: Callable[[str, BinaryIO], None],
) -> None:
    names = sorted(facts, key=lambda name: (_RANK.index(_NAMES[facts[name][0]]), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        dtype, shape = facts[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            copy(name, stream)
        stream.flush()
        os.fsync(stream.fileno())
