"""Latency of a candidate beside its baseline, measured in alternation in one process.

Absolute times move by factors with whatever else the machine does; the ratio of two things timed
in turns moves far less. A round times both, in the order AB, then BA. The CPU time that the process
got during a round, over the wall time, tells whether another process held its cores: such rounds
are left out, and where they are many the measurement is repeated once and then reported as not
made.
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
    """Of one side, seconds; `p99` is None where `p99_reason` says why."""

    p50: Estimate
    p99: Estimate | None
    p99_reason: str


@dataclass(frozen=True)
class PairedLatency:
    """Rounds of baseline and candidate, and what follows from them.

    The raw rounds are always there. The properties that give estimates raise
    `NotMeasuredError` if the measurement was disturbed, because such numbers must be neither passed
    nor failed.
    """

    rounds: tuple[Round, ...]
    threads: int
    attempts: int = 1
    candidate_id: str = ""
    baseline_id: str = "baseline"
    convention: str = ""
    simulated: bool = False
    seed: int = 0

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
        """Whether too many rounds were disturbed for the rest to be trusted."""
        return len(self.rounds) - len(self.quiet) > DISTURBED_ROUNDS * len(self.rounds)

    @property
    def cpu_share(self) -> float:
        """CPU time over wall time and threads, of all rounds; about 1 on a quiet machine."""
        wall = sum(each.wall for each in self.rounds) * self.threads
        return sum(each.cpu for each in self.rounds) / wall if wall else 1.0

    @cached_property
    def baseline(self) -> LatencyQuantiles:
        """p50 and p99 of the baseline."""
        return self._quantiles(self.baseline_id, [r.baseline for r in self.usable()], False)

    @cached_property
    def candidate(self) -> LatencyQuantiles:
        """p50 and p99 of the candidate."""
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
            "latency.ratio", self.candidate_id, value, lower, upper, 0.95, "", self.simulated
        )

    def estimates(self) -> dict[str, Estimate]:
        """The candidate's latency.p50, latency.p99 (if it is bounded) and latency.ratio."""
        found = [self.candidate.p50, self.candidate.p99, self.ratio]
        return {each.metric: each for each in found if each is not None}

    def baseline_estimates(self) -> dict[str, Estimate]:
        """The baseline's latency.p50, and latency.p99 if it is bounded."""
        found = [self.baseline.p50, self.baseline.p99]
        return {each.metric: each for each in found if each is not None}

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
        p50 = self._estimate(
            "latency.p50", who, half.value, half.lower, half.upper, 0.95, "s", simulated
        )
        needed = samples_to_bound(0.99)
        if len(seconds) < needed:
            reason = (
                f"p99 needs at least {needed} samples to be bounded from above at 95 %; there are "
                f"{len(seconds)}"
            )
            return LatencyQuantiles(p50, None, reason)
        confidence = 0.95
        tail = sample_quantile(seconds, 0.99, confidence)
        if tail.upper is None:
            # Enough for 95 % on each side, not yet for 97.5 %.
            confidence = 0.9
            tail = sample_quantile(seconds, 0.99, confidence)
        p99 = self._estimate(
            "latency.p99", who, tail.value, tail.lower, tail.upper, confidence, "s", simulated
        )
        return LatencyQuantiles(p50, p99, "")

    def _estimate(
        self,
        metric: str,
        who: str,
        value: float,
        lower: float | None,
        upper: float | None,
        confidence: float,
        unit: str,
        simulated: bool,
    ) -> Estimate:
        left_out = len(self.rounds) - len(self.quiet)
        return Estimate(
            value,
            metric=metric,
            candidate=who,
            lower=lower,
            upper=upper,
            confidence=confidence,
            n=len(self.quiet),
            unit=unit,
            convention=self.convention,
            simulated=simulated,
            detail=(
                f"{len(self.quiet)} paired rounds on {self.threads} thread(s)"
                f"{f', {left_out} disturbed ones left out' if left_out else ''}"
            ),
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
        candidate_id, baseline_id, convention, simulated: passed on to the estimates.

    Raises:
        ValueError: a number is out of range.
        MetricError: a call took no time by the clock.
    """
    if rounds < 1 or warmup < 0 or threads < 1 or min_seconds > max_seconds:
        raise ValueError("measure_pair needs rounds, threads >= 1 and min_seconds <= max_seconds")
    read = clocks or Clocks()
    with _sampling(threads):
        for number in range(warmup):
            _round(baseline, candidate, number, read)
        for attempt in (1, 2):
            found = PairedLatency(
                tuple(_rounds(baseline, candidate, rounds, min_seconds, max_seconds, read)),
                threads=threads,
                attempts=attempt,
                candidate_id=candidate_id,
                baseline_id=baseline_id,
                convention=convention,
                simulated=simulated,
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
) -> Iterator[Round]:
    started = read.wall()
    done = 0
    while True:
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
