"""A whole comparison beside the bare forward passes that it needs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.settings import Benchmark, load, say
from benchmarks.tables import Sample, Section, ratio, seconds
from pytest_qlab import Lab
from pytest_qlab.parallel import ordered_map

PHASES = ("load", "reference", "floor", "statistics", "quantize", "evaluate", "layers")
ON_WINDOWS = ("reference", "floor", "evaluate")


@dataclass
class Phases:
    """Seconds and forward passes of every phase of one comparison."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))

    @contextmanager
    def timed(self, phase: str, lab: Lab) -> Iterator[None]:
        """Add what happens inside to a phase."""
        forwards, started = lab.forwards, time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started
        self.forwards[phase] += lab.forwards - forwards


def benchmark_suite(benchmark: Benchmark) -> Section:
    """Repeat both in turns; the ratio of a phase is over the passes which that phase needs."""
    runs, windows, sequences = [], [], []
    for repetition in range(benchmark.repeat):
        say(f"suite: repetition {repetition + 1}/{benchmark.repeat}")
        with TemporaryDirectory(prefix="qlab-bench-") as store:
            lab = benchmark.lab(Path(store))
            runs.append(compare(lab, benchmark.methods))
            windows.append(bare(lab, [window.ids for window in lab.eval_data.windows]))
            sequences.append(bare(lab, lab.calibration.sequences))
            counts = len(lab.eval_data.windows), len(lab.calibration.sequences)
    section = Section(
        f"Whole comparison of {len(benchmark.methods)} methods, empty store",
        ("phase", "time", "bare forward passes", "their time", "time / theirs"),
    )
    section.rows = rows(runs, Sample(tuple(windows)), Sample(tuple(sequences)), counts)
    section.notes = [
        f"Methods: {', '.join(benchmark.methods)}. Bare passes are the base model's own, logits "
        "included, over the same windows and calibration sequences on the same threads: each set "
        "is run once in each repetition, and counted as often as the comparison runs it.",
    ]
    section.raw = {
        "runs": [vars(run) for run in runs],
        "window_sweep": windows,
        "sequence_sweep": sequences,
    }
    return section


def compare(lab: Lab, methods: Sequence[str]) -> Phases:
    """Everything that the table shows for `methods`, but latency."""
    phases = Phases()
    with phases.timed("load", lab):
        load(lab)
    with phases.timed("reference", lab):
        lab.reference.predictions()
    with phases.timed("floor", lab):
        _ = lab.noise_floor
    with phases.timed("statistics", lab):
        lab.statistics(gram=True)
    for method in methods:
        candidate = lab.candidate(method)
        with phases.timed("quantize", lab):
            candidate.checkpoint.size.estimates(candidate.id)
        with phases.timed("evaluate", lab):
            candidate.fidelity.estimates()
        with phases.timed("layers", lab):
            candidate.layer_error.to_dict()
        candidate.release()
    return phases


def bare(lab: Lab, batches: Sequence[Sequence[int]]) -> float:
    """Seconds of the base model's forward passes over token ids."""
    model = lab.base_model

    def forward(ids: Sequence[int]) -> None:
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)

    started = time.perf_counter()
    for _ in ordered_map(forward, batches, lab.threads):
        pass
    return time.perf_counter() - started


def rows(
    runs: Sequence[Phases], windows: Sample, sequences: Sample, counts: tuple[int, int]
) -> list[list[str]]:
    """One row for each phase, and one for all."""
    made, totals = [], []
    for phase in PHASES:
        spent = Sample(tuple(run.seconds[phase] for run in runs))
        passes = runs[0].forwards[phase]
        sweep, count = (windows, counts[0]) if phase in ON_WINDOWS else (sequences, counts[1])
        needed = sweep.times(passes / count)
        totals.append((spent, needed, passes))
        made.append(_row(phase, spent, passes, needed))
    spent, needed, passes = totals[0]
    for more_spent, more_needed, more_passes in totals[1:]:
        spent, needed = spent.plus(more_spent), needed.plus(more_needed)
        passes += more_passes
    return [*made, _row("**all**", spent, passes, needed)]


def _row(name: str, spent: Sample, passes: int, needed: Sample) -> list[str]:
    if not passes:
        return [name, seconds(spent), "0", "-", "-"]
    return [name, seconds(spent), str(passes), seconds(needed), ratio(spent.over(needed))]
