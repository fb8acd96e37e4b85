"""Which measures of a results document are columns, and in which order."""

from __future__ import annotations

from dataclasses import replace

from pytest_qlab.report.column import Column, Group, Kind
from pytest_qlab.report.headings import KNOWN
from pytest_qlab.results import CandidateResult, Measure, Results

_BY_NAME = {column.name: column for column in KNOWN}


def is_baseline(candidate: CandidateResult) -> bool:
    """Whether the row is the unquantized model, which takes part in no ranking."""
    return candidate.method == "none" or candidate.id == "none"


def measure_of(candidate: CandidateResult, name: str) -> Measure | None:
    """The measure, or what a budget says of it where only a budget does."""
    measure = candidate.measures.get(name)
    if measure is None:
        values = [budget.value for budget in candidate.budgets if budget.metric == name]
        measure = Measure(value=values[-1]) if values else None
    return measure


def column_named(name: str, unit: str = "") -> Column:
    """The column of a measure; those of a domain, such as `kl.mean[code]`, follow the whole's.

    A measure that is not known, from somebody's own metric, gets a column made from its name.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    base, bracket, domain = name.partition("[")
    if bracket and domain.endswith("]") and base in _BY_NAME:
        known, domain = _BY_NAME[base], domain[:-1]
        return replace(
            known,
            name=name,
            heading=f"{known.heading}, {domain}",
            short=f"{known.short} {domain}",
            primary=False,
            rank=known.rank + 100,
        )
    kinds: dict[str, Kind] = {"bytes": "bytes", "s": "seconds"}
    return Column(
        name, name, name, unit="" if unit in kinds else unit, kind=kinds.get(unit, "number")
    )


def columns_of(results: Results) -> list[Column]:
    """Columns for everything that some candidate measured, known ones first, fitted to values."""
    values: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    budgeted: set[str] = set()
    for row in results.candidates:
        budgeted.update(budget.metric for budget in row.budgets)
        for name in [*row.measures, *(budget.metric for budget in row.budgets)]:
            measure = measure_of(row, name)
            if measure is not None:
                units[name] = units.get(name) or measure.unit
                # The baseline's numerical noise must not set the decimals of all others.
                kept = [] if is_baseline(row) and len(results.candidates) > 1 else [measure.value]
                values.setdefault(name, []).extend(kept)
    order = {column.name: place for place, column in enumerate(KNOWN)}
    columns = [column_named(name, units[name]).fitted(values[name]) for name in values]
    # A measure that a test judged is always in the main table.
    columns = [replace(c, primary=c.primary or c.name in budgeted) for c in columns]
    columns.sort(key=lambda column: order.get(column.name.partition("[")[0], len(order)))
    groups = {group: place for place, group in enumerate(Group.__args__)}  # type: ignore[attr-defined]
    return sorted(columns, key=lambda column: groups[column.group])
