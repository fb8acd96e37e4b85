"""Tokens per second, on a clock that only the generations move."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.metrics.latency import Clocks
from pytest_qlab.metrics.throughput import (
    Generation,
    GenerationRound,
    PairedThroughput,
    measure_generations,
)

MS = 1_000_000


class Machine:
    """Generations take given times; of the wall's time the process gets a share."""

    def __init__(self, share: float = 1.0) -> None:
        self.time = 0
        self.calls: list[str] = []
        self._share = share

    def clocks(self) -> Clocks:
        return Clocks(wall=lambda: self.time, cpu=lambda: int(self._share * self.time))

    def model(self, name: str, prefill: int, decode: int) -> Callable[[], Generation]:
        def run() -> Generation:
            self.calls.append(name)
            self.time += prefill + decode
            return prefill, decode

        return run


def measure(machine: Machine, rounds: int = 8, **options: float) -> PairedThroughput:
    return measure_generations(
        machine.model("b", 100 * MS, 620 * MS),
        machine.model("c", 50 * MS, 155 * MS),
        prompt=128,
        tokens=32,
        rounds=rounds,
        clocks=machine.clocks(),
        max_seconds=options.get("max_seconds", 1e9),
    )


def test_rates_and_ratios_are_those_of_the_times() -> None:
    found = measure(Machine()).estimates("c")
    assert found["throughput.prefill"] == pytest.approx(128 / 0.05)
    assert found["throughput.decode"] == pytest.approx(31 / 0.155)
    assert found["throughput.prefill_ratio"] == pytest.approx(2)
    assert found["throughput.decode_ratio"] == pytest.approx(4)
    assert found["throughput.decode"].unit == "tokens/s"
    assert found["throughput.decode"].convention == "128+32 tokens, one request"
    assert "50 tokens/s" in found["throughput.decode"].detail


def test_models_take_turns_and_warm_up_first() -> None:
    machine = Machine()
    found = measure(machine, rounds=6)
    assert machine.calls == list("bc" + "bccb" * 3)
    assert len(found.rounds) == 6


def test_intervals_are_those_of_the_times_turned_over() -> None:
    # Of 6 samples the least and the largest bound the median at 95 %.
    times = [10, 20, 30, 40, 50, 60]
    rounds = tuple(GenerationRound((MS, MS), (t * MS, t * MS), 2, 2) for t in times)
    found = PairedThroughput(rounds, 3, 2).estimates()["throughput.prefill"]
    assert found == pytest.approx(3 / 0.030)
    assert found.lower == pytest.approx(3 / 0.060)
    assert found.upper == pytest.approx(3 / 0.010)


def test_what_moves_both_in_a_round_leaves_the_ratio_alone() -> None:
    rounds = tuple(GenerationRound((t, t), (2 * t, 4 * t), 1, 1) for t in range(MS, 40 * MS, MS))
    found = PairedThroughput(rounds, 3, 2).estimates()
    assert found["throughput.prefill_ratio"] == pytest.approx(0.5)
    prefill = found["throughput.prefill_ratio"]
    assert (prefill.lower, prefill.upper) == pytest.approx((0.5, 0.5))
    assert found["throughput.decode_ratio"] == pytest.approx(0.25)


def test_time_ends_the_rounds() -> None:
    # A round takes 925 ms; the one that begins before 4 s is the fifth.
    assert len(measure(Machine(), rounds=100, max_seconds=4.0).rounds) == 5


def test_disturbed_rounds_are_no_measurement() -> None:
    with pytest.raises(NotMeasuredError, match="in 8 of 8 rounds another process"):
        measure(Machine(share=0.5)).estimates()
    quiet = GenerationRound((MS, MS), (MS, MS), 10, 10)
    loud = GenerationRound((MS, MS), (9 * MS, 9 * MS), 5, 10)
    found = PairedThroughput((quiet,) * 18 + (loud,), 3, 2)
    assert found.estimates()["throughput.decode"].upper == pytest.approx(1 / 0.001)
    assert found.usable() == (quiet,) * 18


def test_too_few_rounds_are_no_measurement() -> None:
    with pytest.raises(NotMeasuredError, match="5 rounds were made"):
        measure(Machine(), rounds=5).estimates()


def test_a_clock_that_stands_still_is_an_error() -> None:
    machine = Machine()
    with pytest.raises(MetricError, match="took no time by the clock"):
        measure_generations(
            machine.model("b", MS, 0),
            machine.model("c", MS, MS),
            prompt=1,
            tokens=2,
            rounds=1,
            max_seconds=9,
            clocks=machine.clocks(),
        )


def test_rounds_survive_json() -> None:
    found = measure(Machine())
    assert PairedThroughput.from_dict(found.to_dict()) == found


def test_one_token_has_no_decode() -> None:
    machine = Machine()
    with pytest.raises(ValueError, match="at least 2 tokens"):
        measure_generations(
            machine.model("b", 1, 1),
            machine.model("c", 1, 1),
            prompt=1,
            tokens=1,
            rounds=1,
            max_seconds=1,
        )
