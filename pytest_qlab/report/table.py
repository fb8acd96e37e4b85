"""The benchmark table as data: what every view shows, before it is dressed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_qlab.report.column import Column
from pytest_qlab.report.columns import columns_of, is_baseline, measure_of
from pytest_qlab.results import Budget, CandidateResult, Measure, Results

ABSENT = "\N{EN DASH}"
UNDECIDED = "inconclusive"
"""The outcome of a careful assertion that all windows left open."""


@dataclass(frozen=True)
class Cell:
    """One measure of one candidate.

    `text` has no unit; `spread` is the interval as plus-minus; `value` is None where absent.
    """

    value: float | None
    text: str
    spread: str
    title: str
    best: bool
    simulated: bool
    budgets: tuple[Budget, ...]

    @property
    def ok(self) -> bool | None:
        """Whether all budgets were kept; None without a budget."""
        return all(budget.ok for budget in self.budgets) if self.budgets else None


@dataclass(frozen=True)
class Row:
    """One candidate."""

    candidate: CandidateResult
    baseline: bool
    cells: tuple[Cell, ...]

    @property
    def status(self) -> str:
        """Why the row has no numbers, or nothing."""
        if self.candidate.error:
            return "error"
        return "" if any(cell.value is not None for cell in self.cells) else "not measured"


@dataclass(frozen=True)
class Table:
    """Rows in document order."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def only(self, *, primary: bool) -> Table:
        """The table of the primary or of the secondary columns."""
        kept = [place for place, c in enumerate(self.columns) if c.primary == primary]
        rows = (
            Row(row.candidate, row.baseline, tuple(row.cells[i] for i in kept)) for row in self.rows
        )
        return Table(tuple(self.columns[i] for i in kept), tuple(rows))


def build_table(results: Results) -> Table:
    """All measures of all candidates, the best of each column marked."""
    columns = columns_of(results)
    best = {column.name: _best(column, results.candidates) for column in columns}
    rows = []
    for candidate in results.candidates:
        baseline = is_baseline(candidate)
        cells = (_cell(candidate, c, None if baseline else best[c.name]) for c in columns)
        rows.append(Row(candidate, baseline, tuple(cells)))
    return Table(tuple(columns), tuple(rows))


def _simulated(candidate: CandidateResult, column: Column, measure: Measure) -> bool:
    """Whether the number is a time that is not the format's."""
    timed = column.name.startswith("latency")
    return measure.simulated or (candidate.simulated and timed)


def _best(column: Column, candidates: Sequence[CandidateResult]) -> float | None:
    """The value to mark; None where there is nothing to choose between.

    Simulated times take no part: they are no merit of the format.
    """
    values = []
    for row in candidates:
        measure = measure_of(row, column.name)
        if measure is not None and not is_baseline(row) and not _simulated(row, column, measure):
            values.append(measure.value)
    if not column.better or len(set(values)) < 2:
        return None
    return min(values) if column.better == "lower" else max(values)


def _cell(candidate: CandidateResult, column: Column, best: float | None) -> Cell:
    budgets = tuple(b for b in candidate.budgets if b.metric == column.name)
    measure = measure_of(candidate, column.name)
    if measure is None:
        return Cell(None, ABSENT, "", f"{column.name}: not measured", False, False, ())
    simulated = _simulated(candidate, column, measure)
    parts = [f"{column.name} = {measure.value:.6g}" + (f" {measure.unit}" if measure.unit else "")]
    if measure.lower is not None and measure.upper is not None:
        level = f"{100 * measure.confidence:g}% interval"
        parts.append(f"{level} [{measure.lower:.6g}, {measure.upper:.6g}]")
    if measure.n is not None:
        clusters = f" in {measure.clusters} documents" if measure.clusters else ""
        parts.append(f"n = {measure.n}{clusters}")
    if measure.floor is not None:
        parts.append(f"noise floor {measure.floor:.2g}")
    parts += [text for text in (measure.convention, measure.detail) if text]
    parts += [f"budget {budget_text(column, b)}: {verdict_text(column, b)}" for b in budgets]
    if simulated:
        parts.append("simulated: no kernel runs the packed bits")
    is_best = best is not None and measure.value == best and not simulated
    return Cell(
        measure.value,
        column.number(measure.value),
        spread_text(column, measure),
        "; ".join(parts),
        is_best,
        simulated,
        budgets,
    )


def spread_text(column: Column, measure: Measure) -> str:
    """The interval as plus-minus, with both arms where they differ by more than a quarter."""
    if measure.lower is None or measure.upper is None:
        return ""
    below, above = measure.value - measure.lower, measure.upper - measure.value
    if below == 0 and above == 0:
        return ""
    arms = [column.number(max(arm, 0.0)).lstrip("+") for arm in (below, above)]
    if min(below, above) >= 0.75 * max(below, above) or arms[0] == arms[1]:
        return f"±{column.number((below + above) / 2).lstrip('+')}"
    return f"-{arms[0]} +{arms[1]}"


def margin(budget: Budget) -> float:
    """How far the value is on the right side of its budget; negative where it is not."""
    upwards = budget.op.startswith(">")
    return budget.value - budget.budget if upwards else budget.budget - budget.value


def budget_text(column: Column, budget: Budget) -> str:
    """The budget as `< 0.1`, in the column's unit."""
    return f"{budget.op} {column.plain(budget.budget)}{column.suffix}"


def margin_text(column: Column, budget: Budget) -> str:
    """How much is left, or by how much the value is over or short."""
    room = margin(budget)
    amount = column.amount(abs(room))
    # What is undecided may be on either side of its budget, whatever the run makes of it.
    if room > 0 or (room == 0 and budget.ok) or (budget.ok and not budget.outcome):
        return f"{amount} left"
    return f"{amount} short" if budget.op.startswith(">") else f"{amount} over"


def outcome_word(budget: Budget) -> str:
    """`kept`, `not kept`, or `undecided` where a careful assertion remained open."""
    if budget.outcome == UNDECIDED:
        return "undecided"
    return "kept" if budget.ok else "not kept"


def decision_text(column: Column, budget: Budget) -> str:
    """What a careful assertion rests on: its bound and how many windows it took; else nothing."""
    if not budget.outcome:
        return ""
    lower, upper = (
        None if bound is None else column.plain(bound) for bound in (budget.lower, budget.upper)
    )
    if budget.outcome == UNDECIDED:
        bounds = f"between {lower or '-∞'} and {upper or '∞'}"
    elif budget.lower == budget.upper:
        bounds = "exact"
    elif (budget.outcome == "pass") == budget.op.startswith("<"):
        bounds = f"at most {upper}"
    else:
        bounds = f"at least {lower}"
    plural = "" if budget.windows == 1 else "s"
    windows = "" if budget.windows is None else f", {budget.windows} window{plural}"
    return f"{bounds}{column.suffix if bounds != 'exact' else ''}{windows}"


def verdict_text(column: Column, budget: Budget) -> str:
    """The margin, and for a careful assertion what it rests on."""
    undecided = "undecided, " if budget.outcome == UNDECIDED else ""
    told = decision_text(column, budget)
    return f"{undecided}{margin_text(column, budget)}{f' ({told})' if told else ''}"


def relative_margin(budget: Budget) -> float | None:
    """The margin as a share of the budget; None where the budget is zero."""
    return margin(budget) / abs(budget.budget) if budget.budget else None


def failed_budgets(results: Results) -> list[tuple[CandidateResult, Budget]]:
    """Every budget that was not kept, in document order."""
    return [(row, b) for row in results.candidates for b in row.budgets if not b.ok]


def run_failed(results: Results) -> bool:
    """Whether anything in the document is not in order: a test, a budget, a candidate, the run."""
    bad = sum(results.summary.get(key, 0) for key in ("failed", "error", "errors"))
    rows = any(
        row.error or any(outcome in ("failed", "error") for outcome in row.tests.values())
        for row in results.candidates
    )
    return bool(bad or rows or results.exit_status or failed_budgets(results))
