"""What a run makes of careful assertions: the policy for open ones, the words for failed ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from pytest_qlab.running.causes import more_windows
from pytest_qlab.settings import Settings

if TYPE_CHECKING:
    from pytest_qlab.decision import Decision, Policy

# Decisions that a test asked for their truth, and that did not pass.
REFUSED = pytest.StashKey[list["Decision"]]()
# Of an assertion's message, which pytest shortens.
_RECOGNIZED = 100


def policy_of(settings: Settings, refused: list[Decision]) -> Policy:
    """The run's policy; it adds decisions that do not pass to `refused`."""
    from pytest_qlab.decision import Policy
    from pytest_qlab.stats.decisions import Outcome

    def react(decision: Decision) -> None:
        refused.append(decision)
        if decision.outcome is not Outcome.INCONCLUSIVE:
            return
        message = f"{decision!r}: {'; '.join(_help(decision))}"
        if settings.inconclusive == "warn":
            warnings.warn(pytest.PytestWarning(message), stacklevel=4)
        elif settings.inconclusive == "xfail":
            pytest.xfail(message)

    return Policy(settings.confidence, settings.inconclusive, react)


def add_explanation(
    error: BaseException, refused: list[Decision], more: Callable[[Decision], list[str]]
) -> None:
    """Say in an assertion's message what the decision that it failed over rests on.

    Args:
        error: what the test raised.
        refused: the test's decisions that did not pass.
        more: gives lines to add after those on a decision.
    """
    if not isinstance(error, AssertionError) or not refused:
        return
    decision = refused[-1]
    message = str(error.args[0]) if error.args else ""
    if not message or repr(decision)[:_RECOGNIZED] in message:
        lines = [message, *(f"  {line}" for line in [*explain_decision(decision), *more(decision)])]
        error.args = ("\n".join(filter(None, lines)),)


def explain_decision(decision: Decision) -> list[str]:
    """Lines on what was decided, by how much, how surely, on what, and what would help."""
    from pytest_qlab.stats.decisions import Outcome

    name = f"{decision.metric} of {decision.candidate}" if decision.candidate else decision.metric
    value = f"{decision.value:.6g} {decision.unit}".rstrip()
    lines = [f"{name} = {value}  budget {decision.op} {decision.budget:.6g}  ({_margin(decision)})"]
    if decision.lower != decision.upper:
        lines.append(_sureness(decision))
    if decision.detail:
        lines.append(decision.detail)
    sample = []
    if decision.n is not None:
        sample.append(f"{decision.n} samples")
    if decision.clusters is not None:
        sample.append(f"{decision.clusters} documents")
    if decision.design_effect is not None and decision.design_effect > 2:
        sample.append(f"design effect {decision.design_effect:.1f}")
    if decision.convention:
        sample.append(f"convention {decision.convention}")
    if sample:
        lines.append(", ".join(sample))
    if decision.outcome is Outcome.INCONCLUSIVE:
        lines += _help(decision)
    return lines


def _margin(decision: Decision) -> str:
    difference = decision.value - decision.budget
    if decision.op == ">=":
        difference = -difference
    share = f", {difference / abs(decision.budget):+.0%}" if decision.budget else ""
    if difference <= 0:
        return f"{-difference:.6g} left, but that is not certain"
    return f"{'over' if decision.op == '<=' else 'short'} by {difference:.6g}{share}"


def _sureness(decision: Decision) -> str:
    from pytest_qlab.stats.decisions import Outcome

    sure = f"with {decision.confidence:.4g} confidence"
    bound = f"between {decision.lower:.6g} and {decision.upper:.6g}"
    if decision.outcome is not Outcome.INCONCLUSIVE:
        upper = (decision.outcome is Outcome.PASS) == (decision.op == "<=")
        bound = f"at most {decision.upper:.6g}" if upper else f"at least {decision.lower:.6g}"
    if not decision.sample:
        return f"{bound} {sure}"
    look = f"look {decision.looks} of {decision.planned}, " if decision.planned > 1 else ""
    return f"{bound} {sure}, after {look}{decision.sample}"


def _help(decision: Decision) -> list[str]:
    """What would decide an inconclusive comparison."""
    word = "at most" if decision.op == "<=" else "at least"
    lines = []
    needed, most = decision.windows_needed, decision.most
    if decision.standard_error is None:
        lines.append(
            "the text is of a single document, so that nothing says how much others differ: give "
            "several (--qlab-eval)"
        )
    elif needed is not None and most is not None:
        lines.append(more_windows(max(needed, most + 1)))
    bound = decision.upper if decision.op == "<=" else decision.lower
    lines.append(f"what is known by now is that the value is {word} {bound:.4g}")
    return lines
