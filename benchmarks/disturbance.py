"""How often a process on the same core is noticed while latency is measured, and a quiet one is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.runs import RunError
from benchmarks.settings import Benchmark, say
from benchmarks.tables import Section
from pytest_qlab.measuring.speed import PHASES, prompt, timed_call
from pytest_qlab.metrics.latency import PairedLatency, measure_pair

RUNS = 10
ROUNDS = 60
MOST_SECONDS = 2.0
HEADER = ("phase", "hog noticed", "false alarms", "CPU share, hog", "CPU share, quiet", "others")
HOG = "while True: pass"


@dataclass
class Tally:
    """What was found with and without a hog: alarms, and the process's share of its core."""

    alarms: dict[str, list[bool]] = field(default_factory=lambda: {"hog": [], "quiet": []})
    shares: dict[str, list[float]] = field(default_factory=lambda: {"hog": [], "quiet": []})
    others: list[float] = field(default_factory=list)

    def add(self, kind: str, found: PairedLatency) -> None:
        """Count a measurement."""
        self.alarms[kind].append(found.disturbed)
        self.shares[kind].append(found.cpu_share)

    def row(self, phase: str) -> list[str]:
        """A line of the table."""
        counts = [f"{sum(self.alarms[kind])} of {len(self.alarms[kind])}" for kind in self.alarms]
        shares = [f"{min(each):.2f} to {max(each):.2f}" for each in self.shares.values()]
        return [phase, *counts, *shares, f"{max(self.others):.1%} at most"]


def benchmark_disturbance(benchmark: Benchmark) -> Section:
    """The base model beside itself on one core, in turns alone there and with a hog.

    Raises:
        RunError: this system cannot keep a process on a core.
    """
    made = Section("Is a disturbance noticed?", HEADER)
    made.notes = [
        f"Each measurement is one of up to {ROUNDS} rounds on one core, the base model beside "
        "itself. The hog is a process that counts on the same core, at the same priority. The last "
        "column is what processes besides ours took of that core during the quiet measurements: "
        "alarms there are false only as far as it is small.",
    ]
    with TemporaryDirectory(prefix="qlab-bench-") as store, one_core() as core:
        lab = benchmark.lab(Path(store))
        for name in ("prefill", "decode"):
            phase = PHASES[name]
            ids = prompt(lab, lab.model.fitting(phase.tokens + phase.decodes))
            calls = [timed_call(lab.base_model, ids, phase) for _ in range(2)]

            def measure(calls: list[Any] = calls) -> PairedLatency:
                return measure_pair(
                    *(call.run for call in calls),
                    rounds=ROUNDS,
                    max_seconds=MOST_SECONDS,
                    between=lambda: [call.prepare() for call in calls],
                )

            tally = compare(measure, core)
            made.rows = [*made.rows, tally.row(name)]
            made.raw[name] = vars(tally)
    return made


def compare(measure: Callable[[], PairedLatency], core: int) -> Tally:
    """Measure quietly and with a hog, in turns."""
    tally = Tally()
    for run in range(RUNS):
        say(f"disturbance: run {run + 1}/{RUNS}")
        wall, own, busy = time.perf_counter(), time.process_time(), busy_seconds(core)
        tally.add("quiet", measure())
        own, busy = time.process_time() - own, busy_seconds(core) - busy
        tally.others.append(max(0.0, busy - own) / (time.perf_counter() - wall))
        with hog(core):
            tally.add("hog", measure())
    return tally


@contextmanager
def one_core() -> Iterator[int]:
    """Keep this process on the last of its cores.

    Raises:
        RunError: the system cannot.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise RunError("This system cannot keep a process on one core; run it on Linux.")
    cores = os.sched_getaffinity(0)
    core = max(cores)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def hog(core: int) -> Iterator[None]:
    """A process that is always busy on a core."""
    program = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\n{HOG}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def busy_seconds(core: int) -> float:
    """Seconds that a core was busy since the machine started, by the kernel's own account."""
    fields = next(
        line.split()
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()
        if line.startswith(f"cpu{core} ")
    )
    ticks = [int(value) for value in fields[1:]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK")
