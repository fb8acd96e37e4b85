"""How candidates differ from a saved baseline: as text, and as a table in HTML."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from pytest_qlab.report.column import Column
from pytest_qlab.report.columns import column_named
from pytest_qlab.report.html_budgets import sort_key
from pytest_qlab.report.table import Table
from pytest_qlab.results import CandidateResult, Change, Results

MAIN = ("perplexity_delta", "kl.mean", "top1_agreement", "size", "latency.p50")
"""What is told of in text where no threshold says what matters."""
WORDS = {"pass": "kept", "fail": "worse", "inconclusive": "undecided"}
_SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
_STYLES = {"pass": "kept", "fail": "broken", "inconclusive": "broken"}
_HEADS = (
    ("ok", "Outcome", True),
    ("id", "Candidate", True),
    ("metric", "Measure", True),
    ("saved", "Saved", False),
    ("value", "Now", False),
    ("difference", "Difference", False),
    ("margin", "May be worse by", False),
)


def told_changes(table: Table, results: Results) -> Iterator[tuple[CandidateResult, str]]:
    """A line on each change that matters, and one on each candidate of which nothing has changed.

    What matters has a threshold, or is one of `MAIN`.
    """
    for row in results.candidates:
        if row.changes and not any(change.difference for change in row.changes):
            held = ", ".join(change.metric for change in row.changes if change.outcome)
            yield row, f"as saved{f' (held to it: {held})' if held else ''}"
            continue
        for change in sorted(row.changes, key=_urgency):
            if change.outcome or (change.metric in MAIN and change.difference):
                column = _column(table, change)
                saved, value = column.number(change.saved), column.number(change.value)
                text = f"{change.metric} {saved} -> {value}{column.suffix}, "
                text += difference_text(column, change)
                yield row, text + (f", {_verdict(column, change)}" if change.outcome else "")


def _urgency(change: Change) -> int:
    return ["fail", "inconclusive", "pass", ""].index(change.outcome)


def _column(table: Table, change: Change) -> Column:
    known = next((column for column in table.columns if column.name == change.metric), None)
    return known or column_named(change.metric).fitted([change.saved, change.value])


def difference_text(column: Column, change: Change) -> str:
    """The difference with its one-sided bounds, signed, in the column's unit."""
    text = _signed(column, change.difference)
    if change.lower is None or change.upper is None:
        return f"{text} (not bounded)"
    if change.lower == change.upper:
        return text
    return f"{text} [{_signed(column, change.lower)}, {_signed(column, change.upper)}]"


def _signed(column: Column, value: float) -> str:
    return f"{value / column.factor:+.3g}" if value else "0"


def _verdict(column: Column, change: Change) -> str:
    return f"may be worse by {column.amount(change.margin or 0.0)}: {WORDS[change.outcome]}"


def render_changes(table: Table, results: Results) -> str:
    """Every change, those that are worse first; nothing where nothing was compared."""
    found = [(row, change) for row in results.candidates for change in row.changes]
    if not found:
        return ""
    found.sort(key=lambda pair: _urgency(pair[1]))
    confidence = found[0][1].confidence
    head = "".join(
        f'<th scope="col" data-c="{key}"'
        + (' class="name"' if text else "")
        + (' data-kind="text"' if text and key != "ok" else "")
        + f">{label}</th>"
        for key, label, text in _HEADS
    )
    lines = "".join(_line(row, change, _column(table, change)) for row, change in found)
    label = escape(f"Against the baseline {results.baseline}".rstrip())
    return (
        f'<h3>{label}</h3><div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        '<table class="sortable"><caption>New minus saved, paired over the same windows; in '
        f"brackets one-sided bounds, each with {confidence:.4g} confidence.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _line(row: CandidateResult, change: Change, column: Column) -> str:
    judged = "".join((_SIGNS.get(change.outcome, ""), " ", WORDS.get(change.outcome, ""))).strip()
    style = _STYLES.get(change.outcome, "soft")
    margin = "" if change.margin is None else column.amount(change.margin)
    numbers = (
        ("saved", sort_key(change.saved), column.number(change.saved) + column.suffix),
        ("value", sort_key(change.value), column.number(change.value) + column.suffix),
        ("difference", sort_key(change.difference), difference_text(column, change)),
        ("margin", "" if change.margin is None else sort_key(change.margin), margin),
    )
    cells = "".join(
        f'<td data-c="{key}" data-v="{value}">{escape(text)}</td>' for key, value, text in numbers
    )
    return (
        f'<tr><td class="text {style}" data-c="ok" data-v="{_urgency(change)}">'
        f'<span class="judged">{judged}</span></td>'
        f'<th scope="row" class="name" data-c="id" data-v="{escape(row.id)}">{escape(row.id)}</th>'
        f'<td class="text" data-c="metric" data-v="{escape(change.metric)}">'
        f"{escape(change.metric)}</td>{cells}</tr>"
    )
