"""Latency ratios of a run on two workers beside those of a run in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.runs import RunError
from benchmarks.settings import Benchmark, say
from benchmarks.tables import Sample, Section, number, ratio

METHODS = ("none", "rtn", "dynamic:bits=8")
RUNS = {
    "-n 0": ("-n", "0"),
    "-n 0 again": ("-n", "0"),
    "-n 2": ("-n", "2"),
    "-n 2 --dist=load": ("-n", "2", "--dist=load"),
}
"""The first is what the others are compared with. `--dist=load` has no serial phase."""
MEASURES = ("latency.ratio", "latency.decode.ratio")
HEADER = ("run", "measure", *METHODS, "median of x -n 0's", "within")
TESTS = """
def test_latency(quantized):
    assert quantized.latency.ratio > 0
    assert quantized.latency.decode.ratio > 0


def test_busy(quantized):
    assert quantized.kl.mean >= 0
    assert quantized.layer_error >= 0
"""


def benchmark_serial(benchmark: Benchmark) -> Section:
    """Repeat every kind of run on an empty store, and compare within each repetition."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in RUNS}
    for repetition in range(benchmark.repeat):
        for name, arguments in RUNS.items():
            say(f"serial: repetition {repetition + 1}/{benchmark.repeat}, {name}")
            with TemporaryDirectory(prefix="qlab-bench-") as directory:
                found[name].append(run_tests(benchmark, Path(directory), arguments))
    made = Section("Latency ratios on two workers, over those of one process", HEADER)
    made.notes = [
        "Ratio of each method's latency to the base model's. The tests of the quality of all "
        "methods, each on an empty store, run in the same run, so that both workers are busy until "
        "the serial phase, or, with `--dist=load`, until a worker waits for the other's latency. "
        "`-n 0 again` is how far two runs in one process differ.",
    ]
    made.rows = [row(name, measure, found) for measure in MEASURES for name in RUNS]
    made.raw = dict(found)
    return made


def row(name: str, measure: str, found: dict[str, list[dict[str, dict[str, float]]]]) -> list[str]:
    """The ratios of one kind of run, and how far they are from those of the first kind."""
    first = next(iter(found))
    runs, references = found[name], found[first]
    methods = list(runs[0])
    samples = [Sample(tuple(run[method][measure] for run in runs)) for method in methods]
    relative = [
        sample.over(Sample(tuple(run[method][measure] for run in references)))
        for sample, method in zip(samples, methods, strict=True)
    ]
    cells = [name, measure, *(ratio(sample) for sample in samples)]
    if name == first:
        return [*cells, "1", "-"]
    medians = [each.median for each in relative]
    worst = max(abs(each - 1) for each in medians)
    return [*cells, number(median(medians)), f"{worst:.1%}"]


def run_tests(
    benchmark: Benchmark, directory: Path, arguments: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """The measures of each method, from one run of pytest.

    Raises:
        RunError: it did not pass, or a latency was not measured.
    """
    (directory / "test_both.py").write_text(TESTS, encoding="utf-8")
    results = directory / "results.json"
    command = [
        *(sys.executable, "-m", "pytest", "test_both.py", "-q", "-p", "no:cacheprovider"),
        *arguments,
        *replace(benchmark, methods=METHODS).pytest_arguments(directory / "store"),
        *("--qlab-threads=1", f"--qlab-json={results}"),
    ]
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    tail = "\n".join(done.stdout.splitlines()[-25:])
    if done.returncode:
        raise RunError(f"pytest ended with exit status {done.returncode}:\n{tail}")
    rows = json.loads(results.read_text(encoding="utf-8"))["candidates"]
    found = {
        each["id"]: {m: each["measures"][m]["value"] for m in MEASURES if m in each["measures"]}
        for each in rows
    }
    if len(found) != len(METHODS) or any(len(each) != len(MEASURES) for each in found.values()):
        raise RunError(f"A latency was not measured; other work disturbs it:\n{tail}")
    return found
