"""Tokens per second of prefill and decode, in turn with the base model.

A round generates once with each model from the same prompt, a fixed number of tokens, in the order
AB, then BA. Prefill is the prompt's tokens over the time to the first token; decode is the other
tokens over the time from the first to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.estimate import Estimate
from pytest_qlab.metrics.latency import DISTURBED_ROUNDS, QUIET_CPU_SHARE, Clocks
from pytest_qlab.stats.bootstrap import median_ratio
from pytest_qlab.stats.intervals import MEDIAN_SAMPLES, sample_quantile

_NANOSECONDS = 1e-9
Generation = tuple[int, int]
"""Nanoseconds to the first token, and from there to the last."""


@dataclass(frozen=True)
class GenerationRound:
    """One generation of each model, nanoseconds, and the CPU and wall time of both together."""

    baseline: Generation
    candidate: Generation
    cpu: int
    wall: int

    @property
    def disturbed(self) -> bool:
        """Whether another process held the core for a part of it."""
        return self.cpu < QUIET_CPU_SHARE * self.wall


@dataclass(frozen=True)
class PairedThroughput:
    """Rounds of generations, and what follows from them.

    Attributes:
        prompt, tokens: tokens of the prompt, and generated ones.
    """

    rounds: tuple[GenerationRound, ...]
    prompt: int
    tokens: int

    def usable(self) -> tuple[GenerationRound, ...]:
        """The rounds that nothing disturbed, if they are enough.

        Raises:
            NotMeasuredError: more than a tenth was disturbed, or fewer than 6 are left.
        """
        quiet = tuple(each for each in self.rounds if not each.disturbed)
        left_out = len(self.rounds) - len(quiet)
        if left_out > DISTURBED_ROUNDS * len(self.rounds):
            raise NotMeasuredError(
                f"Throughput was not measured: in {left_out} of {len(self.rounds)} rounds another "
                "process held the CPU. Run on a quiet machine, or stop other work."
            )
        if len(quiet) < MEDIAN_SAMPLES:
            raise NotMeasuredError(
                f"Throughput was not measured: {len(quiet)} rounds were made in the time there "
                f"was, and an interval takes {MEDIAN_SAMPLES}. Measure a smaller model here, or on "
                "a faster machine."
            )
        return quiet

    def estimates(self, candidate: str = "", *, simulated: bool = False) -> dict[str, Estimate]:
        """throughput.prefill, throughput.decode, and the ratios of both to the base model's.

        Raises:
            NotMeasuredError: as `usable`.
        """
        rounds = self.usable()
        fields: dict[str, Any] = {
            "candidate": candidate,
            "n": len(rounds),
            "convention": f"{self.prompt}+{self.tokens} tokens, one request",
            "simulated": simulated,
        }
        found: dict[str, Estimate] = {}
        for phase, place, tokens in (("prefill", 0, self.prompt), ("decode", 1, self.tokens - 1)):
            ours = [each.candidate[place] * _NANOSECONDS for each in rounds]
            theirs = [each.baseline[place] * _NANOSECONDS for each in rounds]
            middle, base = sample_quantile(ours, 0.5), sample_quantile(theirs, 0.5)
            name = f"throughput.{phase}"
            found[name] = Estimate(
                tokens / middle.value,
                metric=name,
                lower=None if middle.upper is None else tokens / middle.upper,
                upper=None if middle.lower is None else tokens / middle.lower,
                unit="tokens/s",
                detail=f"{len(rounds)} rounds; the base model: {tokens / base.value:.4g} tokens/s",
                **fields,
            )
            # Twice the speed is half the time: the base model's times are above.
            value, lower, upper = median_ratio(theirs, ours)
            found[f"{name}_ratio"] = Estimate(
                value,
                metric=f"{name}_ratio",
                lower=lower,
                upper=upper,
                detail=f"{len(rounds)} paired rounds",
                **fields,
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        rounds = tuple(
            GenerationRound(
                **{
                    **each,
                    "baseline": tuple(each["baseline"]),
                    "candidate": tuple(each["candidate"]),
                }
            )
            for each in fields["rounds"]
        )
        return cls(**{**fields, "rounds": rounds})


def measure_generations(
    baseline: Callable[[], Generation],
    candidate: Callable[[], Generation],
    *,
    prompt: int,
    tokens: int,
    rounds: int,
    max_seconds: float,
    warmup: int = 1,
    clocks: Clocks | None = None,
) -> PairedThroughput:
    """Generate in turns until there are enough rounds, or the time is over.

    Args:
        baseline, candidate: generate once and return their times; of a GPU, when it is done.
        prompt, tokens: what both generate from, and how many tokens; at least 2.
        max_seconds: no round begins after this.

    Raises:
        MetricError: a phase took no time by the clock.
        ValueError: a number is out of range.
    """
    if rounds < 1 or tokens < 2 or prompt < 1 or warmup < 0:
        raise ValueError("measure_generations needs a prompt, rounds and at least 2 tokens")
    read = clocks or Clocks()
    for _ in range(warmup):
        baseline()
        candidate()
    found: list[GenerationRound] = []
    started = read.wall()
    while len(found) < rounds and (read.wall() - started) * _NANOSECONDS < max_seconds:
        cpu, wall = read.cpu(), read.wall()
        if len(found) % 2 == 0:
            base, ours = baseline(), candidate()
        else:
            ours, base = candidate(), baseline()
        found.append(GenerationRound(base, ours, read.cpu() - cpu, read.wall() - wall))
    if any(min(*each.baseline, *each.candidate) <= 0 for each in found):
        raise MetricError(
            "A generation took no time by the clock, so it has no tokens per second. Generate from "
            "a longer prompt, or more tokens."
        )
    return PairedThroughput(tuple(found), prompt, tokens)
