"""How a quantized model comes to be in the store: imported, part by part, or all in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qlab.checkpoint import open_checkpoint, save_checkpoint
from pytest_qlab.methods.pipeline import quantize_model
from pytest_qlab.streaming import build_streamed

if TYPE_CHECKING:
    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.lab import Lab
    from pytest_qlab.methods.base import Method
    from pytest_qlab.models.lazy import LazyModel


def build_checkpoint(
    directory: Path,
    lab: Lab,
    method: Method,
    statistics: StatisticsSource | None,
    lazy: LazyModel | None,
) -> None:
    """Quantize the lab's model into a directory.

    Args:
        statistics: what the method wants to know of the original model.
        lazy: the model, if it is to be read block by block.
    """
    if lazy is not None:
        build_streamed(
            directory,
            lazy,
            method,
            _sequences(lab, method),
            statistics,
            threads=lab.threads,
            progress=lab.progress,
        )
        lab.count_forwards(open_checkpoint(directory).index["forwards"])
        return
    finished = method.import_model(lab.loaded, directory, lab.progress, statistics)
    if finished is not None:
        save_checkpoint(directory, finished, lab.loaded)
        return
    quantized = quantize_model(
        lab.base_model,
        method,
        _sequences(lab, method),
        statistics,
        threads=lab.threads,
        progress=lab.progress,
    )
    lab.count_forwards(quantized.forwards)
    save_checkpoint(directory, quantized, lab.loaded)


def _sequences(lab: Lab, method: Method) -> tuple[tuple[int, ...], ...]:
    return () if method.stream == "none" else lab.calibration.sequences
