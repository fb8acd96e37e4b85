"""A candidate's evaluation, look by look: each look's windows are stored by themselves.

Whoever needs all windows evaluates the looks that are missing; a careful assertion stops where it
is decided. What was evaluated before changes neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.measuring.evaluation import (
    comparable_head,
    evaluate,
    evaluate_engine,
    evaluate_streamed,
)
from pytest_qlab.measuring.parts import PackedParts
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.metrics.tokens import TokenArrays

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate

CODE_VERSION = 3
TOKENS = "tokens.safetensors"
FACTS = "facts.json"


class StoredEvaluation:
    """Per-token comparisons of one candidate with the base model, as far as they are wanted."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._parts: list[TokenArrays] = []
        self._facts: dict[str, Any] = {}

    def windows(self) -> list[int]:
        """How many windows each look and all before it have; the base model may run for it."""
        counts = [len(numbers) for numbers in self._candidate.lab.looks]
        return [sum(counts[: place + 1]) for place in range(len(counts))]

    def upto(self, look: int) -> Fidelity:
        """All measures on the windows of a look and all before it; runs what was not run yet."""
        candidate, lab = self._candidate, self._candidate.lab
        with ExitStack() as stack:
            opened: list[Callable[[int, Path], TokenArrays]] = []

            def run(number: int, states: Path) -> TokenArrays:
                if not opened:
                    opened.append(self._open(stack))
                return opened[0](number, states)

            for number in range(len(self._parts), look + 1):
                self._parts.append(self._read(number, run))
        tokens = TokenArrays.joined(self._parts[: look + 1], lab.looks[: look + 1])
        return Fidelity(
            tokens,
            domains=self._facts["domains"],
            candidate=candidate.id,
            convention=self._facts["convention"],
            name=lab.evaluation.name,
            floor=lambda: lab.noise_floor.by_metric,
        )

    def _read(self, look: int, run: Callable[[int, Path], TokenArrays]) -> TokenArrays:
        candidate, lab = self._candidate, self._candidate.lab
        parts = {
            "reference": lab.reference.part(look),
            "quantized": lab.quantized_identity(candidate.method),
            "code": CODE_VERSION,
        }

        def build(directory: Path) -> None:
            lab.progress(f"{candidate.id}: evaluating")
            save_file(run(look, directory / "states").to_tensors(), directory / TOKENS)
            facts = {
                "domains": [domain for _, domain in lab.eval_data.documents],
                "convention": lab.evaluation.convention,
            }
            (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")

        directory = lab.store.get("fidelity", parts, build, Path)
        self._facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        return TokenArrays.from_tensors(load_file(directory / TOKENS))

    def _open(self, stack: ExitStack) -> Callable[[int, Path], TokenArrays]:
        """What evaluates a look: the runtime that the method brings, or the packed model.

        It is told where hidden states may be written, which are no part of the entry.
        """
        candidate, lab, lazy = self._candidate, self._candidate.lab, self._candidate.lab.lazy
        engine = candidate.engine(threads=lab.threads)
        if engine is not None:
            opened = stack.enter_context(engine)
            return lambda look, _: evaluate_engine(lab, opened, look)
        if lazy is not None:

            def progress(line: str) -> None:
                lab.progress(f"{candidate.id}: evaluating, {line}")

            return lambda look, states: evaluate_streamed(
                lab, PackedParts(lazy, candidate.checkpoint), look, states, progress
            )
        stack.callback(set_materialized, candidate.model, False)
        set_materialized(candidate.model, True)
        head = comparable_head(lab, candidate.model)
        return lambda look, _: evaluate(lab, head, look)
