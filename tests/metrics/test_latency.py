"""Paired latency under simulated clocks, where every number is known."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.metrics.latency import Clocks, PairedLatency, Round, measure_pair

MILLISECOND = 1_000_000


class Machine:
    """A simulated machine: calls take the time they are given, and the process gets a share."""

    def __init__(self, *, cpu_share: Callable[[int], float] = lambda call: 1.0) -> None:
        self.now = 0
        self.cpu = 0.0
        self.preempted = 0
        self.calls: list[str] = []
        self._share = cpu_share

    def clocks(self) -> Clocks:
        return Clocks(
            wall=lambda: self.now, cpu=lambda: int(self.cpu), switches=lambda: self.preempted
        )

    def work(self, name: str, milliseconds: Callable[[int], float]) -> Callable[[], object]:
        """A call that takes that long, by how often it was called."""

        def run() -> None:
            count = self.calls.count(name)
            taken = milliseconds(count) * MILLISECOND
            share = self._share(len(self.calls))
            self.now += int(taken / share)
            self.cpu += taken
            self.preempted += 3 if share < 1 else 0
            self.calls.append(name)

        return run


def test_quantiles_and_ratio_are_those_of_the_samples() -> None:
    """The baseline takes 1 .. 400 ms in a scattered order, the candidate always half as long."""
    machine = Machine()

    def scattered(call: int) -> float:
        return 1.0 + (call * 149) % 400

    found = measure_pair(
        machine.work("a", scattered),
        machine.work("b", lambda k: scattered(k) / 2),
        rounds=400,
        warmup=0,
        max_seconds=1e6,
        clocks=machine.clocks(),
        candidate_id="rtn",
        baseline_id="none",
        convention="prefill",
        simulated=True,
    )
    assert not found.disturbed
    assert found.attempts == 1
    assert len(found.rounds) == 400
    assert float(found.baseline.p50) == pytest.approx(0.200)
    assert float(found.candidate.p50) == pytest.approx(0.100)
    assert found.baseline.p99 is not None
    assert float(found.baseline.p99) == pytest.approx(0.396)
    # Order statistics of Binomial(400, 0.99): ranks 392 and 400.
    assert found.baseline.p99.lower == pytest.approx(0.392)
    assert found.baseline.p99.upper == pytest.approx(0.400)
    assert found.baseline.p99.confidence == 0.95
    assert [float(found.ratio), found.ratio.lower, found.ratio.upper] == pytest.approx([0.5] * 3)
    candidate, baseline = found.estimates(), found.baseline_estimates()
    assert candidate.keys() == {"latency.p50", "latency.p90", "latency.p99", "latency.ratio"}
    assert baseline.keys() == {"latency.p50", "latency.p90", "latency.p99"}
    assert found.baseline.p90 is not None
    assert float(found.baseline.p90) == pytest.approx(0.360)
    # Order statistics of Binomial(400, 0.9), whose standard deviation is 6: ranks 348 and 372.
    assert found.baseline.p90.lower == pytest.approx(0.348)
    assert found.baseline.p90.upper == pytest.approx(0.372)
    assert candidate["latency.p50"].candidate == "rtn"
    assert candidate["latency.p50"].simulated
    assert candidate["latency.p50"].unit == "s"
    assert candidate["latency.p50"].convention == "prefill"
    assert candidate["latency.ratio"].unit == ""
    assert baseline["latency.p50"].candidate == "none"
    assert not baseline["latency.p50"].simulated


def fixed(machine: Machine, rounds: int, **options: float) -> PairedLatency:
    return measure_pair(
        machine.work("a", lambda k: 10.0),
        machine.work("b", lambda k: 15.0),
        rounds=rounds,
        clocks=machine.clocks(),
        **options,  # type: ignore[arg-type]
    )


def test_rounds_alternate_their_order_after_warm_up() -> None:
    machine = Machine()
    fixed(machine, 4, warmup=2)
    assert "".join(machine.calls) == "abba" + "abbaabba"


@pytest.mark.parametrize(
    ("rounds", "confidence"), [(298, None), (300, 0.90), (366, 0.90), (368, 0.95), (500, 0.95)]
)
def test_p99_takes_enough_samples_to_bound_it(rounds: int, confidence: float | None) -> None:
    found = fixed(Machine(), rounds)
    assert len(found.rounds) == rounds
    if confidence is None:
        assert found.candidate.p99 is None
        assert "at least 299 samples" in found.candidate.p99_reason
        assert "there are 298" in found.candidate.p99_reason
        assert "latency.p99" not in found.estimates()
    else:
        assert found.candidate.p99 is not None
        assert found.candidate.p99.confidence == confidence
        assert found.candidate.p99.upper == pytest.approx(0.015)
        assert found.candidate.p99_reason == ""


@pytest.mark.parametrize(("rounds", "confidence"), [(28, None), (30, 0.90), (34, 0.90), (36, 0.95)])
def test_p90_takes_enough_samples_to_bound_it(rounds: int, confidence: float | None) -> None:
    """0.9^28 is 0.052, 0.9^29 is 0.047, 0.9^36 is 0.023."""
    found = fixed(Machine(), rounds)
    if confidence is None:
        assert found.candidate.p90 is None
        assert "p90 needs at least 29 samples" in found.candidate.p90_reason
        assert "there are 28" in found.candidate.p90_reason
        assert found.estimates().keys() == {"latency.p50", "latency.ratio"}
    else:
        assert found.candidate.p90 is not None
        assert found.candidate.p90.confidence == confidence
        assert found.candidate.p90.upper == pytest.approx(0.015)


def test_measures_are_named_after_their_phase() -> None:
    machine = Machine()
    found = measure_pair(
        machine.work("a", lambda k: 10.0),
        machine.work("b", lambda k: 15.0),
        rounds=40,
        phase="decode.",
        clocks=machine.clocks(),
    )
    assert found.estimates().keys() == {
        "latency.decode.p50",
        "latency.decode.p90",
        "latency.decode.ratio",
    }
    assert found.baseline_estimates().keys() == {"latency.decode.p50", "latency.decode.p90"}


def test_what_comes_between_rounds_is_not_timed() -> None:
    machine = Machine()
    measure = machine.work("between", lambda k: 1000.0)
    found = measure_pair(
        machine.work("a", lambda k: 10.0),
        machine.work("b", lambda k: 15.0),
        rounds=4,
        warmup=2,
        clocks=machine.clocks(),
        between=measure,
    )
    assert machine.calls == [
        *["between", "a", "b", "between", "b", "a"],
        *["between", "a", "b", "between", "b", "a"] * 2,
    ]
    assert {each.wall for each in found.rounds} == {25 * MILLISECOND}
    assert float(found.ratio) == pytest.approx(1.5)


def test_the_floor_goes_with_the_ratio_alone() -> None:
    found = replace(fixed(Machine(), 40), floor=0.02, floor_note="itself 1.01 [0.99, 1.02]")
    assert found.ratio.floor == 0.02
    assert found.ratio.detail.endswith("; itself 1.01 [0.99, 1.02]")
    assert found.candidate.p50.floor is None
    assert PairedLatency.from_dict(found.to_dict()) == found


def test_sampling_goes_on_for_the_least_time_and_ends_after_the_most() -> None:
    # A round takes 25 ms.
    assert len(fixed(Machine(), 2, min_seconds=1.0).rounds) == 40
    assert len(fixed(Machine(), 1000, max_seconds=1.0).rounds) == 40
    assert len(fixed(Machine(), 1000, max_seconds=0.0).rounds) == 2
    assert len(fixed(Machine(), 7).rounds) == 8


def test_a_permanently_disturbed_measurement_is_tried_twice_and_not_reported() -> None:
    machine = Machine(cpu_share=lambda call: 0.4)
    found = fixed(machine, 20, warmup=0)
    assert found.disturbed
    assert found.attempts == 2
    assert len(machine.calls) == 80
    assert found.cpu_share == pytest.approx(0.4, rel=1e-3)
    assert len(found.rounds) == 20
    assert found.rounds[0].baseline == 25 * MILLISECOND
    for name in ("baseline", "candidate", "ratio"):
        with pytest.raises(NotMeasuredError, match=r"in 20 of 20 rounds.*got 40%.*2 attempt"):
            getattr(found, name)


def test_a_second_attempt_may_succeed() -> None:
    machine = Machine(cpu_share=lambda call: 0.3 if call < 40 else 1.0)
    found = fixed(machine, 20, warmup=0)
    assert not found.disturbed
    assert found.attempts == 2
    assert float(found.ratio) == pytest.approx(1.5)


def test_a_few_disturbed_rounds_are_left_out_of_both_sides() -> None:
    # Calls 8 and 31 belong to rounds 4 and 15, one to each side; each would be the largest sample.
    machine = Machine(cpu_share=lambda call: 0.2 if call in (8, 31) else 1.0)
    found = fixed(machine, 400, warmup=0)
    assert not found.disturbed
    assert found.attempts == 1
    assert len(found.quiet) == 398
    assert max(each.wall for each in found.rounds) > 50 * MILLISECOND
    assert found.candidate.p50.n == 398
    for side, seconds in ((found.baseline, 0.010), (found.candidate, 0.015)):
        assert side.p99 is not None
        assert side.p99.upper == pytest.approx(seconds)
    assert "2 disturbed ones left out" in found.ratio.detail


def test_rounds_too_short_to_be_hit_often_are_disturbed_by_what_they_lost_together() -> None:
    """A hog takes every other 4 ms of the core: one round of 0.2 ms in 20 holds its turn."""
    machine = Machine()

    def work() -> None:
        machine.now += MILLISECOND // 10
        machine.cpu += MILLISECOND / 10
        if machine.cpu % (4 * MILLISECOND) == 0:
            machine.now += 4 * MILLISECOND
            machine.preempted += 1

    found = measure_pair(work, work, rounds=400, warmup=0, clocks=machine.clocks())
    assert len(found.quiet) == 380
    assert found.cpu_share == pytest.approx(0.5)
    assert found.disturbed
    with pytest.raises(NotMeasuredError, match="got 50%"):
        found.ratio  # noqa: B018


def test_a_rare_short_interruption_is_no_disturbance() -> None:
    """One round in 50 loses a tenth of a second's thousandth part; another is hit hard, once."""
    quiet = Round(baseline=10_000, candidate=15_000, cpu=24_900, wall=25_100, switches=0)
    hit = Round(baseline=10_000, candidate=60_000, cpu=25_000, wall=70_000, switches=1)
    found = PairedLatency((*[quiet] * 98, hit, hit), threads=1)
    assert not found.disturbed
    assert len(found.quiet) == 98


def test_with_several_threads_idle_cores_alone_are_no_disturbance() -> None:
    """Work that keeps one of two threads busy has a share of one half, but is not preempted."""
    quiet = Round(baseline=10, candidate=15, cpu=26, wall=26, switches=0)
    preempted = Round(baseline=10, candidate=15, cpu=26, wall=26, switches=5)
    assert not PairedLatency((quiet,) * 10, threads=2).disturbed
    assert PairedLatency((preempted,) * 10, threads=2).disturbed
    assert not PairedLatency((preempted,) * 10, threads=1).disturbed
    # A single thread that waits without being preempted is disturbed all the same.
    waiting = Round(baseline=10, candidate=15, cpu=13, wall=26, switches=0)
    assert PairedLatency((waiting,) * 10, threads=1).disturbed


def test_raw_rounds_survive_json() -> None:
    found = fixed(Machine(), 20)
    again = PairedLatency.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again.ratio == found.ratio


def test_threads_and_garbage_collection_are_set_back() -> None:
    before = torch.get_num_threads()
    during: list[tuple[int, bool]] = []

    def call() -> None:
        during.append((torch.get_num_threads(), gc.isenabled()))
        math.factorial(2000)

    measure_pair(call, call, rounds=2, threads=before + 1)
    assert set(during) == {(before + 1, False)}
    assert torch.get_num_threads() == before
    assert gc.isenabled()

    def failing() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError):
        measure_pair(call, failing, rounds=2, threads=before + 1)
    assert torch.get_num_threads() == before
    assert gc.isenabled()


def test_real_clocks_read_something() -> None:
    found = measure_pair(
        lambda: math.factorial(3000), lambda: math.factorial(3000), rounds=4, warmup=0
    )
    assert len(found.rounds) == 4
    for each in found.rounds:
        assert each.wall >= each.baseline + each.candidate > 0
        assert each.switches >= 0


def test_impossible_arguments_and_clocks_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds, threads >= 1"):
        measure_pair(list, list, rounds=0)
    with pytest.raises(ValueError, match="min_seconds <= max_seconds"):
        measure_pair(list, list, min_seconds=3, max_seconds=2)
    stopped = Clocks(wall=lambda: 5, cpu=lambda: 5, switches=lambda: 0)
    with pytest.raises(MetricError, match="no time by the clock"):
        measure_pair(list, list, rounds=2, clocks=stopped)
