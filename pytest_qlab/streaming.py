"""Quantizing a model that need not fit in memory: part by part, from files into a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qlab.checkpoint import INDEX_FILE, join_checkpoints, save_checkpoint
from pytest_qlab.machine import available_memory
from pytest_qlab.methods.streamed import Part, quantize_parts

if TYPE_CHECKING:
    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.methods.base import Method
    from pytest_qlab.models.lazy import LazyModel

PARTS = "parts"
COPIES = 2
"""Of the model, that quantizing in memory takes: the base model, and one that is worked on."""
SHARE = 0.8


def exceeds_memory(nbytes: int, available: int | None = None) -> bool:
    """Whether a model of that size should be read block by block.

    Args:
        nbytes: of all parameters, in the dtype that the model computes in.
        available: bytes; by default what the machine and the limits on this process leave.
    """
    room = available_memory() if available is None else available
    return room is not None and COPIES * nbytes > SHARE * room


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
