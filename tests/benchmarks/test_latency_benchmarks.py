"""The benchmarks of what is done about disturbances: their sums, with nothing timed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import disturbance, serial
from benchmarks.disturbance import Tally, busy_seconds, compare, hog, one_core
from benchmarks.runs import RunError
from benchmarks.serial import row, run_tests
from benchmarks.settings import Benchmark
from pytest_qlab.metrics.latency import PairedLatency, Round
from tests.lab.tiny import saved_tiny_model

QUIET = PairedLatency((Round(10, 10, cpu=20, wall=20, switches=0),) * 4, threads=1)
BUSY = PairedLatency((Round(10, 30, cpu=20, wall=40, switches=1),) * 4, threads=1)


def test_alarms_are_counted_by_whether_there_was_a_hog(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hog that every third measurement misses, on a core of which others took a tenth."""
    running, measured = False, 0
    now = 0.0

    @contextmanager
    def pretended(core: int) -> Iterator[None]:
        nonlocal running
        running = True
        yield
        running = False

    def measure() -> PairedLatency:
        nonlocal measured, now
        now += 10.0
        measured += running
        return BUSY if running and measured % 3 else QUIET

    monkeypatch.setattr(disturbance, "hog", pretended)
    monkeypatch.setattr(disturbance, "RUNS", 6)
    monkeypatch.setattr(disturbance, "busy_seconds", lambda core: 0.9 * now)
    monkeypatch.setattr("benchmarks.disturbance.time.perf_counter", lambda: now)
    monkeypatch.setattr("benchmarks.disturbance.time.process_time", lambda: 0.8 * now)
    tally = compare(measure, 0)
    assert tally.alarms == {"hog": [True, True, False] * 2, "quiet": [False] * 6}
    assert tally.others == pytest.approx([0.1] * 6)
    assert tally.row("decode") == [
        "decode", "4 of 6", "0 of 6", "0.50 to 1.00", "1.00 to 1.00", "10.0% at most"
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot pin")
def test_a_hog_is_on_the_core_that_it_is_given() -> None:
    before = os.sched_getaffinity(0)
    with one_core() as core:
        assert os.sched_getaffinity(0) == {core}
        with hog(core):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            assert [os.sched_getaffinity(int(child)) for child in children] == [{core}]
        assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert busy_seconds(core) > 0
    assert os.sched_getaffinity(0) == before


def test_runs_are_compared_method_by_method_with_the_first() -> None:
    def run(none: float, rtn: float) -> dict[str, dict[str, float]]:
        return {"none": {"latency.ratio": none}, "rtn": {"latency.ratio": rtn}}

    found = {"-n 0": [run(1.0, 2.0), run(1.0, 4.0)], "-n 2": [run(1.1, 2.0), run(1.1, 4.0)]}
    assert row("-n 0", "latency.ratio", found)[-2:] == ["1", "-"]
    # Each method's ratio of ratios is 1.1 and 1, in both repetitions.
    cells = row("-n 2", "latency.ratio", found)
    assert cells[:3] == ["-n 2", "latency.ratio", "1.10x (1.10 to 1.10)"]
    assert cells[-2:] == ["1.05", "10.0%"]


def benchmark(model: str) -> Benchmark:
    return Benchmark(model, 1, 1, 2, 3, 24, ("none",), None)


def test_a_run_without_a_latency_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(saved_tiny_model(tmp_path / "model"))
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(serial, "METHODS", ("none", "no-such-method"))
    with pytest.raises(RunError, match="exit status 4"):
        run_tests(benchmark(model), tmp_path / "run", ("-n", "0"))

    def unmeasured(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        (output,) = (each for each in command if each.startswith("--qlab-json="))
        Path(output.partition("=")[2]).write_text('{"candidates": [{"id": "a", "measures": {}}]}')
        return subprocess.CompletedProcess(command, 0, "1 skipped", "")

    monkeypatch.setattr(subprocess, "run", unmeasured)
    with pytest.raises(RunError, match=r"was not measured(.|\n)*1 skipped"):
        run_tests(benchmark(model), tmp_path / "run", ("-n", "0"))


def test_a_tally_starts_empty() -> None:
    tally = Tally()
    tally.add("hog", BUSY)
    assert Tally().alarms == {"hog": [], "quiet": []}
    assert tally.shares["hog"] == [pytest.approx(0.5)]
