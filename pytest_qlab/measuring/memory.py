"""Memory of a candidate: its weights, what forward passes add, and what a process needs.

Of the model that speed is measured on, so that budgets on both speak of the same thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qlab.errors import MetricError, did_you_mean
from pytest_qlab.estimate import Estimate
from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.measuring.child import answer_of_child
from pytest_qlab.measuring.decoding import Decoding
from pytest_qlab.measuring.runnable import (
    KernelUse,
    dtype_name,
    kernel_use_parts,
    kernels_key,
    packed_job,
    speed_dtype_name,
)
from pytest_qlab.measuring.speed import forward, last_logits_only, prompt
from pytest_qlab.metrics.memory import (
    MemoryUse,
    kv_bytes_per_token,
    peak_temporary_bytes,
    resident_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.candidate import Candidate
    from pytest_qlab.engines.base import Engine

MEMORY_VERSION = 5
PROCESS_VERSION = 2
PROMPT_TOKENS = 128
NEW_TOKENS = 8
_NAMES = ("resident", "peak", "decode_peak", "rss_peak", "kv_per_token")


class Memory:
    """Bytes; `rss_peak` is measured when it is first read, all others at once.

    `dtype` is what the measured model computes in; empty if another runtime runs it.
    """

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        use = measure_memory(candidate)
        self.dtype = use.dtype
        self._counted = use.estimates(candidate.id, simulated=candidate.kernels.simulated)
        self._process: Estimate | None = None
        candidate.note(self._counted)

    @property
    def resident(self) -> Estimate:
        """Weights and buffers in memory."""
        return self._count("resident")

    @property
    def peak(self) -> Estimate:
        """Weights, and the most that a forward pass over the longest window has alive at once."""
        return self._count("peak")

    @property
    def decode_peak(self) -> Estimate:
        """Weights, a filled key-value cache, and the most that running one more token adds.

        Raises:
            MetricError: the model keeps no cache, or an engine does not tell.
        """
        return self._count("decode_peak")

    @property
    def kv_per_token(self) -> Estimate:
        """Bytes that one token adds to the key-value cache.

        Raises:
            MetricError: the configuration does not tell.
        """
        return self._count("kv_per_token")

    @property
    def rss_peak(self) -> Estimate:
        """The most that a fresh process has resident that loads the packed model and generates.

        Raises:
            MetricError: the process failed, or the system does not tell.
        """
        if self._process is None:
            self._process = measure_process(self._candidate)
            self._candidate.note({self._process.metric: self._process})
        return self._process

    def named(self, metric: str) -> Estimate:
        """A measure by its full name, such as `memory.peak`.

        Raises:
            MetricError: there is none of that name, or it is not defined for the model.
        """
        name = metric.removeprefix("memory.")
        if name not in _NAMES:
            known = [f"memory.{each}" for each in _NAMES]
            raise MetricError(f"There is no measure {metric!r}.{did_you_mean(metric, known)}")
        found: Estimate = getattr(self, name)
        return found

    def _count(self, name: str) -> Estimate:
        found = self._counted.get(f"memory.{name}")
        if found is None:
            raise MetricError(
                f"memory.{name} of {self._candidate.id} is not defined for this model: its "
                "configuration, or the engine that runs it, does not tell."
            )
        return found


def measure_memory(candidate: Candidate) -> MemoryUse:
    """Count the weights that are resident, and what forward passes add to them."""
    lab, kernels = candidate.lab, candidate.kernels

    def compute() -> dict[str, Any]:
        longest = max(len(window.ids) for window in lab.eval_data.windows)
        ids = prompt(lab, longest)
        engine = candidate.engine()
        if engine is not None:
            with engine:
                return _engine_memory(engine, ids)
        model, device, tokens = candidate.speed_model, lab.model.device, ids.shape[1]
        set_materialized(model, False)
        dtype = dtype_name(model)
        runs = f"{dtype}, {kernels}"
        found = MemoryUse(
            resident=resident_bytes(model),
            temporary=peak_temporary_bytes(forward(model, ids), device=device),
            convention=f"{runs}, forward of {tokens} tokens{_tiles(kernels, tokens)}",
            kv_bytes_per_token=_kv_bytes(model),
            decode_temporary=_decode_bytes(model, ids, device),
            decode_convention=f"{runs}, decode after {tokens - 1} tokens{_tiles(kernels, 1)}",
            dtype=dtype,
        )
        lab.count_forwards(3)
        return vars(found)

    return MemoryUse(**lab.store.json("memory", _parts(candidate, MEMORY_VERSION), compute))


def _parts(candidate: Candidate, code: int, **more: Any) -> dict[str, Any]:
    """What determines the memory: the kernels with their crossovers, which were found by timing."""
    return {
        **kernel_use_parts(candidate),
        "kernels": kernels_key(candidate),
        "evaluation": candidate.lab.evaluation.identity,
        "code": code,
        **more,
    }


def _tiles(kernels: KernelUse, rows: int) -> str:
    """In words how many layers dequantize tiles, because so many rows are too many for a kernel."""
    count = kernels.in_tiles(rows)
    return f", {count} layers in tiles" if count else ""


def _kv_bytes(model: Any) -> int | None:
    try:
        return kv_bytes_per_token(model.config, next(model.parameters()).element_size())
    except MetricError:
        return None


def _decode_bytes(model: Any, ids: Tensor, device: str) -> int | None:
    """What the cache of all tokens but the last, and the step that runs that, hold at once."""
    decoding: list[Decoding] = []

    def fill() -> None:
        decoding.append(Decoding(model, ids, **last_logits_only(model)))

    def step() -> object:
        return decoding[0].last_step()

    try:
        return peak_temporary_bytes(step, device=device, prepare=fill)
    except MetricError:
        return None


def _engine_memory(engine: Engine, ids: Tensor) -> dict[str, Any]:
    """What a forward pass in another runtime adds to its process and its weights."""
    engine.prefill(ids[0].tolist())
    return {
        "resident": engine.weight_bytes,
        "temporary": max(0, engine.peak_memory - engine.idle_memory - engine.weight_bytes),
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "convention": f"{engine.name}, forward of {ids.shape[1]} tokens",
    }


def measure_process(candidate: Candidate) -> Estimate:
    """`memory.rss_peak`: of a child process that loads the packed model and generates greedily.

    Raises:
        MetricError: the process failed, or the system does not tell.
    """
    lab, kernels = candidate.lab, candidate.kernels
    parts = _parts(candidate, PROCESS_VERSION, tokens=[PROMPT_TOKENS, NEW_TOKENS])

    def compute() -> dict[str, Any]:
        lab.progress(f"{candidate.id}: memory of a process")
        ids = prompt(lab, max(1, lab.model.fitting(PROMPT_TOKENS + NEW_TOKENS) - NEW_TOKENS))
        engine = candidate.engine()
        if engine is not None:
            with engine:
                engine.prefill(ids[0].tolist())
                return {
                    "peak": engine.peak_memory,
                    "idle": engine.idle_memory,
                    "convention": f"{engine.name}, prompt of {ids.shape[1]}",
                }
        found = _in_a_child(candidate, ids[0].tolist())
        dtype = speed_dtype_name(lab)
        convention = f"{dtype}, {kernels}, prompt of {ids.shape[1]}, {NEW_TOKENS} generated"
        return {**found, "convention": convention}

    found = lab.store.json("process_memory", parts, compute)
    return Estimate(
        found["peak"],
        metric="memory.rss_peak",
        candidate=candidate.id,
        unit="bytes",
        convention=found["convention"],
        simulated=kernels.simulated,
        detail=f"{found['idle']:,} bytes of it before the model was loaded",
    )


def _in_a_child(candidate: Candidate, ids: list[int]) -> dict[str, Any]:
    with packed_job(candidate) as job:
        found = answer_of_child(
            "pytest_qlab.measuring.generating",
            {**job, "ids": ids, "new": NEW_TOKENS},
            what=f"memory.rss_peak of {candidate.id}",
            instead="Hold memory.resident and memory.peak, which are counted in this process.",
        )
    if not found["peak"]:
        raise MetricError(
            "memory.rss_peak was not measured: this system does not say how much memory a process "
            "had at most. Hold memory.peak."
        )
    return found
