"""How many windows each budget of the table needs, before anything is run: `--qlab-plan`.

A gate is planned that keeps its confidence, and decides rightly with a probability of 95 % if the
truth is at a half or two thirds of what the budget allows, or where it is known to be. No model is
loaded for it: windows are counted by tokenizing the text, what is known is read from the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pytest_qlab.data.windows import shares_of
from pytest_qlab.directions import RATES, is_timed, split_domain
from pytest_qlab.errors import MetricError, did_you_mean
from pytest_qlab.gate.budgets import ConfiguredBudget
from pytest_qlab.gate.sources import StoredSpreads, saved_spread
from pytest_qlab.gate.spreads import LAWS, Spread, assumed, at_share
from pytest_qlab.stats.paired import cluster_index
from pytest_qlab.stats.planning import MOST, windows_needed

if TYPE_CHECKING:
    from pytest_qlab.data.windows import WindowSet
    from pytest_qlab.gate.baselines import Baseline
    from pytest_qlab.lab import Lab
    from pytest_qlab.specs import MethodSpec

POWER = 0.95
HALF, TWO_THIRDS = 1 / 2, 2 / 3
HEADINGS = ("method", "budget", "value", "spread of windows", "at 1/2", "at 2/3", "at value", "")
NEVER = math.inf
"""Windows that are needed where no number of them is enough."""


class Text:
    """Windows of a text, or of one domain of it, and the documents that so many come from.

    Args:
        windows: all that the text has. given: how many of them the run takes.
        domain: whose windows count; empty for all.

    Raises:
        MetricError: there is no window of that domain.
    """

    def __init__(self, windows: WindowSet, given: int, domain: str = "") -> None:
        kept = [w for w in windows.windows if domain in ("", windows.documents[w.document][1])]
        if not kept:
            known = {name for _, name in windows.documents}
            raise MetricError(
                f"No window of the text belongs to a domain {domain!r}."
                f"{did_you_mean(domain, known)}"
            )
        self._documents = np.array([window.document for window in kept], dtype=np.int64)
        self.total = len(windows.windows)
        self.given = given
        self.share = len(kept) / self.total
        self.tokens = sum(window.scored for window in kept) / len(kept)
        self.documents_at = lru_cache(maxsize=None)(self._documents_at)

    def _documents_at(self, windows: int) -> int:
        """From how many documents so many windows come, spread over as much text as it takes."""
        count = self._documents.size
        places = np.arange(min(windows, count)) * count // min(windows, count)
        found = int(cluster_index(self._documents[places]).max()) + 1
        return found * windows // count if windows > count else found


@dataclass(frozen=True)
class Row:
    """One method with one of its budgets.

    Attributes:
        half, two_thirds, known: windows that are needed if the truth is there: None where that
            says nothing, `NEVER` where no number is enough.
        spread: None for what is not measured on windows.
        given, total: windows that the run takes, and that the text has.
    """

    method: str
    budget: ConfiguredBudget
    spread: Spread | None
    given: int
    total: int
    half: float | None = None
    two_thirds: float | None = None
    known: float | None = None

    @property
    def verdict(self) -> str:
        """What to do, in words."""
        if self.spread is None:
            timed = is_timed(self.budget.metric)
            return "timed in rounds, not windows" if timed else "exact, needs no windows"
        value = self.spread.value
        if value is not None and self.known is not None:
            within = value <= self.budget.value
            good = within if self.budget.better == "lower" else value >= self.budget.value
            sign = "is kept" if good else "is not kept"
            if self.known == NEVER:
                return "cannot be decided: the value is at the budget"
            return f"enough: it {sign}" if self.known <= self.given else self._more(self.known)
        if self.half is None or self.two_thirds is None:
            return "cannot be planned before the base model was run"
        if self.two_thirds <= self.given:
            return "enough"
        if self.half <= self.given:
            return "enough up to half of the budget"
        return self._more(self.half)

    def _more(self, windows: float) -> str:
        if windows <= self.total:
            return f"give --qlab-max-windows={windows:.0f}"
        if windows == NEVER:
            return "needs more documents than this text can show"
        return f"more text needed: about {windows / self.total:.1f} times as much"


@dataclass(frozen=True)
class Plan:
    """All budgets of a run."""

    rows: tuple[Row, ...]
    confidence: float
    text: str

    def render(self) -> str:
        """A table for the terminal, with what its numbers rest on."""
        table = [HEADINGS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[place]) for line in table) for place in range(len(HEADINGS))]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths if width))
        notes = [
            f"Windows that decide a budget with {self.confidence:.4g} confidence and "
            f"{POWER:g} power, if the truth is at 1/2 or 2/3 of what it allows, or at the value.",
            self.text,
        ]
        if any(row.spread is not None and row.spread.source == "assumed" for row in self.rows):
            notes.append(
                "assumed: as on the embedded model and text, since nothing was evaluated on this "
                "text before. Measure one method, and plan again."
            )
        return "\n".join([*lines, "", *notes, ""])


def _cells(row: Row) -> tuple[str, ...]:
    spread = row.spread
    value = "" if spread is None or spread.value is None else f"{spread.value:.4g}"
    numbers = ("" if n is None else _count(n) for n in (row.half, row.two_thirds, row.known))
    source = "" if spread is None else spread.source
    return (row.method, str(row.budget), value, source, *numbers, row.verdict)


def _count(windows: float) -> str:
    return f"{windows:,.0f}" if windows <= MOST else "never"


class Planner:
    """Plans the budgets of methods on a lab's text.

    Args:
        lab: its model is not loaded.
        confidence: of the gate.
        baselines: saved ones by name, to learn from where the store knows nothing.
    """

    def __init__(
        self, lab: Lab, confidence: float, baselines: Iterable[tuple[str, Baseline]] = ()
    ) -> None:
        self._lab, self._confidence = lab, confidence
        self._stored = StoredSpreads(lab)
        self._baselines = [
            (name, baseline)
            for name, baseline in baselines
            if baseline.model.id == lab.model.digest
        ]
        self._texts: dict[str, Text] = {}

    def plan(self, gates: Sequence[tuple[MethodSpec, ConfiguredBudget]]) -> Plan:
        """What every budget needs."""
        text = self._text("")
        documents = text.documents_at(text.total)
        described = (
            f"The text has {text.total} windows of {self._lab.evaluation.convention} from "
            f"{documents} documents; this run takes {text.given}."
        )
        rows = tuple(self._row(spec, budget) for spec, budget in gates)
        return Plan(rows, self._confidence, described)

    def _row(self, spec: MethodSpec, budget: ConfiguredBudget) -> Row:
        base, domain = split_domain(budget.metric)
        text = self._text(domain)
        if base not in LAWS:
            return Row(spec.id, budget, None, text.given, text.total)
        spread = self._spread(spec, budget.metric)
        truths = [
            at_share(budget.metric, budget.value, share, spread.base_perplexity)
            for share in (HALF, TWO_THIRDS)
        ]
        half, two_thirds, known = (
            None if truth is None else self._needed(spread, budget, truth, text)
            for truth in (*truths, spread.value)
        )
        return Row(spec.id, budget, spread, text.given, text.total, half, two_thirds, known)

    def _spread(self, spec: MethodSpec, metric: str) -> Spread:
        found = self._stored.spread(spec, metric)
        for name, baseline in self._baselines:
            found = found or saved_spread(baseline, name, spec.id, metric)
        return found or assumed(metric)

    def _needed(self, spread: Spread, budget: ConfiguredBudget, truth: float, text: Text) -> float:
        if truth == budget.value:
            return NEVER
        rate = split_domain(budget.metric)[0] in RATES
        found = windows_needed(
            budget.value - truth,
            spread.deviation(truth, text.tokens),
            confidence=self._confidence,
            power=POWER,
            documents=text.documents_at,
            shares=lambda windows: shares_of(math.ceil(windows / text.share)),
            correlation=spread.correlation,
            at_budget=spread.deviation(budget.value, text.tokens) if rate else 0.0,
        )
        return NEVER if found is None else math.ceil(found / text.share)

    def _text(self, domain: str) -> Text:
        if domain not in self._texts:
            windows = self._lab.evaluation.all_windows
            self._texts[domain] = Text(windows, len(self._lab.eval_data.windows), domain)
        return self._texts[domain]
