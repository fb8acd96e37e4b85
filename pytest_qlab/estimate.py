"""A measured number that remembers what it is: interval, sample, unit, convention, provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from pytest_qlab.directions import LATENCY_RATIOS
from pytest_qlab.errors import MetricError

if TYPE_CHECKING:
    from pytest_qlab.decision import Decision, Side

CONTIGUOUS = "-contiguous"
"""Ends the name of a convention by which windows are neighbours: no interval holds beyond them."""


@dataclass(frozen=True)
class Comparison:
    """One comparison of an estimate with a budget, made by a test.

    A careful one has an outcome, the bounds that it rests on, and the windows that it took.
    """

    candidate: str
    metric: str
    value: float
    op: str
    budget: float
    ok: bool
    outcome: str = ""
    lower: float | None = None
    upper: float | None = None
    windows: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


_observer: ContextVar[Callable[[Comparison], None] | None] = ContextVar("observer", default=None)


@contextmanager
def observe_comparisons(callback: Callable[[Comparison], None]) -> Iterator[None]:
    """Call `callback` with every comparison of an estimate made inside the block."""
    token = _observer.set(callback)
    try:
        yield
    finally:
        _observer.reset(token)


def observe(comparison: Comparison) -> None:
    """Tell whoever observes comparisons here of this one."""
    observer = _observer.get()
    if observer is not None:
        observer(comparison)


class Estimate(float):
    """A float that also carries its interval, sample size, unit, convention and provenance.

    It compares and computes like the float it is; arithmetic returns plain floats.

    Attributes:
        metric: dotted name, such as `kl.mean`.
        candidate: id of the candidate that was measured.
        lower, upper: two-sided interval at `confidence`, or None where none is defined.
        standard_error: of the value, from differences between clusters; None where none is defined.
        n: number of scored units (tokens, samples); clusters: number of independent documents.
        design_effect: squared standard error over that of independent units; None where unknown.
        floor: what the base model scores against itself under a second legal numeric path; of a
            ratio of latencies, how far from 1 that is; None where it was not measured, or where
            nothing was computed, as for an exact copy.
        unit: `nats`, `dB`, `bytes`, `s`, or empty for a pure number.
        convention: how it was measured, such as `spread512`.
        simulated: True where no kernel runs the packed bits, so that speed is not the format's.
        detail: one line for the failure message, such as `perplexity 12.31 -> 12.55`.
    """

    metric: str
    candidate: str
    lower: float | None
    upper: float | None
    confidence: float
    standard_error: float | None
    n: int | None
    clusters: int | None
    design_effect: float | None
    floor: float | None
    unit: str
    convention: str
    simulated: bool
    detail: str

    def __new__(
        cls,
        value: float,
        *,
        metric: str,
        candidate: str = "",
        lower: float | None = None,
        upper: float | None = None,
        confidence: float = 0.95,
        standard_error: float | None = None,
        n: int | None = None,
        clusters: int | None = None,
        design_effect: float | None = None,
        floor: float | None = None,
        unit: str = "",
        convention: str = "",
        simulated: bool = False,
        detail: str = "",
    ) -> Self:
        if math.isnan(value):
            raise MetricError(
                f"{metric} of {candidate or 'the model'} is not a number, so no budget can be held "
                "against it. The model's weights or activations have become NaN or infinite: "
                "evaluate in float32 (--qlab-dtype=float32) and check the checkpoint."
            )
        self = super().__new__(cls, value)
        self.metric = metric
        self.candidate = candidate
        self.lower = None if lower is None else float(lower)
        self.upper = None if upper is None else float(upper)
        self.confidence = confidence
        self.standard_error = None if standard_error is None else float(standard_error)
        self.n = n
        self.clusters = clusters
        self.design_effect = None if design_effect is None else float(design_effect)
        self.floor = None if floor is None else float(floor)
        self.unit = unit
        self.convention = convention
        self.simulated = simulated
        self.detail = detail
        return self

    @classmethod
    def exactly(
        cls, values: Mapping[str, tuple[float | None, str]], **fields: Any
    ) -> dict[str, Self]:
        """Counted numbers, whose intervals have no width, by metric.

        Args:
            values: value and unit of each metric; those without a value are left out.
            fields: the rest, alike for all.
        """
        return {
            metric: cls(value, metric=metric, lower=value, upper=value, unit=unit, **fields)
            for metric, (value, unit) in values.items()
            if value is not None
        }

    @property
    def effective_n(self) -> float | None:
        """How many independent units would be as sure: `n` over the design effect."""
        if self.n is None or not self.design_effect:
            return None
        return self.n / self.design_effect

    def within(self, budget: float, confidence: float | None = None) -> Decision:
        """Whether the measure is at most `budget`, decided at a confidence; see `Decision`.

        Measures of a candidate draw windows until they are decided. An estimate by itself, such as
        one of `fidelity`, is decided as it is.

        Args:
            budget: in the measure's unit.
            confidence: 1 - the probability that a candidate exactly at the budget passes; by
                default `--qlab-confidence`.

        Raises:
            MetricError: more is better of this measure, it has no interval, or what was given is
                not a budget or a confidence.
        """
        return self._decide("<=", budget, confidence)

    def at_least(self, budget: float, confidence: float | None = None) -> Decision:
        """Whether the measure is at least `budget`: `within` for measures of which more is better.

        Raises:
            MetricError: as `within`.
        """
        return self._decide(">=", budget, confidence)

    def _decide(self, op: Side, budget: float, confidence: float | None) -> Decision:
        from pytest_qlab.decision import Look, decide

        return decide(
            lambda: [Look(None, lambda: self)],
            op,
            budget,
            confidence,
            metric=self.metric,
            candidate=self.candidate,
            convention=self.convention,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the name: the form in which results cross processes."""
        fields = {key: value for key, value in vars(self).items() if key != "metric"}
        return {"value": float(self), **fields}

    @classmethod
    def from_dict(cls, metric: str, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        rest = dict(fields)
        return cls(rest.pop("value"), metric=metric, **rest)

    def __repr__(self) -> str:
        text = f"{float(self):.6g}"
        if self.lower is not None and self.upper is not None:
            text += f" [{self.lower:.4g}, {self.upper:.4g}]"
        return f"{text} {self.unit}".rstrip()

    def __str__(self) -> str:
        return repr(float(self))

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.metric, self.to_dict())

    __hash__ = float.__hash__

    def check_above_floor(self, op: str, budget: object) -> None:
        """Refuse to hold the measure under a budget that noise alone could exceed.

        Two estimates are only compared with each other; neither is a budget. A ratio of latencies
        may be held to a budget as near to 1 as the noise is where it is clear of it all the same.

        Raises:
            MetricError: `op` is `<` or `<=`, and the budget is below twice the noise floor, or, of
                a ratio of latencies, nearer to 1 than the floor with the ratio as near to it.
        """
        if self.metric in LATENCY_RATIOS:
            self._check_clear_of_noise(op, budget)
            return
        bounding = op in ("<", "<=") and not isinstance(budget, Estimate)
        if self.floor and bounding and isinstance(budget, int | float) and budget < 2 * self.floor:
            raise MetricError(
                f"{self.metric} of {self.candidate or 'the candidate'} cannot be held to a budget "
                f"of {budget:.4g}: the noise floor, which is what the base model gets against "
                f"itself when it is computed in another order, is {self.floor:.4g}, and a budget "
                f"has to be at least twice that. Allow {2 * self.floor:.4g} or more; the floor is "
                "lowest in float32 (--qlab-dtype)."
            )

    def _check_clear_of_noise(self, op: str, budget: object) -> None:
        if not self.floor or isinstance(budget, Estimate) or not isinstance(budget, int | float):
            return
        if max(abs(budget - 1), abs(self - budget)) < self.floor and op in ("<", "<="):
            raise MetricError(
                f"{self.metric} of {self.candidate or 'the candidate'} is {float(self):.4g} and "
                f"cannot be held to a budget of {budget:.4g}: timed against itself in the same "
                f"way, the base model differs from 1 by up to {self.floor:.2g} on this machine, so "
                f"that chance would decide. Allow {1 + self.floor:.3g} or more, or measure on a "
                "quieter machine."
            )

    def _compared(self, op: str, other: object, outcome: Any) -> Any:
        self.check_above_floor(op, other)
        if outcome is not NotImplemented and isinstance(other, int | float):
            observe(
                Comparison(
                    self.candidate, self.metric, float(self), op, float(other), bool(outcome)
                )
            )
        return outcome

    def __lt__(self, other: Any) -> Any:
        return self._compared("<", other, float.__lt__(self, other))

    def __le__(self, other: Any) -> Any:
        return self._compared("<=", other, float.__le__(self, other))

    def __gt__(self, other: Any) -> Any:
        return self._compared(">", other, float.__gt__(self, other))

    def __ge__(self, other: Any) -> Any:
        return self._compared(">=", other, float.__ge__(self, other))

    def __abs__(self) -> Estimate:
        """The distance from zero, still an estimate: `abs(quantized.perplexity_delta) < 0.1`."""
        lower, upper = self.lower, self.upper
        if float(self) < 0:
            lower, upper = _negative(upper), _negative(lower)
        if lower is not None and lower < 0:
            upper = None if upper is None else max(upper, -lower)
            lower = 0.0
        fields = {"value": abs(float(self)), "lower": lower, "upper": upper}
        return Estimate.from_dict(self.metric, {**self.to_dict(), **fields})

    def __eq__(self, other: object) -> Any:
        return float.__eq__(self, other)


def _negative(number: float | None) -> float | None:
    return None if number is None else -number


def _restore(metric: str, fields: dict[str, Any]) -> Estimate:
    return Estimate.from_dict(metric, fields)
