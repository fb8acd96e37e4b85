"""The numbers, strings and arrays of a GGUF file, read without believing any length in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pytest_qlab.errors import DataError

LARGEST_HEADER = 64 * 2**20
"""Bytes before the tensors' data; 262,144 tokens and twice as many merges take about 15 MB. As
Python values they take up to 25 times as much memory, which bounds what a hostile file can claim.
"""
DEEPEST_ARRAY = 4

_DAMAGED = "It is damaged or incomplete: download it or write it again."
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
# The fewest bytes that one can take: its length; its elements' type and their number.
_SMALLEST_STRING, _SMALLEST_ARRAY = 8, 12


@dataclass(frozen=True)
class Source:
    """A file as it was when it was opened."""

    path: Path
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path, stream: BinaryIO) -> Source:
        """What `stream`, the open file `path`, is now."""
        facts = os.fstat(stream.fileno())
        return cls(path, facts.st_size, facts.st_mtime_ns)

    def error(self, what: str, remedy: str = _DAMAGED) -> DataError:
        """An error that names the file, says what is wrong with it, and what to do."""
        return DataError(f"The GGUF file {self.path} cannot be used: {what}. {remedy}")

    def damaged(self, what: str, position: int) -> DataError:
        """An error for a file that contradicts itself at a byte."""
        return self.error(f"{what} (at byte {position})")


class GgufStream:
    """A position in the header of a file, and what is read from there on.

    Every method raises DataError where the header does not hold what is asked for; `what` names it
    in the message. Counts and lengths are checked against what is left of the file before anything
    is allocated.
    """

    def __init__(self, source: Source, stream: BinaryIO) -> None:
        self.source = source
        self.position = 0
        self._stream = stream
        self._end = min(source.size, LARGEST_HEADER)

    @property
    def left(self) -> int:
        """Bytes that are left for the header."""
        return self._end - self.position

    def check_room(self, count: int, smallest: int, what: str, at: int) -> None:
        """Refuse a count, read at byte `at`, of things of at least `smallest` bytes."""
        if count * smallest > self.left:
            raise self.source.damaged(
                f"it claims {count} {what}, which take {smallest} bytes each or more, but "
                f"{self._room()}",
                at,
            )

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise self.source.damaged(
                f"{what} takes {count} bytes, but {self._room()}", self.position
            )
        data = self._stream.read(count)
        if len(data) != count:
            raise self.source.damaged(f"it was cut off while {what} was read", self.position)
        self.position += count
        return data

    def integer(self, width: int, what: str) -> int:
        """An unsigned integer of `width` bytes."""
        return int.from_bytes(self.take(width, what), "little")

    def string(self, what: str) -> str:
        """A length and that many bytes of UTF-8."""
        data = self.take(self.integer(8, f"the length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            position = self.position - len(data) + error.start
            raise self.source.damaged(f"{what} is not valid UTF-8", position) from None

    def value(self, type: int, what: str) -> Any:
        """A value of that type of metadata: a number, bool, str, or (nested) list of them."""
        if type == STRING:
            return self.string(what)
        if type == ARRAY:
            return self._array(what, depth=1)
        return self._values(type, 1, what)[0]

    def _array(self, what: str, depth: int) -> list[Any]:
        start = self.position
        if depth > DEEPEST_ARRAY:
            raise self.source.damaged(
                f"{what} is an array nested more than {DEEPEST_ARRAY} levels deep", start
            )
        type = self.integer(4, f"the type of the elements of {what}")
        count = self.integer(8, f"the length of {what}")
        if type == STRING:
            self.check_room(count, _SMALLEST_STRING, f"strings of {what}", at=start + 4)
            return [self.string(what) for _ in range(count)]
        if type == ARRAY:
            self.check_room(count, _SMALLEST_ARRAY, f"arrays of {what}", at=start + 4)
            return [self._array(what, depth + 1) for _ in range(count)]
        return self._values(type, count, what)

    def _values(self, type: int, count: int, what: str) -> list[Any]:
        start = self.position
        if type != BOOL and type not in _NUMBERS:
            raise self.source.error(
                f"{what} has the unknown value type {type} (before byte {start}); known are 0 to "
                "12",
                "It is damaged, or of a newer kind: download it again, or update pytest-qlab.",
            )
        dtype = np.dtype(_NUMBERS.get(type, "u1"))
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype=dtype)
        if type == BOOL:
            if np.any(values > 1):
                raise self.source.damaged(f"{what} is boolean, but neither 0 nor 1", start)
            values = values.astype(np.bool_)
        plain: list[Any] = values.tolist()
        return plain

    def _room(self) -> str:
        if self._end < self.source.size:
            return f"only {self.left} are left of the {self._end} that a header may take"
        return f"only {self.left} are left of the file's {self._end}"


def quoted(value: Any) -> str:
    """What a file says, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
