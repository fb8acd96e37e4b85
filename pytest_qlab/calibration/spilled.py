"""The stream of hidden states of a model that is read block by block: on disk, one file a block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytest_qlab.calibration.stream import BlockCall, BlockStream, capture_calls
from pytest_qlab.models.lazy import LazyModel


class StatesFile:
    """Hidden states in a file, one after the other; appended first, then read one at a time.

    All have the shape and dtype of the first.
    """

    def __init__(
        self,
        path: Path,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.path = path
        self.shape = tuple(shape)
        self.dtype = dtype
        self._device = device
        self._written = False

    def append(self, state: Tensor) -> None:
        """Add the next one."""
        self.shape, self.dtype, self._device = tuple(state.shape), state.dtype, state.device
        with self.path.open("ab" if self._written else "wb") as stream:
            stream.write(state.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._written = True

    def __iter__(self) -> Iterator[Tensor]:
        """Read them; each has memory of its own, aligned as torch allocates."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        with self.path.open("rb") as stream:
            for _ in range(os.fstat(stream.fileno()).st_size // nbytes):
                state = torch.empty(self.shape, dtype=self.dtype)
                stream.readinto(state.reshape(-1).view(torch.uint8).numpy().data)
                yield state.to(self._device)

    def sync(self) -> None:
        """Wait until they are on the disk."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())


class SpilledCall(BlockCall):
    """A call whose hidden state is kept in a file."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
        self._file = StatesFile(path)
        super().__init__(args, kwargs)

    @property
    def hidden(self) -> Tensor:
        """The hidden state, read anew."""
        return next(iter(self._file))

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        self._file.append(value)


def spilled_calls(lazy: LazyModel, ids: Sequence[int], directory: Path) -> list[BlockCall]:
    """`capture_calls` for a model that is read as it runs, hidden states put into a directory."""
    count = iter(range(len(lazy.blocks)))

    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
        return SpilledCall(args, kwargs, directory / f"call-{next(count):04d}.bin")

    directory.mkdir(parents=True, exist_ok=True)
    with lazy.forwards():
        return capture_calls(lazy.model, lazy.blocks, ids, make)


class SpilledStream(BlockStream):
    """A `BlockStream` over a lazy model whose hidden states are in files.

    The blocks are resident while they are run only if the caller sees to it.

    Args:
        lazy: the model.
        sequences: token ids, all of one length.
        directory: for the files; made if it is not there.
        start: the block to go on in front of; its states are there from an earlier run unless 0.
        threads: how many sequences run at the same time.
    """

    def __init__(
        self,
        lazy: LazyModel,
        sequences: Sequence[Sequence[int]],
        directory: Path,
        *,
        start: int = 0,
        threads: int = 1,
    ) -> None:
        self.forwards = len(sequences)
        self._threads = threads
        self._directory = directory
        self._calls = spilled_calls(lazy, sequences[0], directory)
        if start:
            example = self._calls[min(start, len(self._calls) - 1)].hidden
            self._hidden = StatesFile(self._path(start), example.shape, example.dtype, lazy.device)
        else:
            with lazy.embedding():
                self._hidden = self._embed(lazy.model, lazy.blocks[0][1], sequences)

    def settle(self) -> None:
        """Wait until the current states are on the disk."""
        assert isinstance(self._hidden, StatesFile)
        self._hidden.sync()

    def forget(self, index: int) -> None:
        """Delete the states in front of block `index`."""
        self._path(index).unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self._directory / f"states-{index:04d}.bin"

    def _states(self, index: int) -> StatesFile:
        return StatesFile(self._path(index))
