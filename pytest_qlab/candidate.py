"""A candidate: one method's model beside the base model, measured when asked.

Every measure is computed once, kept in the store, and shared by all workers and later runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qlab.checkpoint import Checkpoint, instantiate
from pytest_qlab.estimate import Estimate
from pytest_qlab.gate.deferred import DeferredKl
from pytest_qlab.measuring.attribution import Attribution, Layer
from pytest_qlab.measuring.bylayer import ByLayer, WeightMeasures
from pytest_qlab.measuring.damage import Damage
from pytest_qlab.measuring.endtoend import Throughput, measure_serving, measure_throughput
from pytest_qlab.measuring.latency import Latency
from pytest_qlab.measuring.layers import LayerError
from pytest_qlab.measuring.loadtimes import Loading, measure_loading
from pytest_qlab.measuring.memory import Memory
from pytest_qlab.measuring.named import defined, named_measure
from pytest_qlab.measuring.row import row_of
from pytest_qlab.measuring.runnable import KernelUse, Runnable, kernel_use, runnable
from pytest_qlab.measuring.stored import StoredEvaluation
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.metrics.kl import KlEstimates
from pytest_qlab.metrics.serving import Limits, Load, Serving
from pytest_qlab.results import CandidateResult

if TYPE_CHECKING:
    from pytest_qlab.engines.base import Engine
    from pytest_qlab.lab import Lab
    from pytest_qlab.specs import MethodSpec


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
        self.note(found.size.estimates(self.id))
        return found

    @cached_property
    def model(self) -> Any:
        """The quantized model, which runs its packed layers; a transformers causal LM.

        Raises:
            MetricError: the base model is read block by block.
        """
        self.lab.check_whole("Quantized models to be run as a whole")
        return instantiate(self.checkpoint, self.lab.base_model)

    @cached_property
    def runnable(self) -> Runnable:
        """The quantized model as its speed and memory are measured, and what runs its layers."""
        return runnable(self)

    @property
    def speed_model(self) -> Any:
        """The quantized model in bfloat16 (see `speed_dtype`), its bits run by real kernels."""
        return self.runnable.model

    @cached_property
    def kernels(self) -> KernelUse:
        """What runs the quantized layers where speed and memory are measured, on this machine."""
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

        What a file cannot hold is refused before anything is quantized, as far as it shows then.

        Returns:
            Sentences on what llama.cpp will do otherwise when it tokenizes text itself.

        Raises:
            MissingExtraError: the package `gguf` is not installed.
            MethodError: no type of a GGUF file holds the values of some layer.
            ModelError: the architecture or the tokenizer cannot be expressed.
            StoreError: the file cannot be written.
        """
        from pytest_qlab.exporting import save_gguf

        return save_gguf(self, Path(path))

    def release(self) -> None:
        """Let go of the models in memory; they are read again from the store when next used."""
        for each in ("model", "runnable"):
            self.__dict__.pop(each, None)

    # --- damage ----------------------------------------------------------------------------

    @cached_property
    def evaluation(self) -> StoredEvaluation:
        """The comparisons with the base model, by look."""
        _ = self.checkpoint  # which notes the sizes
        return StoredEvaluation(self)

    @cached_property
    def _damage(self) -> Damage:
        return Damage(self)

    @property
    def fidelity(self) -> Fidelity:
        """All measures of how far the candidate's predictions are from the base model's.

        They are of all windows, and computed now.
        """
        return self._damage.upto(len(self.lab.looks) - 1)

    @property
    def perplexity(self) -> Estimate:
        """exp of the mean negative log-likelihood per scored token."""
        return self._damage.measure("perplexity")

    @property
    def perplexity_delta(self) -> Estimate:
        """Perplexity minus the base model's, paired."""
        return self._damage.measure("perplexity_delta")

    @property
    def perplexity_ratio(self) -> Estimate:
        """Perplexity over the base model's, paired."""
        return self._damage.measure("perplexity_ratio")

    @property
    def log_perplexity_delta(self) -> Estimate:
        """ln of `perplexity_ratio`, nats per token."""
        return self._damage.measure("log_perplexity_delta")

    @property
    def kl(self) -> KlEstimates:
        """KL(base || candidate) per token, nats: `mean`, `median`, `p99`, `max`, and `tail`."""
        return DeferredKl(
            mean=self._damage.measure("kl.mean"),
            median=self._damage.measure("kl.median"),
            p99=self._damage.measure("kl.p99"),
            max=self._damage.measure("kl.max"),
            tail=self._damage.measure("kl.tail"),
        )

    @property
    def top1_agreement(self) -> Estimate:
        """Share of tokens for which both models find the same token most likely."""
        return self._damage.measure("top1_agreement")

    @property
    def snr_db(self) -> Estimate:
        """Signal-to-noise ratio of the final hidden states, dB."""
        return self._damage.measure("snr_db")

    @property
    def cosine(self) -> Estimate:
        """Mean cosine between the final hidden states."""
        return self._damage.measure("cosine")

    def domain(self, name: str) -> Fidelity:
        """The measures of damage on one domain of the evaluation text, such as `code`."""
        return self.fidelity.domain(name)

    # --- layers ----------------------------------------------------------------------------

    @cached_property
    def _by_layer(self) -> ByLayer:
        return ByLayer(self)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every quantized layer with its bits, its weights' SNR, its output error and its `kl`."""
        return self._by_layer.layers

    @property
    def attribution(self) -> Attribution:
        """The error budget: the KL that each quantized layer causes alone, and all together."""
        return self._by_layer.attribution

    def affordable_attribution(self) -> Attribution | None:
        """`attribution` if it is known, or costs no more than an evaluation does; for messages."""
        return self._by_layer.affordable_attribution()

    def worst_layers(self, count: int = 3) -> list[LayerError]:
        """The layers with the largest output error, if layers were measured before; else none.

        For messages: it computes nothing.
        """
        return self._by_layer.worst(count)

    @property
    def weights(self) -> WeightMeasures:
        """`weights.snr_db` and `weights.cosine`, over all quantized weights."""
        return WeightMeasures(self._by_layer.estimates())

    @property
    def layer_error(self) -> Estimate:
        """Squared error of all layers' outputs on calibration inputs, relative to the outputs."""
        return defined(self._by_layer.estimates(), "layer_error", self.id)

    # --- size, memory, speed ---------------------------------------------------------------

    @property
    def size(self) -> Estimate:
        """Bytes of everything that has to be stored."""
        return defined(self.checkpoint.size.estimates(self.id), "size", self.id)

    @property
    def compression_ratio(self) -> Estimate:
        """Bytes of the base model's checkpoint over `size`."""
        return defined(self.checkpoint.size.estimates(self.id), "compression_ratio", self.id)

    @property
    def bits_per_weight(self) -> Estimate:
        """Stored bits for each weight of the quantized linear layers."""
        return defined(self.checkpoint.size.estimates(self.id), "bits_per_weight", self.id)

    @property
    def model_bits_per_weight(self) -> Estimate:
        """Stored bits for each parameter of the whole model."""
        return defined(self.checkpoint.size.estimates(self.id), "model_bits_per_weight", self.id)

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

    # --- for the table ---------------------------------------------------------------------

    @property
    def evaluated(self) -> bool:
        """Whether the measures of damage are known on all windows; computes nothing."""
        return self._damage.complete

    @property
    def measured(self) -> Mapping[str, Estimate]:
        """What was measured so far, by dotted name; computes nothing."""
        return self._measured

    def note(self, estimates: Mapping[str, Estimate]) -> None:
        """Show these in the table from now on."""
        self._measured.update(estimates)

    def __getitem__(self, metric: str) -> Estimate:
        """A measure by its dotted name, such as `kl.mean` or `perplexity_delta[code]`."""
        return named_measure(self, metric, damage=self._damage, layers=self._by_layer)

    def fragment(self) -> CandidateResult:
        """Everything measured so far, for the results document; computes nothing."""
        return row_of(self, damage=self._damage, layers=self._by_layer)
