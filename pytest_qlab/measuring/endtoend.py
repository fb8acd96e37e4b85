"""End to end: tokens per second, and a model under load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.engines.continuous_batching import continuous_batching
from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.estimate import Estimate
from pytest_qlab.measuring.claims import refuse_engine, refuse_simulated
from pytest_qlab.measuring.runnable import kernels_key
from pytest_qlab.measuring.speed import alone, clocks_with, conditions, text_tokens
from pytest_qlab.measuring.speed import prompt as first_tokens
from pytest_qlab.metrics.latency import Clocks
from pytest_qlab.metrics.load import drive
from pytest_qlab.metrics.serving import Limits, Load, Serving, ServingRun
from pytest_qlab.metrics.throughput import Generation, PairedThroughput, measure_generations

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.engines.base import Engine
    from pytest_qlab.lab import Lab

PROMPT_TOKENS, NEW_TOKENS = 128, 32
ROUNDS, MOST_SECONDS = 60, 30.0
OPEN_LOOP_BATCH = 32
MOST_WAITING = 0.1
"""A server is disturbed if its threads waited for a core for more than this share of the time."""
THROUGHPUT_VERSION = SERVING_VERSION = 2


class Throughput:
    """Tokens per second, one request at a time: `prefill`, `decode`, and their ratios.

    `prefill_ratio` and `decode_ratio` are over the base model's, from rounds that run both.
    """

    def __init__(self, paired: PairedThroughput, estimates: dict[str, Estimate]) -> None:
        self.paired = paired
        self.estimates = estimates
        self.prefill = estimates["throughput.prefill"]
        self.decode = estimates["throughput.decode"]
        self.prefill_ratio = estimates["throughput.prefill_ratio"]
        self.decode_ratio = estimates["throughput.decode_ratio"]


def _lengths(lab: Lab, prompt: int, tokens: int) -> tuple[int, int]:
    """Those lengths, or as much of the model's context in the same proportion."""
    room = lab.model.fitting(prompt + tokens)
    new = max(2, min(tokens, room * tokens // (prompt + tokens)))
    return room - new, new


# Tokens per second


class _Stamps:
    """Takes the place of a streamer in `generate`: notes when tokens come."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self.times: list[int] = []
        self._clock = clock

    def put(self, value: object) -> None:
        """Called with the prompt first, then with each token."""
        self.times.append(self._clock())

    def end(self) -> None:
        """Nothing is left to show."""


def generation(
    model: Any, ids: Tensor, tokens: int, clock: Callable[[], int] = time.perf_counter_ns
) -> Callable[[], Generation]:
    """A greedy generation of exactly that many tokens from `ids` [1, n], which times itself."""
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    mask = torch.ones_like(ids)

    def run() -> Generation:
        stamps = _Stamps(clock)
        started = clock()
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, generation_config=config, streamer=stamps)
        _check_length(
            len(stamps.times) - 1,
            tokens,
            "The model's own generation settings end it early: take stopping criteria out of its "
            "generation_config.",
        )
        _, first, *_, last = stamps.times
        return first - started, last - first

    return run


def engine_generation(engine: Engine, ids: Tensor, tokens: int) -> Callable[[], Generation]:
    """The same by the runtime that has the model open, timed by the runtime's process."""
    prompt = ids[0].tolist()

    def run() -> Generation:
        found = engine.generate(prompt, tokens)
        _check_length(len(found.tokens), tokens, f"{engine.name} ends generations by itself.")
        return found.first_ns, found.rest_ns

    return run


def _check_length(found: int, asked: int, why: str) -> None:
    if found != asked:
        raise MetricError(
            f"A generation brought {found} tokens, and {asked} were asked for, so speeds cannot be "
            f"compared. {why}"
        )


@contextmanager
def _generator(
    candidate: Candidate, ids: Tensor, tokens: int
) -> Iterator[tuple[Callable[[], Generation], Clocks]]:
    """The candidate's generation, and clocks that count the CPU time of its engine, too."""
    engine = candidate.engine()
    if engine is None:
        yield generation(candidate.speed_model, ids, tokens), Clocks()
        return
    with engine:
        yield engine_generation(engine, ids, tokens), clocks_with(engine)


def measure_throughput(candidate: Candidate) -> Throughput:
    """Generate with the candidate and the base model in turn, alone on this machine.

    The base model runs in torch; a candidate that brings a runtime runs in that.

    Raises:
        NotMeasuredError: the machine was disturbed, or the kernel is simulated and the policy is
            to skip.
        MetricError: the kernel is simulated and the policy is to fail.
        EngineError: the candidate's runtime failed.
    """
    simulated = refuse_simulated(candidate, "The throughput")
    lab = candidate.lab
    prompt, tokens = _lengths(lab, PROMPT_TOKENS, NEW_TOKENS)
    quantized = lab.quantized_identity(candidate.method)
    parts = conditions(
        lab,
        THROUGHPUT_VERSION,
        quantized=quantized,
        kernels=kernels_key(candidate),
        prompt=prompt,
        tokens=tokens,
    )

    def compute() -> dict[str, Any]:
        ids = first_tokens(lab, prompt)
        base = generation(lab.speed_base, ids, tokens)
        with alone(lab), _generator(candidate, ids, tokens) as (ours, clocks):
            lab.progress(f"{candidate.id}: throughput")
            found = measure_generations(
                base,
                ours,
                prompt=ids.shape[1],
                tokens=tokens,
                rounds=ROUNDS,
                max_seconds=MOST_SECONDS,
                clocks=clocks,
            )
        found.usable()  # A disturbed measurement is raised over, not stored.
        return found.to_dict()

    paired = PairedThroughput.from_dict(lab.store.json("throughput", parts, compute))
    return Throughput(paired, paired.estimates(candidate.id, simulated=simulated))


# Under load


def waited_ns(threads: Path = Path("/proc/self/task")) -> int:
    """How long this process's threads were ready to run and had no core; 0 where nobody tells.

    Args:
        threads: where Linux keeps what it knows of each.
    """
    total = 0
    for file in threads.glob("*/schedstat"):
        with suppress(OSError):  # The thread has ended.
            total += int(file.read_text(encoding="ascii").split()[1])
    return total


def measure_serving(
    candidate: Candidate, load: Load, *, prompt: int, tokens: int, limits: Limits
) -> Serving:
    """Serve the candidate by transformers' continuous batching, under that load.

    Raises:
        NotMeasuredError: the time ran out, or the kernel is simulated and the policy is to skip.
        MetricError: requests failed or the server was over-saturated; the kernel is simulated and
            the policy is to fail; or another runtime runs the candidate.
        EngineError: continuous batching cannot run this model.
    """
    refuse_engine(candidate)
    simulated = refuse_simulated(candidate, "Serving")
    lab = candidate.lab
    prompt, tokens = _lengths(lab, prompt, tokens)
    parts = conditions(
        lab,
        SERVING_VERSION,
        quantized=lab.quantized_identity(candidate.method),
        kernels=kernels_key(candidate),
        load=load.name,
        prompt=prompt,
        tokens=tokens,
        limits=vars(limits),
    )

    def compute() -> dict[str, Any]:
        text = text_tokens(lab)
        starts = range(0, max(1, len(text) - prompt), prompt)
        prompts = [tuple(text[start : start + prompt]) for start in starts]
        batch = load.concurrency or OPEN_LOOP_BATCH
        with (
            alone(lab),
            continuous_batching(
                candidate.speed_model, requests=batch, prompt=prompt, tokens=tokens
            ) as server,
        ):
            lab.progress(f"{candidate.id}: serving, {load}")
            started, waited = time.perf_counter_ns(), waited_ns()
            found = drive(server, load, prompts, tokens, limits)
            share = (waited_ns() - waited) / (time.perf_counter_ns() - started)
        if share > MOST_WAITING:  # A disturbed measurement is raised over, not stored.
            raise NotMeasuredError(
                f"Serving was not measured: for {share:.0%} of the time, other processes held the "
                "CPU that the server was ready to use. Run on a quiet machine, or stop other work."
            )
        return found.to_dict()

    run = ServingRun.from_dict(lab.store.json("serving", parts, compute))
    convention = f"{load}, {prompt}+{tokens} tokens"
    found, missing = run.estimates(candidate.id, convention=convention, simulated=simulated)
    return Serving(run, found, missing)
