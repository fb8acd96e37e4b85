"""Whether a model is read part by part; quantizing it like that, from files into a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qlab.checkpoint import INDEX_FILE, join_checkpoints, save_checkpoint
from pytest_qlab.errors import MethodError, MetricError, ModelError, SpecError, did_you_mean
from pytest_qlab.machine import available_memory
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.streamed import Part, quantize_parts

if TYPE_CHECKING:
    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.inputs import ModelInput
    from pytest_qlab.models.lazy import LazyModel

CHOICES = ("auto", "always", "never")
PARTS = "parts"
COPIES = 2
"""Of the model, that work in memory takes: the base model, and one that is made or compared."""
SHARE = 0.8


def exceeds_memory(nbytes: int, available: int | None = None) -> bool:
    """Whether a model of that size should be read block by block.

    Args:
        nbytes: of all parameters, in the dtype that the model computes in.
        available: bytes; by default what the machine and the limits on this process leave.
    """
    room = available_memory() if available is None else available
    return room is not None and COPIES * nbytes > SHARE * room


class Streaming:
    """Whether a model is read block by block, to be quantized and to be measured.

    Args:
        choice: `always`, `never`, or `auto`: if it is large, not in memory yet, and can be.
        progress: called with the reason where a large model cannot be.
    """

    def __init__(self, choice: str, model: ModelInput, progress: Callable[[str], None]) -> None:
        if choice not in CHOICES:
            raise SpecError(f"Unknown value {choice!r} of stream.{did_you_mean(choice, CHOICES)}")
        self._choice = choice
        self._model = model
        self._progress = progress
        self._large: bool | None = None

    def lazy(self) -> LazyModel | None:
        """The model to be read block by block; None if it is to be loaded.

        Raises:
            ModelError: it is always to be, and cannot be.
        """
        if self._choice == "always":
            return self._model.lazy
        if self._choice == "never" or self._model.is_loaded or self._large is False:
            return None
        try:
            if self._large is None:
                nbytes = self._model.nbytes
                self._large = nbytes is not None and exceeds_memory(nbytes)
            return self._model.lazy if self._large else None
        except ModelError as error:
            self._large = False
            self._progress(f"the whole model is loaded: {error}")
            return None

    def lazy_for(self, method: Method) -> LazyModel | None:
        """The same for quantizing with `method`.

        Raises:
            MethodError: the method takes the whole model, which is always to be streamed.
        """
        if type(method).import_model is Method.import_model:
            return self.lazy()
        if self._choice == "always":
            raise MethodError(
                f"{method.id} takes the whole model at once and cannot read it block by block. "
                "Give --qlab-stream=auto or never for it."
            )
        return None

    def check_whole(self, what: str) -> None:
        """Refuse what needs the whole model, before it is loaded, if it is not to be.

        Args:
            what: needs it; the beginning of a sentence, in the plural.

        Raises:
            MetricError: the model is read block by block.
        """
        if self.lazy() is not None:
            why = (
                "as --qlab-stream=always says"
                if self._choice == "always"
                else "since two copies of it do not fit in memory"
            )
            raise MetricError(
                f"{what} need the whole model in memory, and {self._model.name!r} is read block by "
                f"block, {why}. Give --qlab-stream=never (stream='never' in Python) on a machine "
                "with room for it. Measures of damage and of size need no more than a block."
            )


def build_streamed(
    directory: Path,
    lazy: LazyModel,
    method: Method,
    sequences: Sequence[Sequence[int]],
    statistics: StatisticsSource | None,
    *,
    threads: int,
    progress: Callable[[str], None],
) -> None:
    """Write the checkpoint that `quantize_model` and `save_checkpoint` would write, to the bit.

    Each part of the model is written when it is finished. If this is killed, another call with the
    same directory goes on at the part that it was at.
    """
    parts = directory / PARTS
    if not (directory / INDEX_FILE).exists():
        parts.mkdir(exist_ok=True)
        start = sum(1 for each in parts.iterdir() if each.name.isdigit())
        if start:
            progress(f"{method.id}: going on after {start} finished parts")

        def save(part: Part) -> None:
            partial, finished = parts / "partial", parts / f"{part.number:05d}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_checkpoint(partial, part.quantized, lazy.loaded, part.parameters)
            partial.rename(finished)

        quantize_parts(
            lazy,
            method,
            sequences,
            statistics,
            parts / "stream",
            save,
            start=start,
            threads=threads,
            progress=progress,
        )
        progress(f"{method.id}: joining the parts")
        join_checkpoints(directory, sorted(each for each in parts.iterdir() if each.name.isdigit()))
    shutil.rmtree(parts, ignore_errors=True)
