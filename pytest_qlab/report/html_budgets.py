"""Every budget that a test held a measure against, as a table in HTML."""

from __future__ import annotations

import math
from html import escape

from pytest_qlab.report.column import Column
from pytest_qlab.report.columns import column_named
from pytest_qlab.report.table import (
    UNDECIDED,
    Table,
    budget_text,
    decision_text,
    margin,
    margin_text,
    outcome_word,
    relative_margin,
)
from pytest_qlab.results import Budget, CandidateResult, Results

SIGNS = {True: "✓", False: "✗"}
OPERATORS = {"<=": "≤", ">=": "≥"}
_HEADS = (
    ("ok", "Outcome", True),
    ("test", "Test", True),
    ("id", "Candidate", True),
    ("metric", "Measure", True),
    ("value", "Value", False),
    ("budget", "Budget", False),
    ("margin", "Margin", False),
)
_DECIDED = ("decision", "Decided by", True)


def render_budgets(table: Table, results: Results) -> str:
    """All budgets, those not kept first; nothing where no test has any."""
    columns = {column.name: column for column in table.columns}
    judged = [(row, b) for row in results.candidates for b in row.budgets]
    if not judged:
        return ""
    judged.sort(key=lambda pair: (pair[1].ok, pair[1].outcome != UNDECIDED))
    careful = any(budget.outcome for _, budget in judged)
    lines = []
    for row, budget in judged:
        column = columns.get(budget.metric) or column_named(budget.metric).fitted([budget.value])
        lines.append(_line(row, budget, column, careful))
    head = "".join(
        f'<th scope="col" data-c="{key}"'
        + (' class="name"' if text else "")
        + (' data-kind="text"' if text and key != "ok" else "")
        + f">{label}</th>"
        for key, label, text in (*_HEADS, *([_DECIDED] if careful else []))
    )
    return (
        '<h3>Budgets</h3><div class="scroll" tabindex="0" role="region" aria-label="Budgets">'
        '<table class="sortable"><caption>Every comparison that a test made with a measure, those '
        f"not kept first.</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


def _line(row: CandidateResult, budget: Budget, column: Column, careful: bool) -> str:
    relative = relative_margin(budget)
    share = "" if relative is None else f" ({relative:+.0%})"
    style = "kept" if budget.ok else "broken"
    decided = ""
    if careful:
        told = decision_text(column, budget)
        decided = f'<td class="text" data-c="decision" data-v="{escape(told)}">{escape(told)}</td>'
    return (
        f'<tr><td class="text {style}" data-c="ok" data-v="{int(budget.ok)}">'
        f'<span class="judged">{sign_of(budget)} {outcome_word(budget)}</span></td>'
        f'<td class="text wrap" data-c="test" data-v="{escape(budget.test)}">'
        f"{escape(budget.test)}</td>"
        f'<th scope="row" class="name" data-c="id" data-v="{escape(row.id)}">'
        f"{escape(row.id)}</th>"
        f'<td class="text" data-c="metric" data-v="{escape(budget.metric)}">'
        f"{escape(budget.metric)}</td>"
        f'<td data-c="value" data-v="{sort_key(budget.value)}">'
        f"{escape(column.number(budget.value) + column.suffix)}</td>"
        f'<td data-c="budget" data-v="{sort_key(budget.budget)}">'
        f"{budget_html(column, budget)}</td>"
        f'<td data-c="margin" data-v="{sort_key(margin(budget))}">'
        f"{escape(margin_text(column, budget) + share)}</td>{decided}</tr>"
    )


def sign_of(budget: Budget) -> str:
    """A tick, a cross, or a question mark for what remained undecided."""
    return "?" if budget.outcome == UNDECIDED else SIGNS[budget.ok]


def budget_html(column: Column, budget: Budget) -> str:
    """The budget as `< 0.1`, in the column's unit, escaped."""
    text = budget_text(column, budget)
    return escape(text.replace(budget.op, OPERATORS.get(budget.op, budget.op), 1))


def sort_key(value: float) -> str:
    """A number as JavaScript reads it."""
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(float(value))
