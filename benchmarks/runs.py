"""Whole pytest runs of the example: cold and warm store, one process and two workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.settings import ROOT, Benchmark, say
from benchmarks.tables import Sample, Section, ratio, seconds

EXAMPLE = "examples/test_compare.py"
HEADER = ("run", "time", "ratio")


class RunError(Exception):
    """A pytest run that was to be timed did not pass."""


def benchmark_store(benchmark: Benchmark) -> Section:
    """The same run on an empty store, and again on what it left there."""
    cold, warm = [], []
    for repetition in range(benchmark.repeat):
        say(f"store: repetition {repetition + 1}/{benchmark.repeat}")
        with TemporaryDirectory(prefix="qlab-bench-") as store:
            cold.append(run_example(benchmark, Path(store), workers=0))
            warm.append(run_example(benchmark, Path(store), workers=0))
    return section("Cold and warm store, -n 0", {"cold": cold, "warm": warm})


def benchmark_workers(benchmark: Benchmark) -> Section:
    """The same run on an empty store, in one process and on two workers."""
    times: dict[str, list[float]] = {"-n 0": [], "-n 2": []}
    for repetition in range(benchmark.repeat):
        say(f"workers: repetition {repetition + 1}/{benchmark.repeat}")
        for workers, name in ((0, "-n 0"), (2, "-n 2")):
            with TemporaryDirectory(prefix="qlab-bench-") as store:
                times[name].append(run_example(benchmark, Path(store), workers=workers))
    return section("One process and two workers, empty store", times)


def section(title: str, times: dict[str, list[float]]) -> Section:
    """A table of runs whose ratios are over the first."""
    samples = {name: Sample(tuple(values)) for name, values in times.items()}
    first, *_ = samples.values()
    made = Section(title, HEADER)
    made.rows = [
        [name, seconds(sample), "1" if sample is first else ratio(sample.over(first))]
        for name, sample in samples.items()
    ]
    made.notes = [
        f"Wall time of `pytest {EXAMPLE}` without its latency test, from the start of Python to "
        "the end of the process."
    ]
    made.raw = dict(times)
    return made


def run_example(benchmark: Benchmark, store: Path, *, workers: int) -> float:
    """Seconds of one run, which must pass; threads are shared out among the workers.

    Raises:
        RunError: it did not pass.
    """
    threads = max(1, benchmark.threads // max(1, workers))
    command = [
        *(sys.executable, "-m", "pytest", EXAMPLE, "-q", "-p", "no:cacheprovider"),
        *("-n", str(workers), "-k", "not latency", f"--qlab-threads={threads}"),
        *benchmark.pytest_arguments(store),
    ]
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    elapsed = time.perf_counter() - started
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise RunError(f"pytest ended with exit status {done.returncode}:\n{tail}")
    return elapsed
