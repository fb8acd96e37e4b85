"""What methods are told of the original model: statistics and gradients, kept in the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qlab.calibration.gradients import StoredGradients, WithGradients, write_gradients
from pytest_qlab.calibration.sources import (
    StatisticsSource,
    StoredStatistics,
    write_statistics,
    write_statistics_streamed,
)
from pytest_qlab.errors import MethodError
from pytest_qlab.models.structure import all_linears

if TYPE_CHECKING:
    from pytest_qlab.lab import Lab
    from pytest_qlab.methods.base import Method
    from pytest_qlab.streaming import Streaming

STATISTICS_VERSION = 4
GRADIENTS_VERSION = 1
LARGE_GRAM_BYTES = 2**30


class OriginalModel:
    """The base model on the calibration text, run once for all methods, workers and runs."""

    def __init__(self, lab: Lab, streaming: Streaming) -> None:
        self._lab, self._streaming = lab, streaming

    def statistics(self, *, gram: bool) -> StoredStatistics:
        """Statistics of the activations in front of every linear.

        One pass serves every method: Gram matrices are collected even if they are not wanted yet,
        unless they are large.
        """
        lab = self._lab
        parts = self._parts(STATISTICS_VERSION)
        if not gram:
            known = [each for each in (True, False) if self._has_statistics(parts, gram=each)]
            gram = known[0] if known else self._gram_bytes() <= LARGE_GRAM_BYTES
        parts["gram"] = gram
        lazy = self._streaming.lazy()

        def build(directory: Path) -> None:
            options: Any = {"gram": gram, "threads": lab.threads, "progress": lab.progress}
            sequences = lab.calibration.sequences
            if lazy is not None:
                forwards = write_statistics_streamed(directory, lazy, sequences, **options)
            else:
                forwards = write_statistics(directory, lab.base_model, sequences, **options)
            lab.count_forwards(forwards)

        return lab.store.get(
            "statistics", parts, build, StoredStatistics, resumable=lazy is not None
        )

    def gradients(self) -> StoredGradients:
        """Squared gradients of the loss.

        Raises:
            MethodError: they are not in the store yet, and the model is read block by block.
        """
        lab = self._lab

        def build(directory: Path) -> None:
            if self._streaming.lazy() is not None:
                raise MethodError(
                    "Gradients of the loss take the whole model in memory at once, and this one is "
                    "read block by block. Give --qlab-stream=never on a machine with room for four "
                    "times the model; what is computed there is kept in the store, and "
                    "can be used from it anywhere. Or choose a method that needs no gradients, "
                    "such as gptq."
                )
            sequences = lab.calibration.sequences
            forwards = write_gradients(
                directory,
                lab.base_model,
                sequences,
                threads=lab.threads,
                progress=lab.progress,
            )
            lab.count_forwards(forwards)

        return lab.store.get("gradients", self._parts(GRADIENTS_VERSION), build, StoredGradients)

    def told_to(self, method: Method) -> StatisticsSource | None:
        """What a method wants to know; None if that is nothing."""
        wanted = method.original_statistics
        if "fisher" in method.wanted_statistics:
            # First the gradients, which may not be had.
            gradients = self.gradients()
            return WithGradients(self.statistics(gram="gram" in wanted), gradients)
        return self.statistics(gram="gram" in wanted) if wanted else None

    def _parts(self, code: int) -> dict[str, Any]:
        return {
            **self._lab.base_identity(),
            "calibration": self._lab.calibration_input.identity,
            "code": code,
        }

    def _has_statistics(self, parts: dict[str, Any], *, gram: bool) -> bool:
        return self._lab.store.has("statistics", {**parts, "gram": gram})

    def _gram_bytes(self) -> int:
        """At most what the Gram matrices of all layers take."""
        return sum(4 * site.in_features**2 for site in all_linears(self._lab.described.model))
