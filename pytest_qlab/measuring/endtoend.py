"""End to end: loading from disk, the first generation, tokens per second, a model under load."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.checkpoint import INDEX_FILE, MODEL_FILE
from pytest_qlab.engines.continuous_batching import continuous_batching
from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.estimate import Estimate
from pytest_qlab.machine import processor_name
from pytest_qlab.measuring.pagecache import cached_share, drop_from_cache
from pytest_qlab.measuring.speed import alone
from pytest_qlab.methods.base import Method
from pytest_qlab.metrics.load import drive
from pytest_qlab.metrics.serving import Limits, Load, Serving, ServingRun
from pytest_qlab.metrics.throughput import Generation, PairedThroughput, measure_generations
from pytest_qlab.stats.intervals import sample_quantile

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.lab import Lab

PROMPT_TOKENS, NEW_TOKENS = 128, 32
ROUNDS, MOST_SECONDS = 60, 30.0
REPEATS = 3
CHILD_SECONDS = 1800.0
COLD_SHARE = 0.05
"""A load is cold if at most this share of the checkpoint was still in memory."""
OPEN_LOOP_BATCH = 32
MOST_WAITING = 0.1
"""A server is disturbed if its threads waited for a core for more than this share of the time."""
LOADING_VERSION = THROUGHPUT_VERSION = SERVING_VERSION = 1


class Loading:
    """Seconds until a packed model on disk can generate, in a fresh process: `cold` and `warm`.

    `first_generation` is the first token of the first call after that.
    """

    def __init__(self, estimates: dict[str, Estimate], reason: str) -> None:
        self.estimates = estimates
        self.warm = estimates["load.warm"]
        self.first_generation = estimates["first_generation"]
        self._reason = reason

    @property
    def cold(self) -> Estimate:
        """With nothing of the checkpoint in the page cache.

        Raises:
            NotMeasuredError: the system kept it there.
        """
        if "load.cold" not in self.estimates:
            raise NotMeasuredError(f"The cold load was not measured: {self._reason}")
        return self.estimates["load.cold"]


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


def _check(candidate: Candidate, what: str, *, loads: bool = False) -> bool:
    """Whether the candidate's kernels are simulated; refuse it where that is not wanted.

    A process that loads the candidate by itself dequantizes; all else runs its `speed_model`.

    Raises:
        NotMeasuredError: the kernel is simulated and the policy is to skip.
        MetricError: it is and the policy is to fail; or another runtime runs the candidate.
    """
    if type(candidate.method).engine is not Method.engine:
        raise MetricError(
            f"{what} of {candidate.id} is not measured, because another runtime runs it in a "
            "process of its own. Its latency is; or start that runtime's server, and put load on "
            "it with qlab serve-bench."
        )
    wanted = candidate.checkpoint.wanted_kernels if loads else candidate.kernels.wanted
    if wanted and candidate.lab.simulated_latency != "flag":
        message = (
            f"{what} of {candidate.id} is not a claim that can be made: its layers dequantize "
            f"before they multiply. It would need {' and '.join(wanted)}. Pass "
            "--qlab-simulated-latency=flag to measure it all the same, marked as simulated."
        )
        skip = candidate.lab.simulated_latency == "skip"
        raise (NotMeasuredError if skip else MetricError)(message)
    return bool(wanted)


def _parts(candidate: Candidate, code: int, **more: Any) -> dict[str, Any]:
    lab = candidate.lab
    return {
        "quantized": lab.quantized_identity(candidate.method),
        "evaluation": lab.evaluation.identity,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": 1,
        "code": code,
        **more,
    }


def _lengths(lab: Lab, prompt: int, tokens: int) -> tuple[int, int]:
    """Those lengths, or as much of the model's context in the same proportion."""
    room = lab.model.fitting(prompt + tokens)
    new = max(2, min(tokens, room * tokens // (prompt + tokens)))
    return room - new, new


def _text(lab: Lab) -> list[int]:
    """The evaluation windows, one after another."""
    return [token for window in lab.eval_data.windows for token in window.ids]


# Loading


def measure_loading(candidate: Candidate) -> Loading:
    """Load the candidate in fresh processes, cold and warm in turn, and time their first tokens.

    Raises:
        MetricError: the candidate cannot be loaded by itself, or its kernels are simulated and the
            policy is to fail.
    """
    simulated = _check(candidate, "The load time", loads=True)
    lab = candidate.lab
    parts = _parts(candidate, LOADING_VERSION)

    def compute() -> dict[str, Any]:
        # What is mapped here would stay in memory there.
        candidate.release()
        gc.collect()
        lab.progress(f"{candidate.id}: loading")
        with alone(lab), tempfile.TemporaryDirectory() as config:
            return _load_in_turns(candidate, Path(config))

    stored = lab.store.json("loading", parts, compute)
    fields = {
        "candidate": candidate.id,
        "unit": "s",
        "convention": "fresh process",
        "simulated": simulated,
    }
    found: dict[str, Estimate] = {}
    for kind in ("cold", "warm"):
        samples = [each["load"] for each in stored[kind]]
        if samples:
            found[f"load.{kind}"] = _median(f"load.{kind}", samples, "loads", fields)
    both = [*stored["cold"], *stored["warm"]]
    steady = sorted(time for each in both for time in each["steady"])
    found["first_generation"] = _median(
        "first_generation",
        [each["first"] for each in both],
        f"processes; in the steady state {1000 * steady[len(steady) // 2]:.4g} ms",
        fields,
    )
    return Loading(found, stored["reason"])


def _median(metric: str, samples: list[float], what: str, fields: dict[str, Any]) -> Estimate:
    middle = sample_quantile(samples, 0.5)
    return Estimate(
        middle.value,
        metric=metric,
        lower=middle.lower,
        upper=middle.upper,
        n=len(samples),
        detail=f"{min(samples):.4g} to {max(samples):.4g} s in {len(samples)} {what}",
        **fields,
    )


def _load_in_turns(candidate: Candidate, config: Path) -> dict[str, Any]:
    lab, directory = candidate.lab, candidate.checkpoint.directory
    lab.base_model.config.save_pretrained(config)
    given = {
        "config": str(config),
        "checkpoint": str(directory),
        "dtype": lab.model.dtype,
        "device": lab.model.device,
        "ids": _text(lab)[: lab.model.fitting(PROMPT_TOKENS)],
    }
    files = [directory / MODEL_FILE, directory / INDEX_FILE]
    found: dict[str, Any] = {"cold": [], "warm": [], "reason": ""}
    for _ in range(REPEATS):
        if not found["reason"]:
            found["reason"] = make_cold(files)
        if not found["reason"]:
            found["cold"].append(_in_a_child(candidate.id, given))
        for file in files:
            _read_through(file)
        found["warm"].append(_in_a_child(candidate.id, given))
    return found


def make_cold(files: list[Path]) -> str:
    """Drop files from the page cache; why that is not possible, or an empty text."""
    for file in files:
        drop_from_cache(file)
        share = cached_share(file)
        if share is None:
            return "this system does not tell what of a file is in memory."
        if share > COLD_SHARE:
            return (
                f"{share:.0%} of {file.name} stayed in memory, because a process has it mapped or "
                "the store is on a file system in memory. Let go of `quantized.model`, or put the "
                "store on a disk (--qlab-store)."
            )
    return ""


def _read_through(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(2**22):
            pass


def _in_a_child(candidate: str, given: dict[str, Any]) -> dict[str, Any]:
    """What `measuring/loading.py` answers.

    Raises:
        MetricError: it failed, or took too long.
    """
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest_qlab.measuring.loading"],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=CHILD_SECONDS,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            raise MetricError(
                f"The load time of {candidate} was not measured: the process that loads it ended "
                f"with status {done.returncode}: {said}"
            )
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise MetricError(
            f"The load time of {candidate} was not measured: the process that loads it was not "
            f"done after {CHILD_SECONDS:g} seconds."
        ) from error
    return answer


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
        if len(stamps.times) != tokens + 1:
            raise MetricError(
                f"A generation brought {len(stamps.times) - 1} tokens, and {tokens} were asked "
                "for, so speeds cannot be compared. The model's own generation settings end it "
                "early: take stopping criteria out of its generation_config."
            )
        _, first, *_, last = stamps.times
        return first - started, last - first

    return run


def measure_throughput(candidate: Candidate) -> Throughput:
    """Generate with the candidate and the base model in turn, alone on this machine.

    Raises:
        NotMeasuredError: the machine was disturbed, or the kernel is simulated and the policy is
            to skip.
        MetricError: the kernel is simulated and the policy is to fail, or another runtime runs it.
    """
    simulated = _check(candidate, "The throughput")
    lab = candidate.lab
    prompt, tokens = _lengths(lab, PROMPT_TOKENS, NEW_TOKENS)
    parts = _parts(candidate, THROUGHPUT_VERSION, prompt=prompt, tokens=tokens)

    def compute() -> dict[str, Any]:
        ids = torch.tensor([_text(lab)[:prompt]], device=lab.model.device)
        with alone(lab):
            lab.progress(f"{candidate.id}: throughput")
            found = measure_generations(
                generation(lab.speed_base, ids, tokens),
                generation(candidate.speed_model, ids, tokens),
                prompt=ids.shape[1],
                tokens=tokens,
                rounds=ROUNDS,
                max_seconds=MOST_SECONDS,
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
    simulated = _check(candidate, "Serving")
    lab = candidate.lab
    prompt, tokens = _lengths(lab, prompt, tokens)
    parts = _parts(
        candidate,
        SERVING_VERSION,
        load=load.name,
        prompt=prompt,
        tokens=tokens,
        limits=vars(limits),
    )

    def compute() -> dict[str, Any]:
        text = _text(lab)
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
