"""What a missed budget on damage comes from, and what would help: layers, bits, windows.

It runs where an assertion has failed already, so nothing here may hide that: what goes wrong leaves
lines out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_qlab.directions import is_damage, known_direction, split_domain
from pytest_qlab.estimate import Estimate
from pytest_qlab.running.explain import held_to

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.decision import Decision
    from pytest_qlab.measuring.attribution import Attribution
    from pytest_qlab.measuring.layers import LayerError

NAMED = 3
MOST_BITS = 8
# Half the step of a quantizer is half the error, and KL goes with its square.
LEFT_BY_A_BIT = 0.25
HOW_TO_KNOW = "quantized.attribution measures how much KL each layer causes"

T = TypeVar("T")


@dataclass(frozen=True)
class Missed:
    """A budget that a candidate has missed, or not surely kept.

    Attributes:
        op: the value was to be less (`<`, `<=`) or more (`>`, `>=`) than the budget.
        open: whether more text could decide otherwise.
        standard_error, clusters: of the value, as far as they are known.
    """

    metric: str
    value: float
    op: str
    budget: float
    unit: str = ""
    open: bool = False
    standard_error: float | None = None
    clusters: int | None = None

    @classmethod
    def by_estimate(cls, measured: Estimate, op: str, budget: float) -> Missed:
        """What a plain assertion found; it is open where the budget is inside the interval."""
        lower, upper, error = measured.lower, measured.upper, measured.standard_error
        bounded = lower is not None and upper is not None
        if bounded and not error:
            error = (upper - lower) / 4  # type: ignore[operator]  # about two to either side
        inside = bounded and lower <= budget <= upper  # type: ignore[operator]
        return cls(
            measured.metric,
            float(measured),
            op,
            budget,
            measured.unit,
            inside,
            error,
            measured.clusters,
        )

    @classmethod
    def by_decision(cls, decision: Decision) -> Missed:
        """What a careful assertion found; what would decide an open one, it says itself."""
        return cls(
            decision.metric, decision.value, decision.op, decision.budget, decision.unit, False
        )

    def kept_by(self, value: float) -> bool:
        """Whether another value would keep the budget."""
        return value <= self.budget if self.op in ("<", "<=") else value >= self.budget

    @property
    def of_damage(self) -> bool:
        """Whether there was to be less damage than there is, so that better layers would help."""
        wanted = {"<": "lower", "<=": "lower", ">": "higher", ">=": "higher"}.get(self.op)
        return is_damage(self.metric) and known_direction(self.metric) == wanted


def causes_of_comparison(labs: Sequence[Any], op: str, left: object, right: object) -> list[str]:
    """`causes` of a plain assertion that failed; of two estimates, the layers that are known."""
    held = held_to(op, left, right)
    if held is not None:
        measured, relation, budget = held
        missed = Missed.by_estimate(measured, relation, budget)
        return _causes_among(labs, measured.candidate, missed)
    names = {each.candidate for each in (left, right) if isinstance(each, Estimate)}
    return [
        line
        for lab in labs
        for name in sorted(names & set(lab.candidates))
        for line in _worst(lab.candidates[name])
    ]


def causes_of_decision(labs: Sequence[Any], decision: Decision) -> list[str]:
    """`causes` of a careful assertion that did not pass."""
    return _causes_among(labs, decision.candidate, Missed.by_decision(decision))


def _causes_among(labs: Sequence[Any], name: str, missed: Missed) -> list[str]:
    """Of several labs with a candidate of that name, the one with that value was asked."""
    found = [lab.candidates[name] for lab in labs if name in lab.candidates]
    for candidate in found:
        if _measured(candidate, missed.metric) == missed.value:
            return causes(candidate, missed)
    return causes(found[-1], missed) if found else []


def _measured(candidate: Candidate, metric: str) -> Estimate | None:
    return _attempt(lambda: candidate.measured.get(metric))


def causes(candidate: Candidate, missed: Missed) -> list[str]:
    """Lines on the layers that contribute most to the damage, and on what would help.

    Attribution is computed if that costs no more than evaluating the candidate does; else layers
    are named by their output error, if that was measured. Sizes and times have no such layers.
    """
    if not missed.of_damage:
        return _worst(candidate) if _of_layers(missed.metric) else []
    found = _attempt(lambda: candidate.affordable_attribution())
    lines = explain_attribution(found) if found is not None else _worst(candidate)
    if missed.open:
        return [*lines, *(_attempt(lambda: _more_windows(candidate, missed)) or ())]
    if found is not None:
        return [*lines, *(_attempt(lambda: more_bits(missed, found)) or ())]
    return [*lines, f"what would help: more bits where they count; {HOW_TO_KNOW}"]


def _attempt(compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except Exception:  # The assertion's own message must come out, whatever happens here.
        return None


def _of_layers(metric: str) -> bool:
    return metric == "layer_error" or metric.startswith("weights.")


def _worst(candidate: Candidate) -> list[str]:
    return _attempt(lambda: explain_layers(candidate.worst_layers())) or []


def explain_layers(layers: Sequence[LayerError]) -> list[str]:
    """A line that names the layers whose outputs are furthest off, or none."""
    if not layers:
        return []
    named = [f"{each.name} {each.output_error:.2g} ({each.snr_db:.1f} dB)" for each in layers]
    return [f"layers with the largest output error: {', '.join(named)}"]


def explain_attribution(found: Attribution) -> list[str]:
    """The parts that cause most KL by themselves, and whether the parts add up; or nothing."""
    largest = found.largest(NAMED)
    if not largest:
        return []
    named = [f"{name} {kl:.2g} ({kl / found.sum:.0%})" for name, kl in largest]
    return [
        f"largest KL by themselves: {', '.join(named)}",
        f"all parts by themselves add up to {found.sum:.3g} nats, together they cause "
        f"{found.total:.3g} ({found.tokens:,} tokens of {found.windows} windows)",
    ]


def more_bits(missed: Missed, found: Attribution) -> list[str]:
    """About what would be left of the damage with more bits for the layers that cause most of it.

    One bit more halves a layer's error, so that about a quarter of its KL is left. Nothing is said
    in numbers where the layers' KL do not add up to that of the whole.
    """
    parts = sorted((*found.layers.values(), *found.embeddings.values()), reverse=True)
    parts = [kl for kl in parts if kl > 0]
    if not parts:
        return []
    first = min(NAMED, len(parts))
    those = "that layer" if first == 1 else f"those {first} layers"
    if not found.additive or _scaled(missed, 1.0) is None:
        return [f"what would help: more bits for {those}"]

    def left(count: int, bits: int = 1) -> float:
        saved = sum(parts[:count]) * (1 - LEFT_BY_A_BIT**bits) / found.sum
        value = _scaled(missed, 1 - saved)
        assert value is not None
        return value

    few = left(first)
    told = [f"what would help: one bit more for {those} would leave {_about(missed, few)}"]
    if not missed.kept_by(few):
        told[0] += ", still not enough"
        count = next((n for n in range(first, len(parts)) if missed.kept_by(left(n))), len(parts))
        enough = [bits for bits in range(1, MOST_BITS + 1) if missed.kept_by(left(count, bits))]
        if enough:
            whom = "all" if count == len(parts) else f"the {count} largest"
            word = "bit" if enough[0] == 1 else "bits"
            value = _about(missed, left(count, enough[0]))
            told.append(f"{enough[0]} {word} more for {whom}, {value}")
    return ["; ".join(told)]


def _about(missed: Missed, value: float) -> str:
    return f"about {value:.2g} {missed.unit}".rstrip()


def _scaled(missed: Missed, share: float) -> float | None:
    """The measure with that share of the KL left, to first order; None where it does not follow.

    Losses and angles go with KL, the power of hidden states' errors as well, and the rate at which
    the most likely token changes with its square root.
    """
    metric, value = split_domain(missed.metric)[0], missed.value
    if metric in ("kl.mean", "kl.median", "kl.p99", "kl.max"):
        return value * share
    if metric in ("perplexity_delta", "log_perplexity_delta"):
        return value * share if value > 0 else None
    if metric == "perplexity_ratio":
        return math.exp(math.log(value) * share) if value > 1 else None
    if metric == "cosine":
        return 1 - (1 - value) * share
    if metric == "top1_agreement":
        return 1 - (1 - value) * math.sqrt(share)
    if metric == "snr_db":
        return value - 10 * math.log10(share)
    return None


def _more_windows(candidate: Candidate, missed: Missed) -> list[str]:
    from pytest_qlab.stats.decisions import windows_to_decide

    gap, error, clusters = missed.value - missed.budget, missed.standard_error, missed.clusters
    if gap == 0 or not error or clusters is None or clusters < 2:
        return []
    most = sum(map(len, candidate.lab.looks))
    needed = windows_to_decide(gap, error, most, clusters, level=0.05)
    return [more_windows(max(needed, most + 1))]


def more_windows(number: int) -> str:
    """How many windows would decide a question that is open."""
    return (
        f"about {number} windows would decide it if the value is right: give "
        f"--qlab-max-windows={number}, and enough text for them"
    )
