"""Latency of a candidate beside its baseline, measured in alternation in one process.

Absolute times move by factors with whatever else the machine does; the ratio of two things timed
in turns moves far less. A round times both, in the order AB, then BA. The CPU time that the process
got during a round, over the wall time, tells whether another process held its cores: such rounds
are left out. Where they are many, or the process was short of CPU time over all rounds together
(rounds far shorter than a turn of the scheduler's are rarely hit themselves), the measurement is
repeated once and then reported as not made.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import torch

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.estimate import Estimate
from pytest_qlab.stats.bootstrap import median_ratio
from pytest_qlab.stats.intervals import sample_quantile, samples_to_bound

QUIET_CPU_SHARE = 0.85
"""A round is disturbed if the process got less of its threads' CPU time than this share."""
SWITCHES_PER_ROUND = 1.0
"""With several threads a low share may be the work's own; preempted more often, it is not."""
DISTURBED_ROUNDS = 0.1
"""A measurement is disturbed if more than this share of its rounds is."""
_NANOSECONDS = 1e-9
_FEWEST_ROUNDS = 2


def involuntary_switches() -> int:
    """How often the kernel took a core from this process; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass(frozen=True)
class Clocks:
    """What time is read from: nanoseconds of the wall, of the process's CPUs, and preemptions."""

    wall: Callable[[], int] = time.perf_counter_ns
    cpu: Callable[[], int] = time.process_time_ns
    switches: Callable[[], int] = involuntary_switches


@dataclass(frozen=True)
class Round:
    """One paired sample, nanoseconds: both calls, and the CPU and wall time of the round."""

    baseline: int
    candidate: int
    cpu: int
    wall: int
    switches: int


@dataclass(frozen=True)
class LatencyQuantiles:
    """Of one side, seconds; `p90` or `p99` is None where its reason says why."""

    p50: Estimate
    p90: Estimate | None
    p99: Estimate | None
    p90_reason: str
    p99_reason: str

    def known(self) -> list[Estimate]:
        """Those that are bounded."""
        return [each for each in (self.p50, self.p90, self.p99) if each is not None]


@dataclass(frozen=True)
class PairedLatency:
    """Rounds of baseline and candidate, and what follows from them.

    The raw rounds are always there. The properties that give estimates raise
    `NotMeasuredError` if the measurement was disturbed, because such numbers must be neither passed
    nor failed.

    Attributes:
        phase: comes after `latency.` in the measures' names, such as `decode.`, or is empty.
        floor: how far from 1 the baseline's ratio to itself may be on this machine, or None;
            floor_note: in words, for the detail of the ratio.
    """

    rounds: tuple[Round, ...]
    threads: int
    attempts: int = 1
    candidate_id: str = ""
    baseline_id: str = "baseline"
    convention: str = ""
    simulated: bool = False
    seed: int = 0
    phase: str = ""
    floor: float | None = None
    floor_note: str = ""

    @cached_property
    def quiet(self) -> tuple[Round, ...]:
        """The rounds that no other process disturbed."""
        return tuple(each for each in self.rounds if not self._is_disturbed(each))

    def _is_disturbed(self, each: Round) -> bool:
        share = each.cpu / (each.wall * self.threads) if each.wall else 1.0
        preempted = self.threads == 1 or each.switches > SWITCHES_PER_ROUND
        return share < QUIET_CPU_SHARE and preempted

    @property
    def disturbed(self) -> bool:
        """Whether too many rounds, or too much of their time, were disturbed to trust the rest."""
        if len(self.rounds) - len(self.quiet) > DISTURBED_ROUNDS * len(self.rounds):
            return True
        return self.threads == 1 and self.cpu_share < QUIET_CPU_SHARE

    @property
    def cpu_share(self) -> float:
        """CPU time over wall time and threads, of all rounds; about 1 on a quiet machine."""
        wall = sum(each.wall for each in self.rounds) * self.threads
        return sum(each.cpu for each in self.rounds) / wall if wall else 1.0

    @cached_property
    def baseline(self) -> LatencyQuantiles:
        """Quantiles of the baseline."""
        return self._quantiles(self.baseline_id, [r.baseline for r in self.usable()], False)

    @cached_property
    def candidate(self) -> LatencyQuantiles:
        """Quantiles of the candidate."""
        return self._quantiles(
            self.candidate_id, [r.candidate for r in self.usable()], self.simulated
        )

    @cached_property
    def ratio(self) -> Estimate:
        """Median latency of the candidate over that of the baseline; below 1 it is faster.

        The interval comes from resampling rounds, so that what moves both in a round cancels.
        """
        rounds = self.usable()
        value, lower, upper = median_ratio(
            [r.candidate for r in rounds], [r.baseline for r in rounds], seed=self.seed
        )
        return self._estimate(
            "ratio", self.candidate_id, value, lower, upper, 0.95, self.simulated, is_ratio=True
        )

    def estimates(self) -> dict[str, Estimate]:
        """The candidate's p50, p90 and p99 (where they are bounded) and ratio, by full name."""
        return {each.metric: each for each in (*self.candidate.known(), self.ratio)}

    def baseline_estimates(self) -> dict[str, Estimate]:
        """The baseline's p50, and p90 and p99 where they are bounded, by full name."""
        return {each.metric: each for each in self.baseline.known()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, raw rounds included."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        rest = dict(fields)
        rounds = tuple(Round(**each) for each in rest.pop("rounds"))
        return cls(rounds=rounds, **rest)

    def usable(self) -> tuple[Round, ...]:
        """The quiet rounds, if they are enough.

        Raises:
            NotMeasuredError: too many rounds were disturbed.
        """
        if self.disturbed:
            raise NotMeasuredError(
                f"Latency was not measured: in {len(self.rounds) - len(self.quiet)} of "
                f"{len(self.rounds)} rounds another process held the CPU (this one got "
                f"{self.cpu_share:.0%} of {self.threads} thread(s)), after {self.attempts} "
                "attempt(s). Run on a quiet machine, stop other work, or measure with fewer "
                "threads."
            )
        return self.quiet

    def _quantiles(self, who: str, samples: list[int], simulated: bool) -> LatencyQuantiles:
        seconds = [sample * _NANOSECONDS for sample in samples]
        half = sample_quantile(seconds, 0.5)
        p50 = self._estimate("p50", who, half.value, half.lower, half.upper, 0.95, simulated)
        p90, p90_reason = self._tail("p90", 0.9, who, seconds, simulated)
        p99, p99_reason = self._tail("p99", 0.99, who, seconds, simulated)
        return LatencyQuantiles(p50, p90, p99, p90_reason, p99_reason)

    def _tail(
        self, name: str, quantile: float, who: str, seconds: list[float], simulated: bool
    ) -> tuple[Estimate | None, str]:
        """A high quantile, or why there is none."""
        needed = samples_to_bound(quantile)
        if len(seconds) < needed:
            return None, (
                f"{name} needs at least {needed} samples to be bounded from above at 95 %; there "
                f"are {len(seconds)}"
            )
        confidence = 0.95
        tail = sample_quantile(seconds, quantile, confidence)
        if tail.upper is None:
            # Enough for 95 % on each side, not yet for 97.5 %.
            confidence = 0.9
            tail = sample_quantile(seconds, quantile, confidence)
        found = self._estimate(name, who, tail.value, tail.lower, tail.upper, confidence, simulated)
        return found, ""

    def _estimate(
        self,
        name: str,
        who: str,
        value: float,
        lower: float | None,
        upper: float | None,
        confidence: float,
        simulated: bool,
        *,
        is_ratio: bool = False,
    ) -> Estimate:
        left_out = len(self.rounds) - len(self.quiet)
        detail = f"{len(self.quiet)} paired rounds on {self.threads} thread(s)"
        if left_out:
            detail += f", {left_out} disturbed ones left out"
        if is_ratio and self.floor_note:
            detail += f"; {self.floor_note}"
        return Estimate(
            value,
            metric=f"latency.{self.phase}{name}",
            candidate=who,
            lower=lower,
            upper=upper,
            confidence=confidence,
            n=len(self.quiet),
            floor=self.floor if is_ratio else None,
            unit="" if is_ratio else "s",
            convention=self.convention,
            simulated=simulated,
            detail=detail,
        )


def measure_pair(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    rounds: int = 400,
    warmup: int = 5,
    threads: int = 1,
    min_seconds: float = 0.0,
    max_seconds: float = 60.0,
    clocks: Clocks | None = None,
    candidate_id: str = "",
    baseline_id: str = "baseline",
    convention: str = "",
    simulated: bool = False,
    phase: str = "",
    between: Callable[[], object] = lambda: None,
) -> PairedLatency:
    """Time two calls in alternation; once more if the first measurement was disturbed.

    Calls on a GPU must synchronise before they return. Garbage collection is off while samples are
    taken, and the number of torch's threads is set back afterwards.

    Args:
        rounds: how many at least; 299 are the fewest that bound p99.
        warmup: rounds that are not kept.
        threads: for torch to use within an operation.
        min_seconds: more rounds are run until this has passed.
        max_seconds: an attempt ends after this even with fewer rounds (never below two).
        candidate_id, baseline_id, convention, simulated, phase: passed on to the estimates.
        between: called before each round, outside of what is timed.

    Raises:
        ValueError: a number is out of range.
        MetricError: a call took no time by the clock.
    """
    if rounds < 1 or warmup < 0 or threads < 1 or min_seconds > max_seconds:
        raise ValueError("measure_pair needs rounds, threads >= 1 and min_seconds <= max_seconds")
    read = clocks or Clocks()
    with _sampling(threads):
        for number in range(warmup):
            between()
            _round(baseline, candidate, number, read)
        for attempt in (1, 2):
            found = PairedLatency(
                tuple(
                    _rounds(baseline, candidate, rounds, min_seconds, max_seconds, read, between)
                ),
                threads=threads,
                attempts=attempt,
                candidate_id=candidate_id,
                baseline_id=baseline_id,
                convention=convention,
                simulated=simulated,
                phase=phase,
            )
            if not found.disturbed:
                break
    if any(min(each.baseline, each.candidate) <= 0 for each in found.rounds):
        raise MetricError(
            "A call took no time by the clock, so no latency can be compared. Time a longer input."
        )
    return found


@contextmanager
def _sampling(threads: int) -> Iterator[None]:
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        torch.set_num_threads(before)


def _rounds(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    rounds: int,
    min_seconds: float,
    max_seconds: float,
    read: Clocks,
    between: Callable[[], object],
) -> Iterator[Round]:
    started = read.wall()
    done = 0
    while True:
        between()
        yield _round(baseline, candidate, done, read)
        done += 1
        elapsed = (read.wall() - started) * _NANOSECONDS
        # Both orders equally often: what comes second may find warmer caches.
        if done % 2 or done < _FEWEST_ROUNDS:
            continue
        if elapsed >= max_seconds or (done >= rounds and elapsed >= min_seconds):
            return


def _round(
    baseline: Callable[[], object], candidate: Callable[[], object], number: int, read: Clocks
) -> Round:
    switches, cpu, wall = read.switches(), read.cpu(), read.wall()
    if number % 2 == 0:
        first, second = _timed(baseline, read), _timed(candidate, read)
    else:
        second, first = _timed(candidate, read), _timed(baseline, read)
    return Round(
        baseline=first,
        candidate=second,
        wall=read.wall() - wall,
        cpu=read.cpu() - cpu,
        switches=read.switches() - switches,
    )


def _timed(call: Callable[[], object], read: Clocks) -> int:
    started = read.wall()
    result = call()
    taken = read.wall() - started
    del result  # freeing it is not part of the call
    return taken
