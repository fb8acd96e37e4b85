"""A candidate: one method's model beside the base model, measured when asked.

Every measure is computed once, kept in the store, and shared by all workers and later runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qlab.checkpoint import Checkpoint, instantiate
from pytest_qlab.decision import Look
from pytest_qlab.directions import END_TO_END, split_domain
from pytest_qlab.errors import MethodError, MetricError, did_you_mean
from pytest_qlab.estimate import Estimate
from pytest_qlab.gate.deferred import DeferredKl, deferred
from pytest_qlab.measuring.attribution import CODE_VERSION as ATTRIBUTION_VERSION
from pytest_qlab.measuring.attribution import Attribution, Layer, affordable, attribute
from pytest_qlab.measuring.endtoend import Throughput, measure_serving, measure_throughput
from pytest_qlab.measuring.latency import Latency
from pytest_qlab.measuring.layers import LayerError, LayerErrors, measure_layers
from pytest_qlab.measuring.loadtimes import Loading, measure_loading
from pytest_qlab.measuring.memory import Memory
from pytest_qlab.measuring.runnable import (
    KernelUse,
    Runnable,
    kernel_use,
    known_kernel_use,
    runnable,
)
from pytest_qlab.measuring.stored import StoredEvaluation
from pytest_qlab.metrics.fidelity import Fidelity, KlEstimates
from pytest_qlab.metrics.serving import Limits, Load, Serving
from pytest_qlab.results import CandidateResult, LayerRow, Measure
from pytest_qlab.store import content_hash

if TYPE_CHECKING:
    from pytest_qlab.engines.base import Engine
    from pytest_qlab.lab import Lab
    from pytest_qlab.specs import MethodSpec

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
        self._fidelities: dict[int, Fidelity] = {}

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
        self.note(found.size.estimates(self.id))
        return found

    @cached_property
    def model(self) -> Any:
        """The quantized model, which runs its packed layers; a transformers causal LM."""
        return instantiate(self.checkpoint, self.lab.base_model)

    @cached_property
    def runnable(self) -> Runnable:
        """The quantized model as its speed is measured, and what runs its layers."""
        return runnable(self)

    @property
    def speed_model(self) -> Any:
        """The quantized model in bfloat16 (see `speed_dtype`), its bits run by real kernels."""
        return self.runnable.model

    @cached_property
    def kernels(self) -> KernelUse:
        """What runs the quantized layers where speed is measured, on this machine."""
        return kernel_use(self)

    def engine(self, *, threads: int = 1) -> Engine | None:
        """The runtime that the method brings, with the packed model open in it; mostly None.

        To be closed by the caller.
        """
        return self.method.engine(self.checkpoint.directory, threads=threads)

    @property
    def is_baseline(self) -> bool:
        """Whether this is the base model itself."""
        return self.method.name == "none"

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
        if checkpoint.rotation is not None:
            raise MethodError(
                f"{self.id} rotates hidden states between the first and the last block, which a "
                "GGUF file cannot say. Write a method without a rotation."
            )
        return write_gguf(
            Path(path),
            self.lab.described,
            weights={name: layer.weight for name, layer in packed.items()},
            others=checkpoint.others(),
            file_type=str(getattr(self.method, "type", "")),
        )

    def release(self) -> None:
        """Let go of the models in memory; they are read again from the store when next used."""
        for each in ("model", "runnable"):
            self.__dict__.pop(each, None)

    # --- damage ----------------------------------------------------------------------------

    @cached_property
    def fidelity(self) -> Fidelity:
        """All measures of how far the candidate's predictions are from the base model's.

        They are of all windows, and computed now.
        """
        return self._fidelity_upto(len(self.lab.looks) - 1)

    @cached_property
    def evaluation(self) -> StoredEvaluation:
        """The comparisons with the base model, by look."""
        _ = self.checkpoint  # which notes the sizes
        return StoredEvaluation(self)

    def _fidelity_upto(self, look: int) -> Fidelity:
        """`fidelity` on the windows of a look and all before it."""
        if look not in self._fidelities:
            found = self.evaluation.upto(look)
            if look > max(self._fidelities, default=-1):  # The table shows the most that is known.
                # The base model's perplexity is the same for all; its own row has it.
                known = found.estimates()
                self.note({k: e for k, e in known.items() if not k.startswith("base_perplexity")})
            self._fidelities[look] = found
        return self._fidelities[look]

    def _deferred(self, metric: str, measure: Callable[[Fidelity], Estimate]) -> Estimate:
        """A measure of damage, which is computed when it is looked at."""

        def at(place: int) -> Callable[[], Estimate]:
            return lambda: measure(self._fidelity_upto(place))

        def looks() -> list[Look]:
            counts = self.evaluation.windows()
            return [Look(windows, at(place)) for place, windows in enumerate(counts)]

        return deferred(metric, self.id, looks, lambda: self.lab.evaluation.requested_convention)

    @property
    def perplexity(self) -> Estimate:
        """exp of the mean negative log-likelihood per scored token."""
        return self._deferred("perplexity", lambda found: found.perplexity)

    @property
    def perplexity_delta(self) -> Estimate:
        """Perplexity minus the base model's, paired."""
        return self._deferred("perplexity_delta", lambda found: found.perplexity_delta)

    @property
    def perplexity_ratio(self) -> Estimate:
        """Perplexity over the base model's, paired."""
        return self._deferred("perplexity_ratio", lambda found: found.perplexity_ratio)

    @property
    def log_perplexity_delta(self) -> Estimate:
        """ln of `perplexity_ratio`, nats per token."""
        return self._deferred("log_perplexity_delta", lambda found: found.log_perplexity_delta)

    @property
    def kl(self) -> KlEstimates:
        """KL(base || candidate) per token, nats: `mean`, `median`, `p99`, `max`, and `tail`."""
        return DeferredKl(
            mean=self._deferred("kl.mean", lambda found: found.kl.mean),
            median=self._deferred("kl.median", lambda found: found.kl.median),
            p99=self._deferred("kl.p99", lambda found: found.kl.p99),
            max=self._deferred("kl.max", lambda found: found.kl.max),
            tail=self._deferred("kl.tail", lambda found: found.kl.tail),
        )

    @property
    def top1_agreement(self) -> Estimate:
        """Share of tokens for which both models find the same token most likely."""
        return self._deferred("top1_agreement", lambda found: found.top1_agreement)

    @property
    def snr_db(self) -> Estimate:
        """Signal-to-noise ratio of the final hidden states, dB."""
        return self._deferred("snr_db", lambda found: found.hidden_snr_db)

    @property
    def cosine(self) -> Estimate:
        """Mean cosine between the final hidden states."""
        return self._deferred("cosine", lambda found: found.hidden_cosine)

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
        self.note(found.total.estimates(self.id))
        return found

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every quantized layer with its bits, its weights' SNR, its output error and its `kl`."""
        return tuple(
            Layer(**vars(each), _attribution=lambda: self.attribution)
            for each in self._layer_errors.layers
        )

    def _attribution_parts(self) -> dict[str, Any]:
        return {
            "reference": self.lab.reference.identity(),
            "quantized": self.lab.quantized_identity(self.method),
            "code": ATTRIBUTION_VERSION,
        }

    @cached_property
    def attribution(self) -> Attribution:
        """The error budget: the KL that each quantized layer causes alone, and all together."""
        checkpoint = self.checkpoint
        stored = self.lab.store.json(
            "attribution",
            self._attribution_parts(),
            lambda: attribute(self.lab, checkpoint).to_dict(),
        )
        return Attribution.from_dict(stored)

    def affordable_attribution(self) -> Attribution | None:
        """`attribution` if it is known, or costs no more than an evaluation does; for messages."""
        known = "attribution" in self.__dict__ or self.lab.store.has(
            "attribution", self._attribution_parts()
        )
        return self.attribution if known or affordable(self.lab, self.checkpoint) else None

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
        """`resident`, `peak`, `decode_peak`, `rss_peak`, `kv_per_token`, bytes."""
        return Memory(self)

    @cached_property
    def latency(self) -> Latency:
        """`p50`, `p90`, `p99` in seconds and `ratio`, paired with the base model, by phase.

        Of a prefill of 128 tokens; `prefill512`, `decode` and `decode512` have their own.
        """
        return Latency(self)

    # --- end to end ------------------------------------------------------------------------

    @cached_property
    def throughput(self) -> Throughput:
        """Tokens per second: `prefill`, `decode`, `prefill_ratio`, `decode_ratio`; paired."""
        found = measure_throughput(self)
        self.note(found.estimates)
        return found

    @cached_property
    def load(self) -> Loading:
        """`load.cold` and `load.warm`: seconds from disk to a model that can generate."""
        found = measure_loading(self)
        self.note(found.estimates)
        return found

    @property
    def first_generation(self) -> Estimate:
        """Seconds of the first token of the first call of a freshly loaded model."""
        return self.load.first_generation

    def serving(
        self,
        concurrency: int | None = None,
        *,
        rate: float | None = None,
        prompt_tokens: int = 64,
        new_tokens: int = 32,
        requests: int = 320,
        max_seconds: float = 60.0,
    ) -> Serving:
        """The candidate under load, served by transformers' continuous batching.

        Args:
            concurrency: so many clients, each of which sends its next request when its last is
                complete; 1 if no rate is given either.
            rate: instead, requests per second, at the times of a Poisson process.
            prompt_tokens, new_tokens: of each request; shorter where the context is.
            requests: how many count, after a warm-up; p99 takes 299.
            max_seconds: requests that are sent after this do not count.

        Raises:
            NotMeasuredError: the time ran out before any request counted.
            MetricError: the load is none, or more than can be served.
            EngineError: continuous batching cannot run this model.
        """
        if concurrency is None and rate is None:
            concurrency = 1
        found = measure_serving(
            self,
            Load(concurrency, rate),
            prompt=prompt_tokens,
            tokens=new_tokens,
            limits=Limits(requests=requests, seconds=max_seconds),
        )
        self.note(found.estimates)
        return found

    def _end_to_end(self, metric: str) -> Estimate:
        """A measure of speed end to end by its name, such as `serving.ttft.p50[4]`."""
        base, name = split_domain(metric)
        if base.startswith("serving."):
            load = Load.named(name)
            return self.serving(load.concurrency, rate=load.rate)[metric]
        if base.startswith("throughput."):
            return self._from(self.throughput.estimates, metric)
        return self.load.cold if base == "load.cold" else self._from(self.load.estimates, metric)

    # --- for the table ---------------------------------------------------------------------

    @property
    def evaluated(self) -> bool:
        """Whether the measures of damage are known on all windows; computes nothing."""
        return bool(self._fidelities) and max(self._fidelities) == len(self.lab.looks) - 1

    @property
    def measured(self) -> Mapping[str, Estimate]:
        """What was measured so far, by dotted name; computes nothing."""
        return self._measured

    def note(self, estimates: Mapping[str, Estimate]) -> None:
        """Show these in the table from now on."""
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
            return self.memory.named(metric)
        if metric.startswith("latency."):
            return self.latency.named(metric)
        if metric not in self._measured and metric.startswith(END_TO_END):
            return self._end_to_end(metric)
        if metric == "layer_error" or metric.startswith("weights."):
            return self._from(self._layer_errors.total.estimates(self.id), metric)
        if metric in _DEFERRED:
            return _DEFERRED[metric](self)
        if split_domain(metric)[1] and not metric.startswith(END_TO_END):
            # Of all windows, however few an assertion has drawn so far.
            return self._from(self.fidelity.estimates(), metric)
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
            kernels = known_kernel_use(self)
            result.kernel = str(kernels or checkpoint.kernel)
            result.simulated = (kernels or checkpoint).simulated
            result.seconds["quantize"] = checkpoint.seconds
            result.keys["quantized"] = checkpoint.directory.name
        errors: LayerErrors | None = self.__dict__.get("_layer_errors")
        attribution: Attribution | None = self.__dict__.get("attribution")
        if errors is not None:
            result.layers = [LayerRow(**vars(layer)) for layer in errors.layers]
        elif attribution is not None and checkpoint is not None:
            result.layers = [
                LayerRow(name=each.name, shape=each.shape, bits_per_weight=each.bits_per_weight)
                for each in checkpoint.size.layers
            ]
        if attribution is not None:
            for row in result.layers:
                row.kl = attribution.layers[row.name]
            result.additivity = attribution.summary()
        if self._fidelities:
            result.keys["reference"] = content_hash(self.lab.reference.identity())
        return result


# By name as by attribute: what is not of a single domain draws windows as they are needed.
_DEFERRED: dict[str, Callable[[Candidate], Estimate]] = {
    "perplexity": lambda candidate: candidate.perplexity,
    "perplexity_delta": lambda candidate: candidate.perplexity_delta,
    "perplexity_ratio": lambda candidate: candidate.perplexity_ratio,
    "log_perplexity_delta": lambda candidate: candidate.log_perplexity_delta,
    "kl.mean": lambda candidate: candidate.kl.mean,
    "kl.median": lambda candidate: candidate.kl.median,
    "kl.p99": lambda candidate: candidate.kl.p99,
    "kl.max": lambda candidate: candidate.kl.max,
    "kl.tail": lambda candidate: candidate.kl.tail,
    "top1_agreement": lambda candidate: candidate.top1_agreement,
    "snr_db": lambda candidate: candidate.snr_db,
    "cosine": lambda candidate: candidate.cosine,
}
