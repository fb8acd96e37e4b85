"""Time a candidate beside the base model, on the model that runs its packed layers."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from pytest_qlab.errors import NotMeasuredError
from pytest_qlab.kernels.packed import PackedModule, set_materialized
from pytest_qlab.machine import processor_of
from pytest_qlab.measuring.decoding import Decoding
from pytest_qlab.measuring.runnable import dtype_name, kernels_key
from pytest_qlab.metrics.latency import Clocks, PairedLatency, measure_pair
from pytest_qlab.metrics.memory import resident_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.candidate import Candidate
    from pytest_qlab.engines.base import Engine
    from pytest_qlab.lab import Lab

ROUNDS = 400
MOST_SECONDS = 15.0
FLOOR_ROUNDS = 100
FLOOR_SECONDS = 5.0
COPIED_BYTES = 2**31
THREADS = 1
LATENCY_VERSION = 5


@dataclass(frozen=True)
class Phase:
    """What is timed: a prefill of `tokens`, or one token after that many (`decodes`).

    `prefix` comes after `latency.` in the names of its measures.
    """

    prefix: str
    tokens: int
    decodes: bool = False


PREFILL = Phase("", 128)
PHASES: Mapping[str, Phase] = {
    "prefill": PREFILL,
    "prefill512": Phase("prefill512.", 512),
    "decode": Phase("decode.", 128, decodes=True),
    "decode512": Phase("decode512.", 512, decodes=True),
}


def text_tokens(lab: Lab, most: int | None = None) -> list[int]:
    """The evaluation text's first tokens, window after window, each without its first but one."""
    ids: list[int] = []
    for window in lab.eval_data.windows:
        ids += window.ids[len(ids) and 1 :]
        if most is not None and len(ids) >= most:
            break
    return ids[:most]


def prompt(lab: Lab, tokens: int) -> Tensor:
    """The first tokens of the evaluation text (1, n), fewer where there are no more."""
    return torch.tensor([text_tokens(lab, tokens)], device=lab.model.device)


def forward(model: Any, ids: Tensor, **options: Any) -> Callable[[], object]:
    """A call that runs the model over tokens, without a cache, and waits for the result."""
    cuda = ids.device.type == "cuda"

    def run() -> object:
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=False, **options)
            if cuda:
                torch.cuda.synchronize(ids.device)
        return output

    return run


def last_logits_only(model: Any) -> dict[str, Any]:
    """Options of a forward that ends in the logits of the next token, where the model can."""
    return {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}


def _takes(model: Any, option: str) -> bool:
    return option in inspect.signature(model.forward).parameters


def _timed_model(candidate: Candidate) -> Any:
    """The model whose forwards are timed as the candidate's; chosen here and nowhere else."""
    return candidate.speed_model


def _timed_baseline(lab: Lab) -> Any:
    """The model that candidates are timed against; chosen here and nowhere else."""
    return lab.speed_base


@contextmanager
def _plain_as_computed(model: Any) -> Iterator[None]:
    """Hold weights that are stored as numbers in the dtype in which they are multiplied.

    Else they would be converted in each forward, which the base model's are not. Codes stay codes.
    """
    set_materialized(model, False)
    plain = [m for m in model.modules() if isinstance(m, PackedModule) and m.is_plain]
    for module in plain:
        module.materialize()
    try:
        yield
    finally:
        for module in plain:
            module.release()


@dataclass(frozen=True)
class TimedCall:
    """Something to time: `run`, after `prepare`, which is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def timed_call(model: Any, ids: Tensor, phase: Phase) -> TimedCall:
    """A prefill of `ids`, or the step that runs the last of them after all others."""
    options = last_logits_only(model)
    if not phase.decodes:
        return TimedCall(forward(model, ids, **options))
    decoding = Decoding(model, ids, **options)
    return TimedCall(decoding.step, decoding.restore)


def clocks_with(engine: Engine) -> Clocks:
    """Clocks of this process and of the engine's together, of which one waits for the other."""
    here = Clocks()
    return Clocks(
        cpu=lambda: here.cpu() + engine.cpu_ns,
        switches=lambda: here.switches() + engine.switches,
    )


@contextmanager
def _runner(candidate: Candidate, ids: Tensor, phase: Phase) -> Iterator[tuple[TimedCall, Clocks]]:
    """The candidate's call, and clocks that count the CPU time of its engine, too."""
    engine = candidate.engine()
    if engine is None:
        model = _timed_model(candidate)
        with _plain_as_computed(model):
            yield timed_call(model, ids, phase), Clocks()
        return
    tokens = ids[0].tolist()
    with engine:
        clocks = clocks_with(engine)
        if phase.decodes:
            fill = partial(engine.fill, tokens[:-1])
            yield TimedCall(partial(engine.decode, tokens[-1]), fill), clocks
        else:
            yield TimedCall(partial(engine.prefill, tokens)), clocks


def measure_latency(candidate: Candidate, phase: Phase = PREFILL) -> PairedLatency:
    """Time the candidate and the base model in turn, alone on this machine.

    Raises:
        NotMeasuredError: the machine was disturbed.
        MetricError: the model cannot do what the phase asks for.
    """
    lab = candidate.lab
    simulated = bool(candidate.kernels.wanted)
    parts = {
        "quantized": lab.quantized_identity(candidate.method),
        "kernels": kernels_key(candidate),
        **_conditions(lab, phase),
    }

    def compute() -> dict[str, Any]:
        ids = _phase_ids(lab, phase)
        base = timed_call(_timed_baseline(lab), ids, phase)
        with alone(lab), _runner(candidate, ids, phase) as (call, clocks):
            lab.progress(f"{candidate.id}: latency, {_convention(lab, ids, phase)}")
            found = measure_pair(
                base.run,
                call.run,
                rounds=ROUNDS,
                threads=THREADS,
                clocks=clocks,
                max_seconds=MOST_SECONDS,
                candidate_id=candidate.id,
                convention=_convention(lab, ids, phase),
                simulated=simulated,
                phase=phase.prefix,
                between=lambda: (base.prepare(), call.prepare()),
            )
        lab.count_forwards(2 * len(found.rounds))
        found.usable()  # A disturbed measurement is raised over, not stored.
        return found.to_dict()

    found = PairedLatency.from_dict(lab.store.json("latency", parts, compute))
    floor, note = _floor(lab, phase)
    return replace(found, candidate_id=candidate.id, floor=floor, floor_note=note)


def _floor(lab: Lab, phase: Phase) -> tuple[float | None, str]:
    """How far from 1 the base model's ratio to itself may be, at 95 %, and that in words.

    Timed once, in the same way as a candidate: two calls of their own, in alternating order, and
    where they fit with weights of their own, because where these lie makes a difference of its own.
    """

    def compute() -> dict[str, Any]:
        ids = _phase_ids(lab, phase)
        base = _timed_baseline(lab)
        twin = copy.deepcopy(base) if resident_bytes(base) <= COPIED_BYTES else base
        first, second = (timed_call(model, ids, phase) for model in (base, twin))
        with alone(lab):
            lab.progress("latency of the base model beside itself")
            found = measure_pair(
                first.run,
                second.run,
                rounds=FLOOR_ROUNDS,
                threads=THREADS,
                max_seconds=FLOOR_SECONDS,
                convention=_convention(lab, ids, phase),
                phase=phase.prefix,
                between=lambda: (first.prepare(), second.prepare()),
            )
        lab.count_forwards(2 * len(found.rounds))
        found.usable()
        return found.to_dict()

    try:
        stored = lab.store.json("latency_floor", _conditions(lab, phase), compute)
        ratio = PairedLatency.from_dict(stored).ratio
    except NotMeasuredError:
        return None, "the base model beside itself was disturbed, so its own ratio is not known"
    lower, upper = ratio.lower or 0.0, ratio.upper or 0.0
    note = f"the base model beside itself {ratio:.3f} [{lower:.3f}, {upper:.3f}]"
    return max(abs(lower - 1), abs(upper - 1)), note


def conditions(lab: Lab, code: int, **more: Any) -> dict[str, Any]:
    """What determines a speed besides the candidate, as plain JSON types."""
    return {
        "evaluation": lab.evaluation.identity,
        "processor": processor_of(lab.model.device),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "code": code,
        **more,
    }


def _conditions(lab: Lab, phase: Phase) -> dict[str, Any]:
    asked = {"tokens": phase.tokens, "decodes": phase.decodes}
    return conditions(lab, LATENCY_VERSION, base=lab.base_identity(), phase=asked)


def _phase_ids(lab: Lab, phase: Phase) -> Tensor:
    return prompt(lab, lab.model.fitting(phase.tokens + phase.decodes))


def _convention(lab: Lab, ids: Tensor, phase: Phase) -> str:
    """What is timed, with the dtype that both models compute in."""
    tokens = ids.shape[1]
    what = f"decode after {tokens - 1}" if phase.decodes else f"prefill{tokens}"
    return f"{what}-{dtype_name(lab.speed_base)}"


def alone(lab: Lab) -> FileLock:
    """Held while something is timed, so that nothing else on this store is."""
    lab.store.root.mkdir(parents=True, exist_ok=True)
    return FileLock(lab.store.root / ".latency.lock")
