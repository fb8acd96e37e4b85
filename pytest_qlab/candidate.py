"""A candidate: one method's model beside the base model, measured when asked.

Every measure is computed once, kept in the store, and shared by all workers and later runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from pytest_qlab.checkpoint import Checkpoint, instantiate
from pytest_qlab.estimate import Estimate
from pytest_qlab.evaluation import evaluate
from pytest_qlab.kernels.linear import set_materialized
from pytest_qlab.layers import LayerErrors, measure_layers
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.metrics.size import Size
from pytest_qlab.results import CandidateResult, LayerRow, Measure
from pytest_qlab.speed import Latency, Memory, measure_latency, measure_memory

if TYPE_CHECKING:
    from pytest_qlab.lab import Lab
    from pytest_qlab.specs import MethodSpec

FIDELITY_VERSION = 1


class Divergence:
    """KL(base || candidate) per token, in nats: `mean`, `median`, `p99`, `max`."""

    def __init__(self, estimates: Mapping[str, Estimate]) -> None:
        self.mean = estimates["kl.mean"]
        self.median = estimates["kl.median"]
        self.p99 = estimates["kl.p99"]
        self.max = estimates["kl.max"]


class Candidate:
    """A quantized model and everything that is measured on it; what `quantized` yields."""

    def __init__(self, lab: Lab, spec: MethodSpec) -> None:
        self.lab = lab
        self.spec = spec
        self.method = spec.method
        self._measured: dict[str, Estimate] = {}

    def __repr__(self) -> str:
        return f"<Candidate {self.id}>"

    @property
    def id(self) -> str:
        """The method specification's id, such as `gptq-w4g128`."""
        return self.spec.id

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The packed model on disk."""
        found = self.lab.checkpoint(self.method)
        self._note(self._sizes(found).estimates(self.id))
        return found

    @cached_property
    def model(self) -> Any:
        """The quantized model, which runs its packed layers; a transformers causal LM."""
        return instantiate(self.checkpoint, self.lab.base_model)

    def release(self) -> None:
        """Let go of the model in memory."""
        self.__dict__.pop("model", None)

    @cached_property
    def fidelity(self) -> Fidelity:
        """All measures of how far the candidate's predictions are from the base model's."""
        checkpoint = self.checkpoint
        parts = {
            "reference": self.lab.reference.identity(),
            "quantized": self.lab.quantized_identity(self.method),
            "code": FIDELITY_VERSION,
        }

        def build(directory: Path) -> None:
            self.lab.progress(f"{self.id}: evaluating")
            set_materialized(self.model, True)
            try:
                found = evaluate(self.lab, self.model)
            finally:
                set_materialized(self.model, False)
            save_file(found.tensors, directory / "tokens.safetensors")
            (directory / "facts.json").write_text(json.dumps(found.facts), encoding="utf-8")

        directory = self.lab.store.get("fidelity", parts, build, Path)
        facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
        fidelity = Fidelity.from_tensors(
            load_file(directory / "tokens.safetensors"),
            candidate=self.id,
            convention=self.lab.evaluation.convention,
            domains=facts["domains"],
            name=self.lab.evaluation.name,
        )
        del checkpoint
        self._note(fidelity.estimates())
        return fidelity

    def _note(self, estimates: Mapping[str, Estimate]) -> None:
        self._measured.update(estimates)

    def __getitem__(self, metric: str) -> Estimate:
        """A measure by its dotted name, such as `kl.mean` or `perplexity_delta[code]`."""
        if metric not in self._measured:
            self.fidelity  # noqa: B018
        return self._measured[metric]
