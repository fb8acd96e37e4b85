"""The benchmark table for a terminal of a given width, in ASCII."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_qlab.report.changes import told_changes
from pytest_qlab.report.column import TIMES, Column
from pytest_qlab.report.describe import noise_floor, subject, work
from pytest_qlab.report.table import ABSENT, Row, Table, budget_text, build_table, verdict_text
from pytest_qlab.results import Results

NARROWEST = 20
GAP = "  "
ASCII = str.maketrans(
    {ABSENT: "-", TIMES: "x", "±": "+/-", "∞": "inf", "µ": "u", "Δ": "d", "…": "..", "≥": ">="}
)


@dataclass(frozen=True)
class _Shown:
    """A column of text: `rank` says how soon it is left out."""

    heading: str
    unit: str
    rank: int
    texts: tuple[str, ...]
    named: str

    @property
    def width(self) -> int:
        return max(map(width_of, (self.heading, self.unit, *self.texts)))


def render_terminal(results: Results, width: int) -> list[str]:
    """Lines of at most `width` columns: the table, what failed, then notes.

    The least important columns are left out where the terminal is too narrow, and a note says so.
    """
    width = max(width, NARROWEST)
    lines = list(_wrapped(_subject(results), width, ""))
    table = build_table(results)
    if not table.rows:
        return [*lines, *_wrapped("No candidate was measured.", width, "")]
    body, left_out = _grid(table, width)
    lines += body
    failures = list(_failures(table))
    if failures:
        lines.append("failures:")
        for failure in failures:
            lines += _wrapped(failure, width, "  ")
    changes = [clean(f"{row.id}: {text}") for row, text in told_changes(table, results)]
    if changes:
        lines += _wrapped(clean(f"against the baseline {results.baseline}:"), width, "")
        for change in changes:
            lines += _wrapped(change, width, "  ")
    for note in _notes(table, results, body, left_out):
        lines += _wrapped(note, width, "")
    return lines


def _subject(results: Results) -> str:
    parts = [f"{label.lower()}: {text}" for label, text in subject(results)[:3]]
    return clean("; ".join(parts))


def clean(text: str) -> str:
    """Printable text on one line: no control character or escape sequence reaches the terminal."""
    shown = (c if c.isprintable() else " " for c in text.translate(ASCII))
    return " ".join("".join(shown).split())


def width_of(text: str) -> int:
    """Columns that a text takes; wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def clip(text: str, width: int) -> str:
    """The text, its end replaced by dots where it is wider than `width`."""
    if width_of(text) <= width:
        return text
    while text and width_of(text) > width - 2:
        text = text[:-1]
    return text + "." * min(2, width)


def _grid(table: Table, width: int) -> tuple[list[str], list[str]]:
    shown = [part for place in range(len(table.columns)) for part in _shown(table, place)]
    names = [
        clean(row.candidate.id) + (" !" if row.status == "error" else "") for row in table.rows
    ]
    first = max(map(width_of, ["candidate", *names]))
    least = sorted(shown, key=lambda column: column.rank)
    room = width - min(first, max(width // 3, 12))
    kept: list[_Shown] = []
    for column in least:  # the most important first; later ones may still fit where one did not
        if column.width + len(GAP) <= room:
            room -= column.width + len(GAP)
            kept.append(column)
    chosen = [column for column in shown if column in kept]
    used = sum(column.width + len(GAP) for column in chosen)
    first = min(first, width - used)
    rule = "-" * min(width, first + used)

    def line(name: str, texts: Sequence[str]) -> str:
        padded = (_right(text, c.width) for text, c in zip(texts, chosen, strict=True))
        return GAP.join([_left(clip(name, first), first), *padded]).rstrip()

    lines = [rule, line("candidate", [c.heading for c in chosen])]
    if any(column.unit for column in chosen):
        lines.append(line("", [column.unit for column in chosen]))
    lines.append(rule)
    for place, (row, name) in enumerate(zip(table.rows, names, strict=True)):
        texts = [column.texts[place] for column in chosen]
        if row.status == "error" and not row.candidate.measures:
            lines.append(clip(f"{_left(clip(name, first), first)}{GAP}{_problem(row)}", width))
        else:
            lines.append(line(name, texts))
    lines.append(rule)
    # Those of single domains would crowd out the names that matter.
    left_out = [c.named for c in shown if c not in kept and c.named and "[" not in c.named]
    return lines, left_out


def _shown(table: Table, place: int) -> Iterator[_Shown]:
    column = table.columns[place]
    cells = [row.cells[place] for row in table.rows]
    marks = ["!" if cell.ok is False else "~" if cell.simulated else "" for cell in cells]
    room = any(marks)
    texts = tuple(
        clean(cell.text) + (mark or (" " if room else ""))
        for cell, mark in zip(cells, marks, strict=True)
    )
    pad = " " if room else ""
    yield _Shown(
        clip(clean(column.short), 24) + pad,
        clean(column.unit) + pad if column.unit else "",
        column.rank,
        texts,
        clean(column.name),
    )
    if column.name in ("perplexity_delta", "kl.mean") and any(cell.spread for cell in cells):
        spreads = tuple(clean(cell.spread).removeprefix("+/-") for cell in cells)
        yield _Shown("+/-", "", column.rank + 13, spreads, "")


def _left(text: str, width: int) -> str:
    return text + " " * (width - width_of(text))


def _right(text: str, width: int) -> str:
    return " " * (width - width_of(text)) + text


def _problem(row: Row) -> str:
    return f"error: {clean(row.candidate.error)}"


def _failures(table: Table) -> Iterator[str]:
    for row in table.rows:
        columns: dict[str, Column] = {column.name: column for column in table.columns}
        told: set[str] = set()
        for budget in row.candidate.budgets:
            if not budget.ok:
                column = columns[budget.metric]
                told.add(budget.test)
                yield clean(
                    f"{row.candidate.id}: {budget.metric} = {column.number(budget.value)}"
                    f"{column.suffix}, budget {budget_text(column, budget)}, "
                    f"{verdict_text(column, budget)} ({budget.test})"
                )
        if row.candidate.error:
            yield clean(f"{row.candidate.id}: {row.candidate.error}")
        for test, outcome in row.candidate.tests.items():
            if outcome in ("failed", "error") and test not in told and not row.candidate.error:
                yield clean(f"{row.candidate.id}: {outcome} in {test}")


def _notes(
    table: Table, results: Results, body: Sequence[str], left_out: Sequence[str]
) -> Iterator[str]:
    cells = [cell for row in table.rows for cell in row.cells]
    if any(cell.ok is False for cell in cells):
        yield "!  a budget was not kept"
    if any("~" in line for line in body):
        kernels = sorted({r.candidate.kernel for r in table.rows if r.candidate.simulated})
        through = f" ({', '.join(k for k in kernels if k)})" if any(kernels) else ""
        yield clean(
            f"~  simulated: no kernel runs the packed bits{through}; the time says nothing about "
            "the format's speed"
        )
    floor = noise_floor(results)
    if floor:
        yield clean(floor)
    if left_out:
        yield f"left out for width: {', '.join(left_out)}"
    yield work(results)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    """Lines no wider than `width`, also for characters that take two columns."""
    if not text:
        return []
    more = indent + "  "
    factor = 1 if width_of(text) <= len(text) else 2
    wrapper = textwrap.TextWrapper(
        width=max(width // factor, len(more) + 2),
        initial_indent=indent,
        subsequent_indent=more,
        break_on_hyphens=False,
        max_lines=6,
        placeholder=" ..",
    )
    return wrapper.wrap(text)
