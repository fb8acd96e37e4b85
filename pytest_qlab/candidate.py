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
from pytest_qlab.errors import MethodError, MetricError, did_you_mean
from pytest_qlab.estimate import Estimate
from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.measuring.evaluation import evaluate, evaluate_engine
from pytest_qlab.measuring.layers import LayerError, LayerErrors, measure_layers
from pytest_qlab.measuring.speed import Latency, Memory, measure_latency, measure_memory
from pytest_qlab.metrics.fidelity import Fidelity, KlEstimates
from pytest_qlab.results import CandidateResult, LayerRow, Measure
from pytest_qlab.store import content_hash

if TYPE_CHECKING:
    from pytest_qlab.engines.base import Engine
    from pytest_qlab.lab import Lab
    from pytest_qlab.metrics.tokens import TokenArrays
    from pytest_qlab.specs import MethodSpec

FIDELITY_VERSION = 2
LAYERS_VERSION = 1


class WeightMeasures:
    """`snr_db` and `cosine` of all quantized weights, against the original ones."""

    def __init__(self, estimates: Mapping[str, Estimate]) -> None:
        self.snr_db = estimates["weights.snr_db"]
        self.cosine = estimates["weights.cosine"]


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

    # --- the model -------------------------------------------------------------------------

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The packed model on disk."""
        found = self.lab.checkpoint(self.method)
        self._note(found.size.estimates(self.id))
        return found

    @cached_property
    def model(self) -> Any:
        """The quantized model, which runs its packed layers; a transformers causal LM."""
        return instantiate(self.checkpoint, self.lab.base_model)

    def engine(self, *, threads: int = 1) -> Engine | None:
        """The runtime that the method brings, with the packed model open in it; mostly None.

        To be closed by the caller.
        """
        return self.method.engine(self.checkpoint.directory, threads=threads)

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.lab.tokenizer

    def save_gguf(self, path: str | Path) -> tuple[str, ...]:
        """Write the packed model as a GGUF file that llama.cpp loads; nothing is rounded.

        Returns:
            Sentences on what llama.cpp will do otherwise when it tokenizes text itself.

        Raises:
            MissingExtraError: the package `gguf` is not installed.
            MethodError: no type of a GGUF file holds the values of some layer.
            ModelError: the architecture or the tokenizer cannot be expressed.
            StoreError: the file cannot be written.
        """
        from pytest_qlab.engines.gguf.writer import write_gguf

        checkpoint = self.checkpoint
        packed = {**checkpoint.layers(), **checkpoint.embeddings()}
        rounded = next((name for name, layer in packed.items() if layer.activation), None)
        if rounded is not None:
            raise MethodError(
                f"{self.id} quantizes the inputs of {rounded}, which a GGUF file cannot say. Write "
                "a method that quantizes weights alone."
            )
        return write_gguf(
            Path(path),
            self.lab.loaded,
            weights={name: layer.weight for name, layer in packed.items()},
            others=checkpoint.others(),
            file_type=str(getattr(self.method, "type", "")),
        )

    def release(self) -> None:
        """Let go of the model in memory; it is read again from the store when next used."""
        self.__dict__.pop("model", None)

    # --- damage ----------------------------------------------------------------------------

    @cached_property
    def fidelity(self) -> Fidelity:
        """All measures of how far the candidate's predictions are from the base model's."""
        lab = self.lab
        _ = self.checkpoint  # which notes the sizes
        parts = {
            "reference": lab.reference.identity(),
            "quantized": lab.quantized_identity(self.method),
            "code": FIDELITY_VERSION,
        }

        def build(directory: Path) -> None:
            lab.progress(f"{self.id}: evaluating")
            tokens = self._evaluate()
            save_file(tokens.to_tensors(), directory / "tokens.safetensors")
            facts = {
                "domains": [domain for _, domain in lab.eval_data.documents],
                "convention": lab.evaluation.convention,
            }
            (directory / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

        directory = lab.store.get("fidelity", parts, build, Path)
        facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
        fidelity = Fidelity.from_tensors(
            load_file(directory / "tokens.safetensors"),
            domains=facts["domains"],
            candidate=self.id,
            convention=facts["convention"],
            name=lab.evaluation.name,
        )
        # The base model's perplexity is the same for all; its own row has it.
        found = fidelity.estimates()
        self._note({k: e for k, e in found.items() if not k.startswith("base_perplexity")})
        return fidelity

    def _evaluate(self) -> TokenArrays:
        engine = self.engine(threads=self.lab.threads)
        if engine is not None:
            with engine:
                return evaluate_engine(self.lab, engine)
        set_materialized(self.model, True)
        try:
            return evaluate(self.lab, self.model)
        finally:
            set_materialized(self.model, False)

    @property
    def perplexity(self) -> Estimate:
        """exp of the mean negative log-likelihood per scored token."""
        return self.fidelity.perplexity

    @property
    def perplexity_delta(self) -> Estimate:
        """Perplexity minus the base model's, paired."""
        return self.fidelity.perplexity_delta

    @property
    def perplexity_ratio(self) -> Estimate:
        """Perplexity over the base model's, paired."""
        return self.fidelity.perplexity_ratio

    @property
    def log_perplexity_delta(self) -> Estimate:
        """ln of `perplexity_ratio`, nats per token."""
        return self.fidelity.log_perplexity_delta

    @property
    def kl(self) -> KlEstimates:
        """KL(base || candidate) per token, nats: `mean`, `median`, `p99`, `max`."""
        return self.fidelity.kl

    @property
    def top1_agreement(self) -> Estimate:
        """Share of tokens for which both models find the same token most likely."""
        return self.fidelity.top1_agreement

    @property
    def snr_db(self) -> Estimate:
        """Signal-to-noise ratio of the final hidden states, dB."""
        return self.fidelity.hidden_snr_db

    @property
    def cosine(self) -> Estimate:
        """Mean cosine between the final hidden states."""
        return self.fidelity.hidden_cosine

    def domain(self, name: str) -> Fidelity:
        """The measures of damage on one domain of the evaluation text, such as `code`."""
        return self.fidelity.domain(name)

    # --- layers ----------------------------------------------------------------------------

    def _layer_parts(self) -> dict[str, Any]:
        return {
            "quantized": self.lab.quantized_identity(self.method),
            "calibration": self.lab.calibration_input.identity,
            "code": LAYERS_VERSION,
        }

    @cached_property
    def _layer_errors(self) -> LayerErrors:
        checkpoint = self.checkpoint
        stored = self.lab.store.json(
            "layers",
            self._layer_parts(),
            lambda: measure_layers(self.lab, checkpoint).to_dict(),
        )
        found = LayerErrors.from_dict(stored)
        self._note(found.total.estimates(self.id))
        return found

    @property
    def layers(self) -> tuple[LayerError, ...]:
        """Every quantized layer with its bits, its weights' SNR and its output error."""
        return self._layer_errors.layers

    def worst_layers(self, count: int = 3) -> list[LayerError]:
        """The layers with the largest output error, if layers were measured before; else none.

        For messages: it computes nothing.
        """
        errors: LayerErrors | None = self.__dict__.get("_layer_errors")
        if errors is None:
            stored = self.lab.store.peek("layers", self._layer_parts())
            if stored is None:
                return []
            errors = LayerErrors.from_dict(stored)
        reached = [layer for layer in errors.layers if layer.output_error]
        return sorted(reached, key=lambda layer: layer.output_error or 0.0, reverse=True)[:count]

    @property
    def weights(self) -> WeightMeasures:
        """`weights.snr_db` and `weights.cosine`, over all quantized weights."""
        return WeightMeasures(self._layer_errors.total.estimates(self.id))

    @property
    def layer_error(self) -> Estimate:
        """Squared error of all layers' outputs on calibration inputs, relative to the outputs."""
        return self._from(self._layer_errors.total.estimates(self.id), "layer_error")

    # --- size, memory, speed ---------------------------------------------------------------

    @property
    def size(self) -> Estimate:
        """Bytes of everything that has to be stored."""
        return self._from(self.checkpoint.size.estimates(self.id), "size")

    @property
    def compression_ratio(self) -> Estimate:
        """Bytes of the base model's checkpoint over `size`."""
        return self._from(self.checkpoint.size.estimates(self.id), "compression_ratio")

    @property
    def bits_per_weight(self) -> Estimate:
        """Stored bits for each weight of the quantized linear layers."""
        return self._from(self.checkpoint.size.estimates(self.id), "bits_per_weight")

    @property
    def model_bits_per_weight(self) -> Estimate:
        """Stored bits for each parameter of the whole model."""
        return self._from(self.checkpoint.size.estimates(self.id), "model_bits_per_weight")

    @cached_property
    def memory(self) -> Memory:
        """`memory.resident`, `memory.peak`, `memory.kv_per_token`, bytes."""
        found = measure_memory(self)
        self._note(found.estimates)
        return found

    @cached_property
    def latency(self) -> Latency:
        """`latency.p50`, `latency.p99`, `latency.ratio`; seconds, paired with the base model."""
        paired = measure_latency(self)
        self._note(paired.estimates())
        return Latency(paired)

    # --- for the table ---------------------------------------------------------------------

    def _note(self, estimates: Mapping[str, Estimate]) -> None:
        self._measured.update(estimates)

    def _from(self, estimates: Mapping[str, Estimate], metric: str) -> Estimate:
        if metric not in estimates:
            raise MetricError(
                f"{metric} of {self.id} is not defined for this model."
                f"{did_you_mean(metric, estimates)}"
            )
        return estimates[metric]

    def __getitem__(self, metric: str) -> Estimate:
        """A measure by its dotted name, such as `kl.mean` or `perplexity_delta[code]`."""
        if metric not in self._measured and metric.startswith("memory."):
            return self._from(self.memory.estimates, metric)
        if metric not in self._measured and metric.startswith("latency."):
            return self._from(self.latency.paired.estimates(), metric)
        if metric == "layer_error" or metric.startswith("weights."):
            return self._from(self._layer_errors.total.estimates(self.id), metric)
        _ = self.checkpoint  # which notes the sizes
        if metric not in self._measured:
            found = {
                **self._measured,
                **self.fidelity.estimates(),
                **self._layer_errors.total.estimates(self.id),
            }
            return self._from(found, metric)
        return self._measured[metric]

    def fragment(self) -> CandidateResult:
        """Everything measured so far, for the results document; computes nothing."""
        measures = {
            name: Measure(**each.to_dict()) for name, each in sorted(self._measured.items())
        }
        result = CandidateResult(
            id=self.id,
            method=self.method.name,
            options=self.method.model_dump(mode="json"),
            measures=measures,
        )
        checkpoint: Checkpoint | None = self.__dict__.get("checkpoint")
        if checkpoint is not None:
            result.kernel = checkpoint.kernel
            result.simulated = checkpoint.simulated
            result.seconds["quantize"] = checkpoint.seconds
            result.keys["quantized"] = checkpoint.directory.name
        errors: LayerErrors | None = self.__dict__.get("_layer_errors")
        if errors is not None:
            result.layers = [LayerRow(**vars(layer)) for layer in errors.layers]
        if "fidelity" in self.__dict__:
            result.keys["reference"] = content_hash(self.lab.reference.identity())
        return result
