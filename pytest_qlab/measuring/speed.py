"""Latency and memory of a candidate, measured on the model that runs its packed layers."""

from __future__ import annotations

import inspect
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.estimate import Estimate
from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.machine import processor_name
from pytest_qlab.measuring.runnable import dtype_name
from pytest_qlab.metrics.latency import Clocks, LatencyQuantiles, PairedLatency, measure_pair
from pytest_qlab.metrics.memory import (
    MemoryUse,
    kv_bytes_per_token,
    peak_temporary_bytes,
    resident_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from pytest_qlab.candidate import Candidate
    from pytest_qlab.engines.base import Engine
    from pytest_qlab.lab import Lab

PREFILL_TOKENS = 128
ROUNDS = 400
MOST_SECONDS = 15.0
LATENCY_VERSION = 3
MEMORY_VERSION = 3


class Quantiles:
    """Latency of one model, in seconds."""

    def __init__(self, found: LatencyQuantiles) -> None:
        self._found = found

    @property
    def p50(self) -> Estimate:
        """Median."""
        return self._found.p50

    @property
    def p99(self) -> Estimate:
        """99th percentile.

        Raises:
            MetricError: there are too few samples to bound it.
        """
        if self._found.p99 is None:
            raise MetricError(
                f"The 99th percentile of the latency was not measured: {self._found.p99_reason}."
            )
        return self._found.p99


class Latency(Quantiles):
    """Latency of a forward pass, paired with the base model's: `p50`, `p99`, `ratio`, `baseline`.

    `ratio` is the candidate's median over the base model's, from rounds that time both in turn.
    """

    def __init__(self, paired: PairedLatency) -> None:
        super().__init__(paired.candidate)
        self.paired = paired
        self.ratio = paired.ratio
        self.baseline = Quantiles(paired.baseline)


class Memory:
    """Bytes: `resident` weights, `peak` of a forward pass, `kv_per_token`."""

    def __init__(self, use: MemoryUse, candidate: str, *, simulated: bool) -> None:
        self.estimates = use.estimates(candidate, simulated=simulated)
        self.resident = self.estimates["memory.resident"]
        self.peak = self.estimates["memory.peak"]

    @property
    def kv_per_token(self) -> Estimate:
        """Bytes that one token adds to the key-value cache."""
        return self.estimates["memory.kv_per_token"]


def _prompt(lab: Lab, tokens: int) -> Tensor:
    ids: list[int] = []
    for window in lab.eval_data.windows:
        ids += window.ids[len(ids) and 1 :]
        if len(ids) >= tokens:
            break
    return torch.tensor([ids[:tokens]], device=lab.model.device)


def _forward(model: Any, ids: Tensor, **options: Any) -> Callable[[], object]:
    cuda = ids.device.type == "cuda"

    def run() -> object:
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=False, **options)
            if cuda:
                torch.cuda.synchronize(ids.device)
        return output

    return run


def _prefill(model: Any, ids: Tensor) -> Callable[[], object]:
    """A forward pass that ends in the logits of the next token alone, where the model can."""
    takes = inspect.signature(model.forward).parameters
    return _forward(model, ids, **({"logits_to_keep": 1} if "logits_to_keep" in takes else {}))


@contextmanager
def _runner(candidate: Candidate, ids: Tensor) -> Iterator[tuple[Callable[[], object], Clocks]]:
    """A prefill of the candidate, and clocks that count the CPU time of its engine, too."""
    engine, here = candidate.engine(), Clocks()
    if engine is None:
        yield _prefill(candidate.speed_model, ids), here
        return
    tokens = ids[0].tolist()
    with engine:
        clocks = Clocks(
            cpu=lambda: here.cpu() + engine.cpu_ns,
            switches=lambda: here.switches() + engine.switches,
        )
        yield lambda: engine.prefill(tokens), clocks


def measure_latency(candidate: Candidate) -> PairedLatency:
    """Time forward passes of the candidate and of the base model, in turn, alone on this machine.

    Raises:
        NotMeasuredError: the machine was disturbed, or the kernel is simulated and the policy is
            to skip.
        MetricError: the kernel is simulated and the policy is to fail.
    """
    lab = candidate.lab
    kernels, wanted = candidate.kernels, candidate.kernels.wanted
    if wanted and lab.simulated_latency != "flag":
        message = (
            f"The latency of {candidate.id} is not a claim that can be made: of its layers, "
            f"{kernels.dequantizing} dequantize before they multiply ({kernels}). It would need "
            f"{' and '.join(wanted)}. Pass "
            "--qlab-simulated-latency=flag to measure it all the same, marked as simulated."
        )
        raise (NotMeasuredError if lab.simulated_latency == "skip" else MetricError)(message)
    threads = 1
    parts = {
        "quantized": lab.quantized_identity(candidate.method),
        "evaluation": lab.evaluation.identity,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "code": LATENCY_VERSION,
    }

    def compute() -> dict[str, Any]:
        ids = _prompt(lab, lab.model.fitting(PREFILL_TOKENS))
        lab.store.root.mkdir(parents=True, exist_ok=True)
        with FileLock(lab.store.root / ".latency.lock"), _runner(candidate, ids) as (run, clocks):
            lab.progress(f"{candidate.id}: latency")
            found = measure_pair(
                _prefill(lab.speed_base, ids),
                run,
                rounds=ROUNDS,
                threads=threads,
                clocks=clocks,
                max_seconds=MOST_SECONDS,
                candidate_id=candidate.id,
                convention=f"prefill{ids.shape[1]}-{dtype_name(lab.speed_base)}",
                simulated=bool(wanted),
            )
        lab.count_forwards(2 * len(found.rounds))
        found.usable()  # A disturbed measurement is raised over, not stored.
        return found.to_dict()

    return PairedLatency.from_dict(lab.store.json("latency", parts, compute))


def _engine_memory(engine: Engine, ids: Tensor) -> dict[str, Any]:
    """What a forward pass in another runtime adds to its process and its weights."""
    engine.prefill(ids[0].tolist())
    return {
        "resident": engine.weight_bytes,
        "temporary": max(0, engine.peak_memory - engine.idle_memory - engine.weight_bytes),
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "convention": f"{engine.name}, forward of {ids.shape[1]} tokens",
    }


def measure_memory(candidate: Candidate) -> Memory:
    """Count the weights that are resident, and what one forward pass over a window adds."""
    lab = candidate.lab
    parts = {
        "quantized": lab.quantized_identity(candidate.method),
        "evaluation": lab.evaluation.identity,
        "code": MEMORY_VERSION,
    }

    def compute() -> dict[str, Any]:
        longest = max(len(window.ids) for window in lab.eval_data.windows)
        ids = _prompt(lab, longest)
        engine = candidate.engine()
        if engine is not None:
            with engine:
                return _engine_memory(engine, ids)
        model = candidate.model
        set_materialized(model, False)
        temporary = peak_temporary_bytes(_forward(model, ids), device=lab.model.device)
        lab.count_forwards()
        try:
            kv = kv_bytes_per_token(model.config, next(model.parameters()).element_size())
        except MetricError:
            kv = None
        return {
            "resident": resident_bytes(model),
            "temporary": temporary,
            "kv_bytes_per_token": kv,
            "convention": f"{lab.model.dtype}, forward of {ids.shape[1]} tokens",
        }

    use = MemoryUse(**lab.store.json("memory", parts, compute))
    return Memory(use, candidate.id, simulated=candidate.checkpoint.simulated)
