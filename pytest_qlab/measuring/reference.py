"""The base model's side of every comparison: its predictions on the evaluation windows, stored."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from pytest_qlab.measuring.forward import predict
from pytest_qlab.models.head import Head, head_of
from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.lab import Lab

FACTS = "facts.json"
PREDICTIONS = "predictions.safetensors"
CODE_VERSION = 2


class Reference:
    """What the base model predicts; computed once for all candidates, workers and runs."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def identity(self) -> dict[str, Any]:
        """What determines the base model's predictions, as plain JSON types."""
        return {
            **self._lab.base_identity(),
            "evaluation": self._lab.evaluation.identity,
            "code": CODE_VERSION,
        }

    def part(self, look: int) -> dict[str, Any]:
        """`identity` of the windows that one look adds, which are an entry of their own."""
        return {**self.identity(), "look": look}

    def facts(self) -> dict[str, Any]:
        """Sizes of the model and the evaluation set, if the base model has been run already."""
        facts: dict[str, Any] = self._lab.store.peek("reference", self.part(0), FACTS) or {}
        return facts

    @cached_property
    def head(self) -> Head:
        """The base model's head."""
        return head_of(self._lab.base_model)

    def predictions(self) -> list[Tensor]:
        """For each window, the final hidden states or logits that predict its scored tokens."""
        found: dict[int, Tensor] = {}
        for look, numbers in enumerate(self._lab.looks):
            found.update(zip(numbers, self.predictions_of(look), strict=True))
        return [found[number] for number in sorted(found)]

    def predictions_of(self, look: int) -> list[Tensor]:
        """The same for the windows that one look adds, in their order."""
        directory = self._lab.store.get(
            "reference", self.part(look), lambda path: self._build(path, look), Path
        )
        joined = load_file(directory / PREDICTIONS)["predictions"]
        lengths = [window.scored for window in self._lab.windows_of(look)]
        return list(torch.split(joined, lengths))

    def _build(self, directory: Path, look: int) -> None:
        lab = self._lab
        windows = lab.windows_of(look)
        found = []
        head = self.head
        run = ordered_map(lambda window: predict(head, window), windows, lab.threads)
        for number, each in enumerate(run, 1):
            found.append(each.cpu())
            if number % 16 == 0:
                lab.progress(f"base model: window {number}/{len(windows)}")
        lab.count_forwards(len(windows))
        save_file({"predictions": torch.cat(found)}, directory / PREDICTIONS)
        loaded = lab.loaded
        parameters = dict(loaded.model.named_parameters())
        facts = {
            "model": {
                "architecture": type(loaded.model).__name__,
                "parameters": sum(each.numel() for each in parameters.values()),
                "bytes": loaded.nbytes,
            },
            "evaluation": {
                "convention": lab.evaluation.convention,
                "windows": len(lab.eval_data.windows),
                "documents": len({window.document for window in lab.eval_data.windows}),
                "tokens": lab.eval_data.scored,
            },
        }
        (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")
