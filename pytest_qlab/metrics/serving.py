"""What the users of a server under load see: percentiles over requests, tokens a second.

TTFT is the first token's time less the time of sending; TPOT is (E2E - TTFT) / (n - 1), over the
tokens after the first; ITL are the gaps between tokens. Percentiles are over requests. Whoever
drives (`load.py`) needs only a clock, so that a simulated server gives exact numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from pytest_qlab.engines.server import Reply
from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import Estimate
from pytest_qlab.stats.distributions import t_quantile
from pytest_qlab.stats.intervals import sample_quantile, samples_to_bound

QUANTILES = (0.5, 0.9, 0.99)
PARTS = 10
"""Parts of the measured time whose tokens are counted by themselves, for an interval."""


@dataclass(frozen=True)
class Load:
    """How requests come: `concurrency` clients in a closed loop, or `rate` a second, at random."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        one = (self.concurrency is None) != (self.rate is None)
        clients = self.concurrency is None or self.concurrency >= 1
        arrivals = self.rate is None or 0 < self.rate < float("inf")
        if not one or not clients or not arrivals:
            raise MetricError(
                f"A load is either a concurrency of 1 or more, or a rate above 0 in requests a "
                f"second; given concurrency={self.concurrency!r} and rate={self.rate!r}. Give one "
                "of the two."
            )

    @property
    def name(self) -> str:
        """As in the names of measures: `4`, or `rate=2.5`."""
        return str(self.concurrency) if self.rate is None else f"rate={self.rate:g}"

    @classmethod
    def named(cls, name: str) -> Self:
        """The inverse of `name`.

        Raises:
            MetricError: the name is none of a load.
        """
        kind, equals, number = name.rpartition("=")
        try:
            if equals and kind == "rate":
                return cls(rate=float(number))
            return cls(concurrency=int(name))
        except ValueError as error:
            raise MetricError(
                f"{name!r} is not a load. Write a number of clients, as in "
                "serving.ttft.p50[4], or a rate in requests a second, as in "
                "serving.ttft.p50[rate=2.5]."
            ) from error

    def __str__(self) -> str:
        return f"closed{self.concurrency}" if self.rate is None else f"poisson{self.rate:g}"


def loads_named(concurrency: str | None, rate: str | None) -> list[Load]:
    """The loads of two lists such as `1,2,4,8` and `0.5,2`; the former if neither is given.

    Raises:
        MetricError: something in them is no load.
    """
    clients = concurrency if concurrency or rate else "1,2,4,8"
    names = [each.strip() for each in (clients or "").split(",") if each.strip()]
    rates = [f"rate={each.strip()}" for each in (rate or "").split(",") if each.strip()]
    return [Load.named(name) for name in (*names, *rates)]


@dataclass(frozen=True)
class Limits:
    """When a run ends: requests that count, those before them, seconds, and failures it bears."""

    requests: int = 320
    warmup: int | None = None
    seconds: float = 60.0
    failures: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1 or (self.warmup or 0) < 0 or self.seconds <= 0 or self.failures < 0:
            raise MetricError(
                "A run under load needs at least 1 request, a time above 0 seconds, and neither a "
                f"negative warm-up nor negative failures; given {self}."
            )


@dataclass(frozen=True)
class ServingRun:
    """All replies of a run, in the order of their requests, and which of them count.

    Attributes:
        first, last: numbers of the requests that count, the last one excluded.
        tokens: how many each request asked for.
        stopped: why the run ended: `requests`, `seconds` or `over-saturated`.
    """

    load: Load
    tokens: int
    replies: tuple[Reply, ...]
    first: int
    last: int
    stopped: str

    @property
    def saturated(self) -> bool:
        """Whether requests came faster than they were served, so that waiting grew and grew."""
        return self.stopped == "over-saturated"

    @property
    def measured(self) -> tuple[Reply, ...]:
        """The replies that count, without those that failed."""
        counted = range(self.first, self.last)
        return tuple(each for each in self.replies if each.number in counted and not each.error)

    @property
    def failed(self) -> int:
        """How many requests failed."""
        return sum(1 for each in self.replies if each.error)

    @property
    def drift(self) -> float:
        """Mean length of the replies over the length that was asked for; 1 where it was kept."""
        counted = self.measured
        return sum(each.tokens for each in counted) / (len(counted) * self.tokens)

    @property
    def wrong_lengths(self) -> int:
        """How many replies have another length than was asked for."""
        return sum(1 for each in self.measured if each.tokens != self.tokens)

    @property
    def unverified(self) -> int:
        """How many replies may have another length: their chunks are fewer or more than tokens.

        Nothing else was counted. A chunk brings a token or more, and no reply is longer than was
        asked for, so as many chunks as tokens are that many tokens.
        """
        unknown = [each for each in self.measured if each.counted == "chunks"]
        return sum(1 for each in unknown if each.tokens != self.tokens)

    @property
    def cut_off(self) -> int:
        """How many replies were too short, and their server gave no reason for their end."""
        short = [each for each in self.measured if each.tokens < self.tokens]
        return sum(1 for each in short if not each.finish)

    @property
    def cached_share(self) -> float | None:
        """Of the prompts' tokens, the share that the server says it had in a cache of prefixes.

        None if it says so of no reply; of a reply that had none, some servers say nothing.
        """
        known = [each for each in self.measured if each.prompt_tokens]
        if all(each.cached_tokens is None for each in known):
            return None
        return sum(each.cached_tokens or 0 for each in known) / sum(
            each.prompt_tokens or 0 for each in known
        )

    def ttft(self) -> list[float]:
        """Seconds to the first token, of each reply."""
        return [each.ttft for each in self.measured]

    def tpot(self) -> list[float]:
        """Seconds per token after the first, of each reply that has any."""
        return [each.tpot for each in self.measured if each.tpot is not None]

    def itl(self) -> list[float]:
        """All gaps between chunks of all replies, seconds."""
        return [gap for each in self.measured for gap in each.gaps]

    def parts(self) -> tuple[float, list[int]]:
        """Length in seconds of one part of the measured time, and the tokens that came in each."""
        counted = self.measured
        start = min(each.sent for each in counted)
        end = max(each.times[-1] for each in counted)
        found = [0] * PARTS
        for reply in self.replies:
            for time, count in zip(reply.times, reply.counts, strict=True):
                if start < time <= end:
                    place = int((time - start) / (end - start) * PARTS)
                    found[min(place, PARTS - 1)] += count
        return (end - start) / PARTS, found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **asdict(self),
            "load": asdict(self.load),
            "replies": [each.to_dict() for each in self.replies],
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        load = Load(**fields["load"])
        replies = tuple(Reply.from_dict(each) for each in fields["replies"])
        return cls(**{**fields, "load": load, "replies": replies})

    def estimates(
        self, candidate: str = "", *, convention: str = "", simulated: bool = False
    ) -> tuple[dict[str, Estimate], dict[str, str]]:
        """serving.ttft.*, serving.tpot.* and serving.tokens_per_second, each with the load's name.

        Returns:
            The estimates, and for every percentile that there are too few requests for, the reason.

        Raises:
            MetricError: the server was over-saturated: then no percentile is a number of its own,
                as it grows with the length of the run.
        """
        if self.saturated:
            raise MetricError(
                f"{candidate or 'The server'} cannot serve {self.load.rate:g} requests a second: "
                f"after {len(self.replies)} replies, both the time to the first token and the "
                "number of requests in flight still grew. Lower the rate, or measure a closed loop "
                "(concurrency=...), which tells how many tokens a second it can do."
            )
        fields: dict[str, Any] = {
            "candidate": candidate,
            "convention": convention or f"{self.load}, {self.tokens} tokens out",
            "simulated": simulated,
            "detail": f"{len(self.measured)} requests, ended by the limit of {self.stopped}",
        }
        found: dict[str, Estimate] = {}
        missing: dict[str, str] = {}
        for what, values in (("ttft", self.ttft()), ("tpot", self.tpot())):
            for quantile in QUANTILES:
                metric = f"serving.{what}.p{100 * quantile:.0f}[{self.load.name}]"
                needed = samples_to_bound(quantile)
                if len(values) < needed:
                    missing[metric] = (
                        f"it needs {needed} requests to be bounded from above at 95 %, and there "
                        f"are {len(values)}"
                    )
                    continue
                found[metric] = _quantile(metric, values, quantile, fields)
        rate = f"serving.tokens_per_second[{self.load.name}]"
        found[rate] = self._rate(rate, fields)
        return found, missing

    def _rate(self, metric: str, fields: dict[str, Any]) -> Estimate:
        """Tokens of all requests over the measured time; the interval is that of its parts."""
        seconds, parts = self.parts()
        if seconds <= 0:
            raise MetricError(
                "All tokens came at the same moment by the clock, so there is no rate of tokens. "
                "Ask for more requests or more tokens."
            )
        mean = sum(parts) / PARTS
        variance = sum((each - mean) ** 2 for each in parts) / (PARTS - 1)
        half = t_quantile(0.975, PARTS - 1) * (variance / PARTS) ** 0.5 / seconds
        value = mean / seconds
        return Estimate(
            value,
            metric=metric,
            lower=max(0.0, value - half),
            upper=value + half,
            n=len(self.measured),
            unit="tokens/s",
            **fields,
        )


def _quantile(
    metric: str, values: Sequence[float], quantile: float, fields: dict[str, Any]
) -> Estimate:
    confidence = 0.95
    found = sample_quantile(values, quantile, confidence)
    if found.upper is None:  # Enough for 95 % on each side, not yet for 97.5 %.
        confidence = 0.9
        found = sample_quantile(values, quantile, confidence)
    return Estimate(
        found.value,
        metric=metric,
        lower=found.lower,
        upper=found.upper,
        confidence=confidence,
        n=len(values),
        unit="s",
        **fields,
    )


class Percentiles:
    """`p50`, `p90` and `p99` of one quantity over requests, seconds."""

    def __init__(self, what: str, load: str, serving: Serving) -> None:
        self._name = f"serving.{what}.p{{}}[{load}]"
        self._serving = serving

    @property
    def p50(self) -> Estimate:
        """Median."""
        return self._serving[self._name.format(50)]

    @property
    def p90(self) -> Estimate:
        """90th percentile.

        Raises:
            MetricError: there are too few requests to bound it.
        """
        return self._serving[self._name.format(90)]

    @property
    def p99(self) -> Estimate:
        """99th percentile.

        Raises:
            MetricError: there are too few requests to bound it.
        """
        return self._serving[self._name.format(99)]


class Serving:
    """A model under one load: `ttft` and `tpot` (seconds), and `tokens_per_second` of them all."""

    def __init__(self, run: ServingRun, estimates: dict[str, Estimate], missing: dict[str, str]):
        self.run = run
        self.estimates = estimates
        self._missing = missing
        self.ttft = Percentiles("ttft", run.load.name, self)
        self.tpot = Percentiles("tpot", run.load.name, self)

    @property
    def tokens_per_second(self) -> Estimate:
        """Generated tokens of all requests together, per second."""
        return self[f"serving.tokens_per_second[{self.run.load.name}]"]

    def __getitem__(self, metric: str) -> Estimate:
        """A measure by its name, the load's included.

        Raises:
            MetricError: there are too few requests for it.
        """
        if metric not in self.estimates:
            reason = self._missing.get(metric, "there is no such measure")
            raise MetricError(
                f"{metric} was not measured: {reason}. Allow more: requests=... and max_seconds=..."
            )
        return self.estimates[metric]
