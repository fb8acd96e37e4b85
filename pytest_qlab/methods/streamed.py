"""One method over a model that is read block by block: each part is finished before the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytest_qlab.calibration.spilled import SpilledStream, spilled_calls
from pytest_qlab.calibration.stream import BlockCall, BlockStream
from pytest_qlab.methods.pipeline import Pass, QuantizedModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.methods.base import Method
    from pytest_qlab.models.lazy import LazyModel


@dataclass(frozen=True)
class Part:
    """A decoder block, or a module outside them, quantized.

    Attributes:
        number: of the part: blocks in order, then modules outside them.
        quantized: what the method made of it; `seconds` and `forwards` are what it took.
        parameters: all that the part holds, by name; those that have changed are in `quantized`.
    """

    number: int
    quantized: QuantizedModel
    parameters: dict[str, Tensor]


def quantize_parts(
    lazy: LazyModel,
    method: Method,
    sequences: Sequence[Sequence[int]],
    statistics: StatisticsSource | None,
    directory: Path,
    save: Callable[[Part], None],
    *,
    start: int = 0,
    threads: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Quantize as `quantize_model` does, to the bit, with one part resident at a time.

    When `save` is called with a part, the hidden states in front of the next are on the disk. Once
    it has returned, a later call with the same directory can start at the next part.

    Args:
        sequences, statistics: as of `quantize_model`.
        directory: for hidden states, of this model and method only.
        save: writes a part; the part is let go of afterwards.
        start: how many parts are saved already.
    """
    with torch.inference_mode(False), torch.no_grad():
        parts = [*lazy.blocks, *lazy.outside]
        if start < len(parts):
            work = _StreamedPass(
                lazy, method, sequences, statistics, directory, start, threads, progress
            )
        for number in range(start, len(parts)):
            work.run_part(number, *parts[number], save)


class _StreamedPass(Pass):
    def __init__(
        self,
        lazy: LazyModel,
        method: Method,
        sequences: Sequence[Sequence[int]],
        statistics: StatisticsSource | None,
        directory: Path,
        start: int,
        threads: int,
        progress: Callable[[str], None],
    ) -> None:
        self._began = time.perf_counter()
        self._lazy = lazy
        self._directory = directory
        self._start = start
        self._spilled: SpilledStream | None = None
        self._parameters = [name for name, _ in lazy.model.named_parameters()]
        super().__init__(lazy.model, method, sequences, statistics, threads, progress)

    def run_part(
        self, number: int, name: str, module: nn.Module, save: Callable[[Part], None]
    ) -> None:
        """Quantize a part of that name, and hand it over."""
        is_block = number < len(self.blocks)
        mine = [
            each
            for each in self._parameters
            if (each.startswith(f"{name}.") if is_block else each.rpartition(".")[0] == name)
        ]
        with self._lazy.resident(module, alone=not is_block):
            before = {each: self.model.get_parameter(each).detach() for each in mine}
            if is_block:
                self.run_block(number, name, module)
            elif name in self.assigned:
                self.quantize_embedding(name, self.assigned[name])
            after = dict(self.model.named_parameters())
        self._keep_changes(before, after)
        if self._spilled is not None and is_block:
            self._spilled.settle()
        self.result.seconds = time.perf_counter() - self._began
        save(Part(number, self.result, before))
        if self._spilled is not None and is_block:
            self._spilled.forget(number)
        self._began = time.perf_counter()
        self.result = self.nothing()

    def _keep_changes(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Leave those parameters among the changed ones that are not the base model's."""
        result = self.result
        weights = {f"{name}.weight" for name in (*result.layers, *result.embeddings)}
        current = {**before, **after, **result.changed}
        changed = {}
        for name in before:
            if name not in weights:
                original = self._lazy.read(name)
                if not torch.equal(current[name], original):
                    changed[name] = current[name].detach().float()
        result.changed = changed

    def _open_stream(self, sequences: Sequence[Sequence[int]], threads: int) -> BlockStream:
        start = min(self._start, len(self.blocks))
        self._spilled = SpilledStream(
            self._lazy, sequences, self._directory, start=start, threads=threads
        )
        return self._spilled

    def _capture(self, ids: Sequence[int]) -> list[BlockCall]:
        return spilled_calls(self._lazy, ids, self._directory / "traces")
