"""GGUF files put together byte by byte, so that anything in them can be a lie."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_qlab.engines.gguf.reader import GgufFile

VALUE_TYPES = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
STRING, ARRAY = 8, 9
F32, Q8_0 = 0, 8


@dataclass(frozen=True)
class Integer:
    """An integer that tells how the file goes on: a count, length, type, dimension or offset."""

    width: int
    value: int


Piece = bytes | Integer


def u32(value: int) -> list[Piece]:
    return [Integer(4, value)]


def u64(value: int) -> list[Piece]:
    return [Integer(8, value)]


def string(text: str | bytes) -> list[Piece]:
    data = text.encode() if isinstance(text, str) else text
    return [*u64(len(data)), data]


def payload(type: str | list[Any], value: Any) -> list[Piece]:
    """A value without its type; the type of an array is a list of its elements' type."""
    if isinstance(type, list):
        elements = [piece for element in value for piece in payload(type[0], element)]
        return [*u32(number_of(type[0])), *u64(len(value)), *elements]
    if type == "string":
        return string(value)
    return [struct.pack("<" + VALUE_TYPES[type][1], value)]


def number_of(type: str | list[Any]) -> int:
    if isinstance(type, list):
        return ARRAY
    return STRING if type == "string" else VALUE_TYPES[type][0]


def entry(key: str | bytes, type: str | list[Any], value: Any) -> list[Piece]:
    """A metadata entry."""
    return [*string(key), *u32(number_of(type)), *payload(type, value)]


def info(name: str | bytes, dims: Sequence[int], type: int, offset: int) -> list[Piece]:
    """The description of a tensor; `dims` in the file's order, columns first."""
    sizes = [piece for size in dims for piece in u64(size)]
    return [*string(name), *u32(len(dims)), *sizes, *u32(type), *u64(offset)]


def joined(pieces: Iterable[Piece]) -> bytes:
    return b"".join(
        piece if isinstance(piece, bytes) else piece.value.to_bytes(piece.width, "little")
        for piece in pieces
    )


def header(
    entries: Sequence[list[Piece]] = (),
    infos: Sequence[list[Piece]] = (),
    *,
    version: int = 3,
    entry_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> list[Piece]:
    """Everything before the data, padded; the counts are true unless given."""
    pieces: list[Piece] = [
        b"GGUF",
        *u32(version),
        *u64(len(infos) if tensor_count is None else tensor_count),
        *u64(len(entries) if entry_count is None else entry_count),
        *(piece for part in (*entries, *infos) for piece in part),
    ]
    return [*pieces, bytes(-len(joined(pieces)) % alignment)]


def integers(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """(position, width) of every `Integer`."""
    found, position = [], 0
    for piece in pieces:
        width = len(piece) if isinstance(piece, bytes) else piece.width
        if isinstance(piece, Integer):
            found.append((position, width))
        position += width
    return found


def one(*infos: list[Piece], data: int = 64, **lies: int) -> bytes:
    """A file of these tensors and `data` bytes of them."""
    return joined(header((), infos, **lies)) + bytes(data)


def sample() -> tuple[list[Piece], bytes]:
    """A small valid file with something of everything: header pieces, and data."""
    pieces = header(
        [
            entry("general.architecture", "string", "llama"),
            entry("general.alignment", "uint32", 16),
            entry("a.bool", "bool", True),
            entry("a.float", "float32", 0.5),
            entry("a.numbers", ["int16"], [-1, 2, 3]),
            entry("a.bools", ["bool"], [True, False]),
            entry("a.words", ["string"], ["one", "zwölf", ""]),
            entry("a.nested", [["uint8"]], [[1, 2], [], [3]]),
        ],
        [
            info("token_embd.weight", [3, 2], 0, 0),
            info("blk.0.attn_q.weight", [32, 2], 8, 32),
            info("half", [4], 1, 112),
            info("undecoded", [2], 24, 128),
        ],
        alignment=16,
    )
    data = bytes(range(24)) + bytes(8) + bytes(range(68)) + bytes(12)
    return pieces, data + bytes(range(8)) + bytes(8) + b"\x01\x02"


def opened(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile.open(path)
