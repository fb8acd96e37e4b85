"""The base model's side of every comparison: its predictions on the evaluation windows, stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from pytest_qlab.measuring.forward import predict
from pytest_qlab.measuring.parts import BaseParts
from pytest_qlab.measuring.streamed import predicting, prove
from pytest_qlab.models.head import Head, head_module, head_of, matrix_of
from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.data.windows import Window
    from pytest_qlab.lab import Lab
    from pytest_qlab.models.lazy import LazyModel

FACTS = "facts.json"
PREDICTIONS = "predictions.safetensors"
CODE_VERSION = 2
HEAD_VERSION = 1


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

    @property
    def head(self) -> Head:
        """The base model's head; its matrix is read each time if the model is read block by block.

        Raises:
            ModelError: the model is to be read block by block, and cannot be run like that.
        """
        lazy = self._lab.lazy
        if lazy is None:
            return self._loaded_head
        module = head_module(lazy.model)
        with lazy.resident(module, alone=True):
            weight, bias = matrix_of(module)
        return Head(lazy.model, weight, bias, **self._head_facts(lazy))

    @property
    def exact(self) -> bool:
        """Whether the base model's logits are made from its hidden states; reads no matrix."""
        lazy = self._lab.lazy
        return self._loaded_head.exact if lazy is None else bool(self._head_facts(lazy)["exact"])

    @cached_property
    def _loaded_head(self) -> Head:
        return head_of(self._lab.base_model)

    def _head_facts(self, lazy: LazyModel) -> dict[str, Any]:
        """What `head_of` finds out about the head of a model that is read block by block."""
        lab = self._lab
        parts = {**lab.base_identity(), "code": HEAD_VERSION}
        found: dict[str, Any] = lab.store.json("head", parts, lambda: prove(lazy, lab.progress))
        return found

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
        with self._predicting(windows, directory / "states") as one:
            run = ordered_map(one, range(len(windows)), lab.threads)
            for number, each in enumerate(run, 1):
                found.append(each.cpu())
                if number % 16 == 0:
                    lab.progress(f"base model: window {number}/{len(windows)}")
        lab.count_forwards(len(windows))
        save_file({"predictions": torch.cat(found)}, directory / PREDICTIONS)
        loaded = lab.described
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

    @contextmanager
    def _predicting(
        self, windows: Sequence[Window], states: Path
    ) -> Iterator[Callable[[int], Tensor]]:
        lab, lazy = self._lab, self._lab.lazy
        if lazy is None:
            head = self._loaded_head
            yield lambda place: predict(head, windows[place])
            return
        self._head_facts(lazy)  # which proves that the model can be run like that
        with predicting(
            BaseParts(lazy),
            windows,
            states,
            threads=lab.threads,
            progress=lambda line: lab.progress(f"base model: {line}"),
        ) as ended:
            yield ended.predict
