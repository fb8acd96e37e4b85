"""Latency of a candidate as its users read it: by phase, timed when it is first read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qlab.errors import MetricError, did_you_mean
from pytest_qlab.measuring.claims import refuse_simulated
from pytest_qlab.measuring.speed import PHASES, PREFILL, Phase, measure_latency

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.estimate import Estimate
    from pytest_qlab.metrics.latency import LatencyQuantiles, PairedLatency

_NAMES = ("p50", "p90", "p99", "ratio")


class Quantiles:
    """Latency of one model in one phase, in seconds."""

    def __init__(self, found: LatencyQuantiles) -> None:
        self._found = found

    @property
    def p50(self) -> Estimate:
        """Median."""
        return self._found.p50

    @property
    def p90(self) -> Estimate:
        """90th percentile.

        Raises:
            MetricError: there are too few samples to bound it.
        """
        return _bounded("90th", self._found.p90, self._found.p90_reason)

    @property
    def p99(self) -> Estimate:
        """99th percentile.

        Raises:
            MetricError: there are too few samples to bound it.
        """
        return _bounded("99th", self._found.p99, self._found.p99_reason)


def _bounded(which: str, found: Estimate | None, reason: str) -> Estimate:
    if found is None:
        raise MetricError(f"The {which} percentile of the latency was not measured: {reason}.")
    return found


class PhaseLatency:
    """Latency in one phase, paired with the base model's; timed when it is first read.

    Everything raises as `measure_latency` does, and the high percentiles also if there are too few
    samples to bound them.
    """

    def __init__(self, candidate: Candidate, phase: Phase) -> None:
        self._candidate = candidate
        self._phase = phase
        self._paired: PairedLatency | None = None

    @property
    def measured(self) -> PairedLatency | None:
        """The rounds if they were timed or read from the store before."""
        return self._paired

    @property
    def paired(self) -> PairedLatency:
        """The rounds that timed the candidate and the base model in turn."""
        if self._paired is None:
            self._paired = measure_latency(self._candidate, self._phase)
            self._candidate.note(self._paired.estimates())
        self._candidate.lab.timed[self._phase.prefix] = self._paired
        return self._paired

    @property
    def _own(self) -> Quantiles:
        """The candidate's; the base model's come from the rounds beside the latest candidate.

        Whoever compares the two then compares what was timed in turn, not at different times.
        """
        latest = self._candidate.lab.timed.get(self._phase.prefix)
        if self._candidate.is_baseline and latest is not None and latest is not self._paired:
            found = replace(latest, baseline_id=self._candidate.id)
            self._candidate.note(found.baseline_estimates())
            return Quantiles(found.baseline)
        return Quantiles(self.paired.candidate)

    @property
    def p50(self) -> Estimate:
        """Median, seconds; of `none`, the base model's beside the candidate that was read last."""
        return self._own.p50

    @property
    def p90(self) -> Estimate:
        """90th percentile, seconds; of `none` as `p50`."""
        return self._own.p90

    @property
    def p99(self) -> Estimate:
        """99th percentile, seconds; of `none` as `p50`."""
        return self._own.p99

    @property
    def ratio(self) -> Estimate:
        """The candidate's median over the base model's, from rounds that time both in turn.

        Its `floor` is how far from 1 the base model's ratio to itself may be.
        """
        return self.paired.ratio

    @property
    def baseline(self) -> Quantiles:
        """The base model's, from the same rounds."""
        return Quantiles(self.paired.baseline)


class Latency(PhaseLatency):
    """Latency of a prefill of 128 tokens, and in the other phases by their names.

    `p50`, `p90`, `p99` and `ratio` are those of `prefill`; `prefill512`, `decode` and `decode512`
    have their own.

    Raises:
        NotMeasuredError: the kernel is simulated and the policy is to skip.
        MetricError: the kernel is simulated and the policy is to fail.
    """

    def __init__(self, candidate: Candidate) -> None:
        refuse_simulated(candidate, "The latency")
        super().__init__(candidate, PREFILL)
        self.prefill: PhaseLatency = self
        self.prefill512 = PhaseLatency(candidate, PHASES["prefill512"])
        self.decode = PhaseLatency(candidate, PHASES["decode"])
        self.decode512 = PhaseLatency(candidate, PHASES["decode512"])

    def phases(self) -> dict[str, PhaseLatency]:
        """All phases by the prefix of their measures, the empty one first."""
        return {phase.prefix: getattr(self, name) for name, phase in PHASES.items()}

    def named(self, metric: str) -> Estimate:
        """A measure by its full name, such as `latency.decode.p99`.

        Raises:
            MetricError: there is none of that name, or it cannot be bounded.
        """
        prefix, dot, name = metric.removeprefix("latency.").rpartition(".")
        phase = self.phases().get(prefix + dot)
        if phase is None or name not in _NAMES:
            known = [f"latency.{each}{end}" for each in self.phases() for end in _NAMES]
            raise MetricError(f"There is no measure {metric!r}.{did_you_mean(metric, known)}")
        found: Estimate = getattr(phase, name)
        return found
