"""The benchmark table as Markdown, for a CI step summary or a comment."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pytest_qlab.report.changes import told_changes
from pytest_qlab.report.describe import noise_floor, outcome, subject, work
from pytest_qlab.report.table import Cell, Row, Table, budget_text, build_table, verdict_text
from pytest_qlab.results import Results

MOST_BYTES = 60_000
MOST_TEXT = 300
_ACTIVE = re.compile(r"([\\`*_{}\[\]()#+!|~>$-])")


def render_markdown(results: Results) -> str:
    """Heading, table, what failed, notes: GitHub's Markdown, less than 60 kB.

    Rows, then failures, are left out from the end where there are too many; a line says so.
    """
    table = build_table(results)
    shown = table.only(primary=True)
    head = ["## Quantization benchmark", ""]
    head += [f"{label}: {text_of(text)}  " for label, text in subject(results)]
    tests = outcome(results)
    head += [f"Tests: {text_of(tests)}  "] if tests else []
    if not table.rows:
        return "\n".join([*head, "", "No candidate was measured.", ""])
    lines = [*head, "", *_heads(shown)]
    rows = [_row(row) for row in shown.rows]
    failures = _failures(table)
    changes = [
        f"- {text_of(row.id)}: {text_of(text)}" for row, text in told_changes(table, results)
    ]
    notes = ["", *_notes(table, results), ""]
    room = MOST_BYTES - 2000 - _size([*lines, *notes])
    kept = _fitting(rows, room * 3 // 4 if failures else room)
    told_failures = _fitting(failures, room - _size(kept))
    told = _fitting(changes, room - _size(kept) - _size(told_failures))
    lines += kept
    if len(kept) < len(rows):
        lines += ["", f"{len(rows) - len(kept)} further candidates are left out for length."]
    if failures:
        lines += ["", "### Failures", "", *told_failures]
    if len(told_failures) < len(failures):
        lines.append(f"- {len(failures) - len(told_failures)} further failures")
    if changes:
        lines += ["", f"### Against the baseline {text_of(results.baseline)}", "", *told]
    if len(told) < len(changes):
        lines.append(f"- {len(changes) - len(told)} further changes")
    return "\n".join([*lines, *notes])


def text_of(text: str) -> str:
    """Any text as one line of Markdown that shows it and nothing else: no link, tag or mention."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= MOST_TEXT else line[: MOST_TEXT - 1] + "…"
    line = _ACTIVE.sub(r"\\\1", line.replace("&", "&amp;"))
    # A dot before www or after http, and an at sign, would make links and mentions.
    return line.replace("<", "&lt;").replace("@", "&#64;").replace("://", "&#58;//")


def _size(lines: Sequence[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)


def _fitting(lines: Sequence[str], room: int) -> list[str]:
    kept: list[str] = []
    for line in lines:
        room -= len(line.encode()) + 1
        if room < 0:
            break
        kept.append(line)
    return kept


def _heads(table: Table) -> list[str]:
    # So many columns that the heading alone is too long come from foreign metrics only.
    names = ["Candidate"]
    for column in table.columns:
        unit = f" ({column.unit})" if column.unit else ""
        names.append(text_of(column.heading + unit))
    return [f"| {' | '.join(names)} |", f"|:---|{'---:|' * len(table.columns)}"]


def _row(row: Row) -> str:
    name = text_of(row.candidate.id)
    name = f"{name} (baseline)" if row.baseline else name
    name = f"❌ {name}" if row.candidate.error else name
    return f"| {' | '.join([name, *map(_cell, row.cells)])} |"


def _cell(cell: Cell) -> str:
    text = text_of(cell.text)
    text = f"**{text}**" if cell.best else text
    text = f"{text} {text_of(cell.spread)}" if cell.spread else text
    text = f"{text} †" if cell.simulated else text
    return text if cell.ok is None else f"{'✅' if cell.ok else '❌'} {text}"


def _failures(table: Table) -> list[str]:
    columns = {column.name: column for column in table.columns}
    lines = []
    for row in table.rows:
        for b in row.candidate.budgets:
            if not b.ok:
                column = columns[b.metric]
                value = f"{column.number(b.value)}{column.suffix}"
                lines.append(
                    f"- {text_of(row.candidate.id)}: {text_of(b.metric)} = {text_of(value)}, "
                    f"budget {text_of(budget_text(column, b))}, "
                    f"{text_of(verdict_text(column, b))} ({text_of(b.test)})"
                )
        if row.candidate.error:
            lines.append(f"- {text_of(row.candidate.id)}: {text_of(row.candidate.error)}")
    return lines


def _notes(table: Table, results: Results) -> list[str]:
    cells = [cell for row in table.rows for cell in row.cells]
    notes = []
    if any(cell.simulated for cell in cells):
        kernels = sorted({r.candidate.kernel for r in table.rows if r.candidate.simulated} - {""})
        through = f" ({', '.join(kernels)})" if kernels else ""
        notes.append(
            f"† simulated: no kernel runs the packed bits{text_of(through)}; the time says nothing "
            "about the format's speed.  "
        )
    floor = noise_floor(results)
    if floor:
        notes.append(f"{text_of(floor[0].upper() + floor[1:])}.  ")
    notes.append(f"Bold is the best of its column. {text_of(work(results))}.")
    return notes
