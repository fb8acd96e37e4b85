"""Careful assertions: a measure held against a budget, with three outcomes at a confidence.

Source: non-inferiority with a margin fixed beforehand, in a group-sequential design. See
`stats/decisions.py` for the bounds and `stats/sequential.py` for what several looks cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

from pytest_qlab.directions import RATES, known_direction, split_domain
from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import CONTIGUOUS, Comparison, observe
from pytest_qlab.stats.decisions import Outcome, bounds, judge, windows_to_decide
from pytest_qlab.stats.distributions import t_quantile

if TYPE_CHECKING:
    from pytest_qlab.estimate import Estimate

Side = Literal["<=", ">="]
CALLS: dict[str, str] = {"<=": "within", ">=": "at_least"}
# Degrees of freedom with which Student's t is the normal distribution, for what has no clusters.
_MANY = 100_000


@dataclass(frozen=True)
class Decision:
    """What a sample of text says about a budget; true where it passes.

    Where it is inconclusive, it is what the run's policy makes of it (`--qlab-inconclusive`), and
    false without one.

    Attributes:
        outcome: `pass`, `fail` or `inconclusive`.
        metric, candidate, unit, convention, detail, n, clusters: of the estimate.
        value: the estimate after the windows that were drawn.
        standard_error: of the value; None where none is known.
        lower, upper: one-sided bounds at the level of the last look: infinite where there is none.
        op: `<=` or `>=`. budget: what the value is held against.
        confidence: 1 - the probability that a candidate exactly at the budget passes.
        looks, planned: how often the data was looked at, and how often it could have been.
        windows, most: how many windows were drawn, and how many there are; None where the measure
            is not one of evaluation windows.
    """

    outcome: Outcome
    metric: str
    candidate: str
    value: float
    lower: float
    upper: float
    op: Side
    budget: float
    confidence: float
    standard_error: float | None = None
    looks: int = 1
    planned: int = 1
    windows: int | None = None
    most: int | None = None
    n: int | None = None
    clusters: int | None = None
    design_effect: float | None = None
    unit: str = ""
    convention: str = ""
    detail: str = ""

    def __bool__(self) -> bool:
        if self.outcome is Outcome.PASS:
            return True
        policy = _policy.get()()
        if policy.react is not None:
            policy.react(self)
        return self.outcome is Outcome.INCONCLUSIVE and policy.inconclusive == "warn"

    @property
    def windows_needed(self) -> int | None:
        """About how many windows would decide, if the value is right; None where none would.

        With the confidence of the decision and a power of 80 %.
        """
        gap = self.value - self.budget
        if self.windows is None or not self.standard_error or gap == 0:
            return None
        return windows_to_decide(
            gap,
            self.standard_error,
            self.windows,
            self.clusters or _MANY,
            level=1 - self.confidence,
        )

    @property
    def sample(self) -> str:
        """On how much it rests: `16 of 64 windows`, or nothing."""
        if self.windows is None or self.most is None:
            return ""
        if self.windows == self.most:
            return f"all {self.most} windows" if self.most > 1 else "the only window"
        return f"{self.windows} of {self.most} windows"

    def __repr__(self) -> str:
        name = f"{self.metric} of {self.candidate}" if self.candidate else self.metric
        parts = [f"{name} = {_number(self.value)} {self.unit}".rstrip(), *self._bound()]
        parts.append(f"budget {self.op} {_number(self.budget)}")
        rest = f"; {self.sample}" if self.sample else ""
        return f"<{self.outcome.upper()}: {', '.join(parts)}{rest}>"

    def _bound(self) -> list[str]:
        """The bound that the outcome rests on, in words."""
        if self.lower == self.upper:
            return []
        least, most = f"at least {_number(self.lower)}", f"at most {_number(self.upper)}"
        if self.outcome is Outcome.INCONCLUSIVE:
            if math.isinf(self.lower) and math.isinf(self.upper):
                return ["not bounded"]
            return [f"from {_number(self.lower)} to {_number(self.upper)}"]
        return [most if (self.outcome is Outcome.PASS) == (self.op == "<=") else least]


def _number(value: float) -> str:
    return f"{value:.4g}"


@dataclass(frozen=True)
class Policy:
    """What a run makes of decisions.

    Attributes:
        confidence: of decisions that name none.
        inconclusive: `fail`, `warn` (it passes) or `xfail`.
        react: called with a decision that is asked for its truth and does not pass; may raise.
    """

    confidence: float = 0.95
    inconclusive: str = "fail"
    react: Callable[[Decision], object] | None = None


_policy: ContextVar[Callable[[], Policy]] = ContextVar("policy", default=Policy)


@contextmanager
def decide_by(policy: Callable[[], Policy]) -> Iterator[None]:
    """Let the policy, made when a decision asks for it, hold inside the block."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


@dataclass(frozen=True)
class Look:
    """A measure after so many windows, which it computes when asked; None if it has no windows."""

    windows: int | None
    estimate: Callable[[], Estimate]


def check_budget(
    metric: str, op: Side, budget: float, confidence: float, convention: str = ""
) -> None:
    """Refuse what cannot be decided, before anything is computed.

    Raises:
        MetricError: the measure is better in the other direction, or has no interval, as no measure
            of neighbouring windows has; the budget is not a number, or the confidence none between
            0.5 and 1.
    """
    call = CALLS[op]
    if not _is_number(budget) or not math.isfinite(budget):
        raise MetricError(f"{metric}.{call}({budget!r}): the budget has to be a finite number.")
    if not _is_number(confidence) or not 0.5 <= confidence < 1:
        raise MetricError(
            f"{metric}.{call}({budget:g}, confidence={confidence!r}): the confidence has to be at "
            "least 0.5 and less than 1, such as 0.95."
        )
    direction = known_direction(metric)
    if direction is not None and (direction == "lower") != (op == "<="):
        right = CALLS["<=" if direction == "lower" else ">="]
        raise MetricError(
            f"{metric}.{call}({budget:g}): {direction} is better for {metric}, so a budget is held "
            f"by {metric}.{right}({budget:g})."
        )
    if split_domain(metric)[0] == "kl.max":
        raise MetricError(
            f"{metric}.{call}({budget:g}): the largest of all tokens has no interval, so nothing "
            f"can be decided about it with a confidence. Use kl.p99.{call}, or the plain "
            f"comparison {metric} < {budget:g}, which holds for the text that was measured."
        )
    if convention.endswith(CONTIGUOUS):
        raise MetricError(
            f"{metric}.{call}({budget:g}): the windows are neighbours ({convention}), from which "
            "no interval for the rest of the text can be had, so nothing can be decided with a "
            "confidence. Leave out --qlab-sampling=contiguous, or use the plain comparison "
            f"{metric} {op} {budget:g}, which holds for the windows that were measured."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def decide(
    looks: Callable[[], Sequence[Look]],
    op: Side,
    budget: float,
    confidence: float | None,
    *,
    metric: str,
    candidate: str,
    convention: str = "",
) -> Decision:
    """Look at the data until the budget is decided, or no look is left.

    Levels are those of `boundaries`, so that all looks together err with 1 - confidence.

    Args:
        looks: finds them, in order, each with more windows than the one before; called once the
            budget is known to make sense.
        op: `<=` for a measure of which less is better, `>=` for the others.
        budget: what the value may be at most, or has to be at least.
        confidence: by default the run's.
        metric, candidate: for messages.
        convention: by which windows were cut.

    Raises:
        MetricError: as `check_budget`; or the budget is below twice the noise floor.
    """
    # Here, since every pytest run imports this module, and that one brings numpy along.
    from pytest_qlab.stats.sequential import boundaries

    policy = _policy.get()()
    confidence = policy.confidence if confidence is None else confidence
    check_budget(metric, op, budget, confidence, convention)
    budget = float(budget)
    planned = looks()
    most = planned[-1].windows
    shares = (1.0,) if most is None else tuple((look.windows or 0) / most for look in planned)
    levels = boundaries(shares, 1 - confidence)
    taken = 0
    for look, level in zip(planned, levels, strict=True):
        taken += 1
        estimate = look.estimate()
        estimate.check_above_floor(op, budget)
        error, clusters = _uncertainty(estimate)
        lower, upper = _bounds(estimate, error, clusters, level)
        outcome = judge(lower, upper, budget, higher_is_better=op == ">=")
        if outcome is not Outcome.INCONCLUSIVE:
            break
    decision = Decision(
        outcome=outcome,
        metric=metric,
        candidate=candidate,
        value=float(estimate),
        lower=lower,
        upper=upper,
        op=op,
        budget=budget,
        confidence=confidence,
        standard_error=error,
        looks=taken,
        planned=len(planned),
        windows=look.windows,
        most=most,
        n=estimate.n,
        clusters=estimate.clusters,
        design_effect=estimate.design_effect,
        unit=estimate.unit,
        convention=estimate.convention,
        detail=estimate.detail,
    )
    tolerated = outcome is Outcome.INCONCLUSIVE and policy.inconclusive != "fail"
    observe(
        Comparison(
            candidate,
            metric,
            decision.value,
            op,
            budget,
            outcome is Outcome.PASS or tolerated,
            outcome=str(outcome),
            lower=_finite(lower),
            upper=_finite(upper),
            windows=look.windows,
        )
    )
    return decision


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


def _bounds(
    estimate: Estimate, error: float | None, clusters: int | None, level: float
) -> tuple[float, float]:
    """One-sided bounds at a level; those of a rate reach as far as its interval would at least."""
    lower, upper = bounds(float(estimate), error, clusters, level=level)
    trials, effect = estimate.n, estimate.design_effect
    if split_domain(estimate.metric)[0] in RATES and error and trials and clusters and effect:
        from pytest_qlab.stats.rates import rate_bounds

        least, most = rate_bounds(float(estimate), trials, clusters, effect, level=level)
        return min(lower, least), max(upper, most)
    return lower, upper


def _uncertainty(estimate: Estimate) -> tuple[float | None, int | None]:
    """Standard error and clusters, as `bounds` takes them.

    Quantiles, times and rates without variance have intervals only: their longer arm is taken for
    that of a normal distribution, or of Student's t where there are clusters.
    """
    value, lower, upper = float(estimate), estimate.lower, estimate.upper
    if (estimate.n is None and lower is None) or lower == upper == value:
        return 0.0, None
    clusters = estimate.clusters or _MANY
    if estimate.standard_error:
        return estimate.standard_error, clusters
    if lower is None or upper is None or clusters < 2:
        return None, clusters
    arm = max(upper - value, value - lower)
    return arm / t_quantile((1 + estimate.confidence) / 2, clusters - 1), clusters
