"""How long a packed model takes from the disk to its first token, in fresh processes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from pytest_qlab.checkpoint import INDEX_FILE, MODEL_FILE
from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.estimate import Estimate
from pytest_qlab.measuring.child import answer_of_child
from pytest_qlab.measuring.claims import has_engine, refuse_simulated
from pytest_qlab.measuring.loading import STEADY
from pytest_qlab.measuring.pagecache import cached_share, drop_from_cache
from pytest_qlab.measuring.runnable import kernels_key, packed_job, speed_dtype_name
from pytest_qlab.measuring.speed import THREADS, alone, conditions, text_tokens
from pytest_qlab.stats.intervals import MEDIAN_SAMPLES, sample_quantile

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate

PROMPT_TOKENS = 128
REPEATS = MEDIAN_SAMPLES
MOST_SECONDS = 1800.0
"""No cold and warm load begin after this."""
COLD_SHARE = 0.05
"""A load is cold if at most this share of the checkpoint was still in memory."""
LOADING_VERSION = 4

Load = Callable[[], dict[str, Any]]
"""Loads a model in a fresh process: seconds of the `load`, of the `first` and `steady` tokens."""


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


def measure_loading(candidate: Candidate) -> Loading:
    """Load the candidate in fresh processes, cold and warm in turn, and time their first tokens.

    Candidates that bring a runtime are loaded by it, in processes of its own.

    Raises:
        NotMeasuredError: the time ran out before there were enough loads, or the candidate's
            kernels are simulated and the policy is to skip.
        MetricError: the candidate cannot be loaded by itself, or its kernels are simulated and the
            policy is to fail.
        EngineError: the candidate's runtime failed.
    """
    simulated = refuse_simulated(candidate, "The load time")
    lab = candidate.lab
    quantized = lab.quantized_identity(candidate.method)
    parts = conditions(lab, LOADING_VERSION, quantized=quantized, kernels=kernels_key(candidate))

    def compute() -> dict[str, Any]:
        # What is mapped here would stay in memory there.
        candidate.release()
        gc.collect()
        lab.progress(f"{candidate.id}: loading")
        with alone(lab), _loader(candidate) as (load, files):
            return _load_in_turns(candidate.id, load, files)

    stored = lab.store.json("loading", parts, compute)
    fields = {
        "candidate": candidate.id,
        "unit": "s",
        "convention": f"fresh process, {_runs(candidate)}",
        "simulated": simulated,
    }
    found: dict[str, Estimate] = {}
    for kind in ("cold", "warm"):
        samples = [each["load"] for each in stored[kind]]
        if len(samples) >= MEDIAN_SAMPLES:
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


def _runs(candidate: Candidate) -> str:
    """What is loaded, in words."""
    kernels = str(candidate.kernels)
    return kernels if has_engine(candidate) else f"{speed_dtype_name(candidate.lab)}, {kernels}"


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


@contextmanager
def _loader(candidate: Candidate) -> Iterator[tuple[Load, list[Path]]]:
    """What loads the candidate once in a fresh process, and the files that are read then."""
    lab, directory = candidate.lab, candidate.checkpoint.directory
    ids = text_tokens(lab, lab.model.fitting(PROMPT_TOKENS))
    own = [directory / MODEL_FILE, directory / INDEX_FILE]
    if has_engine(candidate):
        files = [each for each in sorted(directory.iterdir()) if each.is_file()]
        yield partial(_loaded_by_engine, candidate, ids), [f for f in files if f not in own]
        return
    with packed_job(candidate) as job:
        yield partial(_loaded, candidate.id, {**job, "ids": ids}), own


def _load_in_turns(candidate: str, load: Load, files: list[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {"cold": [], "warm": [], "reason": ""}
    end = monotonic() + MOST_SECONDS
    for _ in range(REPEATS):
        if monotonic() >= end:  # Raised over, not stored.
            raise NotMeasuredError(
                f"The load time of {candidate} was not measured: {len(found['warm'])} loads were "
                f"made in {MOST_SECONDS:g} seconds, and an interval takes {MEDIAN_SAMPLES}. "
                "Measure a smaller model here, or put the store on a faster disk (--qlab-store)."
            )
        if not found["reason"]:
            found["reason"] = make_cold(files)
        if not found["reason"]:
            found["cold"].append(load())
        for file in files:
            _read_through(file)
        found["warm"].append(load())
    return found


def make_cold(files: list[Path]) -> str:
    """Drop files from the page cache; why that is not possible, or an empty text."""
    if not files:
        return "there is no file of it that could leave memory."
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


def _loaded_by_engine(candidate: Candidate, ids: list[int]) -> dict[str, Any]:
    """The same of the runtime that the candidate's method brings."""
    directory = candidate.checkpoint.directory
    found = candidate.method.time_load(directory, ids, steady=STEADY, threads=THREADS)
    if found is None:
        raise MetricError(
            f"The load time of {candidate.id} is not measured, because the runtime that runs it "
            f"does not time its loads: {type(candidate.method).__name__} has no `time_load`."
        )
    return asdict(found)


def _loaded(candidate: str, job: dict[str, Any]) -> dict[str, Any]:
    """What `measuring/loading.py` answers."""
    what = f"The load time of {candidate}"
    return answer_of_child("pytest_qlab.measuring.loading", job, what=what)
