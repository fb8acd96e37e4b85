"""The benchmark table as HTML: a section for pytest-html, and a page that stands alone."""

from __future__ import annotations

import math
from html import escape

from pytest_qlab.report.changes import render_changes
from pytest_qlab.report.column import TIMES, Column
from pytest_qlab.report.columns import is_baseline
from pytest_qlab.report.describe import additivity, noise_floor, outcome, subject
from pytest_qlab.report.html_budgets import (
    OPERATORS,
    SIGNS,
    budget_html,
    render_budgets,
    sign_of,
    sort_key,
)
from pytest_qlab.report.plots import is_aggregated, layer_strip, scatter, worst_layers
from pytest_qlab.report.provenance import generator, render_provenance
from pytest_qlab.report.style import SCRIPT, STYLE
from pytest_qlab.report.table import (
    ABSENT,
    Cell,
    Row,
    Table,
    build_table,
    failed_budgets,
    margin_text,
    run_failed,
    verdict_text,
)
from pytest_qlab.results import CandidateResult, Results

MOST_PROBLEMS = 12
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render_section(results: Results) -> str:
    """The report as a fragment with its own style sheet, for pytest-html's summary."""
    return f"<style>{STYLE}</style>{_body(results)}<script>{SCRIPT}</script>"


def render_page(results: Results) -> str:
    """The report as a page that needs no other file and no network."""
    name = str(results.model.get("name") or results.model.get("id") or "")
    title = escape(f"Quantization benchmark{': ' + name if name else ''}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="generator" content="{escape(generator(results))}">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f'<body class="qlab-page"><main>{_body(results)}</main>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _body(results: Results) -> str:
    table = build_table(results)
    parts = [_head(results), _problems(table)]
    if table.rows:
        count = len(table.rows)
        caption = (
            f"{count} candidate{'' if count == 1 else 's'}. The best value of each column is "
            "underlined; the baseline takes no part in that."
        )
        parts += [_table(table.only(primary=True), "main", caption), _notes(table, results)]
    else:
        parts.append("<p>No candidate was measured.</p>")
    plots = _scatter(results) + _layers(results)
    parts.append(f'<div class="plots">{plots}</div>' if plots else "")
    parts += [_errors(results), render_budgets(table, results), render_changes(table, results)]
    parts += [_worst(results), _rest(table)]
    parts.append(render_provenance(results))
    return f'<section class="qlab" aria-label="Quantization benchmark">{"".join(parts)}</section>'


def _head(results: Results) -> str:
    facts = "".join(
        f"<div><dt>{label}</dt><dd>{escape(text)}</dd></div>" for label, text in subject(results)
    )
    failed = run_failed(results)
    broken = len(failed_budgets(results))
    worse = sum(change.outcome == "fail" for row in results.candidates for change in row.changes)
    errors = sum(bool(row.error) for row in results.candidates)
    texts = []
    if broken:
        texts.append(f"{broken} budget{'' if broken == 1 else 's'} not kept")
    if worse:
        texts.append(f"{worse} measure{'' if worse == 1 else 's'} worse than saved")
    if errors:
        texts.append(f"{errors} candidate{'' if errors == 1 else 's'} could not be measured")
    told = outcome(results)
    if told:
        texts.append(f"tests: {told}")
    if failed and not texts:
        texts.append(f"the run ended with exit status {results.exit_status}")
    verdict = "; ".join(texts) or ("not in order" if failed else "all in order")
    return (
        f"<h2>Quantization benchmark</h2>{f'<dl class=facts>{facts}</dl>' if facts else ''}"
        f'<p class="verdict {"bad" if failed else "ok"}">{SIGNS[not failed]} {escape(verdict)}</p>'
    )


def _problems(table: Table) -> str:
    """The budgets that were not kept, in words, before any table."""
    columns = {column.name: column for column in table.columns}
    lines = []
    for row in table.rows:
        for budget in row.candidate.budgets:
            if not budget.ok:
                column = columns[budget.metric]
                lines.append(
                    f"<li><strong>{escape(row.candidate.id)}</strong>: {escape(budget.metric)} "
                    f"{escape(column.number(budget.value) + column.suffix)}, budget "
                    f"{budget_html(column, budget)}, "
                    f'<span class="bad">{escape(verdict_text(column, budget))}</span> '
                    f'<span class="soft">in {escape(budget.test)}</span></li>'
                )
    if len(lines) > MOST_PROBLEMS:
        lines[MOST_PROBLEMS:] = [f"<li>{len(lines) - MOST_PROBLEMS} more below</li>"]
    return f'<ul class="problems">{"".join(lines)}</ul>' if lines else ""


def _table(table: Table, kind: str, caption: str) -> str:
    spans: list[tuple[str, int]] = []
    for column in table.columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + 1)
        else:
            spans.append((column.group, 1))
    groups = "".join(
        f'<th scope="colgroup" colspan="{count}" class="group">{name}</th>' for name, count in spans
    )
    first = [
        place == 0 or table.columns[place - 1].group != column.group
        for place, column in enumerate(table.columns)
    ]
    heads = "".join(_heading(c, lead) for c, lead in zip(table.columns, first, strict=True))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{kind} table">'
        f'<table class="sortable {kind}"><caption>{escape(caption)}</caption><thead>'
        f'<tr class="groups"><td class="name"></td>{groups}</tr><tr>'
        '<th scope="col" class="name" data-c="id" data-kind="text">'
        "Candidate</th>"
        f"{heads}</tr></thead><tbody>"
        f"{''.join(_row(row, table, first) for row in table.rows)}</tbody></table></div>"
    )


def _heading(column: Column, lead: bool) -> str:
    unit = f'<span class="unit">{escape(column.unit)}</span>' if column.unit else ""
    first = "descending" if column.better == "higher" else "ascending"
    kind = ' class="group"' if lead else ""
    return (
        f'<th scope="col"{kind} data-c="{escape(column.name)}" data-first="{first}" '
        f'title="{escape(column.title)}">{escape(column.heading)}{unit}</th>'
    )


def _row(row: Row, table: Table, first: list[bool]) -> str:
    candidate = row.candidate
    options = ", ".join(f"{key}={value}" for key, value in candidate.options.items())
    name = (
        f'<th scope="row" class="name" data-c="id" data-v="{escape(candidate.id)}" '
        f'title="{escape(f"{candidate.method}: {options}".rstrip(": "))}">'
        f"{escape(candidate.id)}{_tests(candidate, row.baseline)}</th>"
    )
    measured = any(cell.value is not None for cell in row.cells)
    if row.status and not measured:
        text = _first_line(candidate.error) or "not measured"
        style = "error" if candidate.error else "text soft"
        sign = "✗ " if candidate.error else ""
        cells = f'<td class="group {style}" colspan="{len(row.cells)}">{sign}{escape(text)}</td>'
    else:
        cells = "".join(
            _cell(cell, column, lead)
            for cell, column, lead in zip(row.cells, table.columns, first, strict=True)
        )
    return f"<tr{' class=baseline' if row.baseline else ''}>{name}{cells}</tr>"


def _tests(candidate: CandidateResult, baseline: bool) -> str:
    """Small text below the name: what the row is, and how its tests ended."""
    texts = ["baseline"] if baseline else []
    outcomes = list(candidate.tests.values())
    for kind in ("failed", "error", "passed", "skipped"):
        count = outcomes.count(kind)
        if count:
            style = "bad" if kind in ("failed", "error") else "ok" if kind == "passed" else "soft"
            sign = {"bad": "✗ ", "ok": "✓ "}.get(style, "")
            texts.append(f'<span class="{style}">{sign}{count} {kind}</span>')
    if candidate.error and candidate.measures:
        texts.append('<span class="bad">✗ stopped by an error</span>')
    return f'<span class="sub">{", ".join(texts)}</span>' if texts else ""


def _cell(cell: Cell, column: Column, lead: bool) -> str:
    styles = ["group"] if lead else []
    place = f'data-c="{escape(column.name)}"'
    title = f'title="{escape(cell.title)}"'
    if cell.value is None:
        styles.append("absent")
        return f'<td class="{" ".join(styles)}" {place} {title}>{ABSENT}</td>'
    if cell.best:
        styles.append("best")
    if cell.ok is not None:
        styles.append("kept" if cell.ok else "broken")
    dagger = "<sup>†</sup>" if cell.simulated else ""
    hidden = '<span class="hidden"> (best)</span>' if cell.best else ""
    small = f'<span class="sub">{escape(cell.spread)}</span>' if cell.spread else ""
    for budget in cell.budgets:
        told = f"{sign_of(budget)} {OPERATORS.get(budget.op, budget.op)} "
        told += column.plain(budget.budget)
        small += f'<span class="sub judged">{escape(told)}</span>'
        if not budget.ok:
            small += f'<span class="sub judged">{escape(margin_text(column, budget))}</span>'
    kind = f'class="{" ".join(styles)}" ' if styles else ""
    value = "" if math.isnan(cell.value) else sort_key(cell.value)
    return (
        f'<td {kind}{place} data-v="{value}" {title}>'
        f'<span class="v">{escape(cell.text)}</span>{dagger}{hidden}{small}</td>'
    )


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 300 else line[:299] + "…"


def _notes(table: Table, results: Results) -> str:
    notes = []
    flagged = [row for row in table.rows if any(cell.simulated for cell in row.cells)]
    if flagged:
        kernels = sorted({row.candidate.kernel for row in flagged if row.candidate.kernel})
        through = f" ({', '.join(kernels)})" if kernels else ""
        notes.append(
            f"<sup>†</sup> simulated: no kernel runs this candidate's packed bits here, so its "
            f"layers are unpacked and multiplied as floats{escape(through)}. The time says nothing "
            "about the format's speed."
        )
    confidences = {
        m.confidence
        for row in results.candidates
        for m in row.measures.values()
        if m.lower is not None
    }
    if confidences:
        levels = " or ".join(f"{100 * level:g}%" for level in sorted(confidences))
        notes.append(f"Small ± numbers: {levels} confidence intervals, clustered by document.")
    floor = noise_floor(results)
    if floor:
        notes.append(f"{escape(floor[0].upper() + floor[1:])}. It bounds what any KL can mean.")
    if any(cell.value is None for row in table.rows for cell in row.cells):
        notes.append(f"{ABSENT} not measured.")
    return (
        f'<ul class="notes">{"".join(f"<li>{note}</li>" for note in notes)}</ul>' if notes else ""
    )


def _errors(results: Results) -> str:
    failed = [row for row in results.candidates if row.error]
    if not failed:
        return ""
    items = "".join(
        f'<p><strong>{escape(row.id)}</strong></p><pre class="error">{escape(row.error)}</pre>'
        for row in failed
    )
    return f"<h3>Errors</h3>{items}"


def _scatter(results: Results) -> str:
    svg = scatter(results)
    if not svg:
        return ""
    caption = (
        "Lower is closer to the baseline. The dotted line joins candidates that no other beats in "
        "both size and quality; bars are confidence intervals. The baseline is not drawn: its "
        "distance from itself is zero."
    )
    figure = f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    return f"<div><h3>Size against quality</h3>{figure}</div>"


def _layers(results: Results) -> str:
    svg = layer_strip(results)
    if not svg:
        return ""
    what = "the lowest of each block" if is_aggregated(results) else "each quantized layer"
    caption = (
        f"Signal-to-noise ratio of the weights, {what}, in the order of the model; numbers above "
        "are decoder blocks. Darker red is noisier."
    )
    figure = f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    return f"<div><h3>Error by layer</h3>{figure}</div>"


def _worst(results: Results) -> str:
    """The same as the strip, for those who read numbers: where each candidate loses most."""
    lines = []
    for row in results.candidates:
        for layer in [] if is_baseline(row) else worst_layers(row, 3):
            error = ABSENT if layer.output_error is None else f"{layer.output_error:.4g}"
            decibels = ABSENT if layer.snr_db is None else f"{layer.snr_db:.1f}"
            lines.append(
                f'<tr><th scope="row">{escape(row.id)}</th>'
                f'<td class="text">{escape(layer.name)}</td>'
                f"<td>{layer.shape[0]} {TIMES} {layer.shape[1]}</td>"
                f"<td>{layer.bits_per_weight:.2f}</td><td>{decibels}</td>"
                f"<td>{error}</td><td>{ABSENT if layer.kl is None else f'{layer.kl:.3g}'}</td></tr>"
            )
    head = "".join(
        f'<th scope="col"{" class=name" if place < 2 else ""}>{label}</th>'
        for place, label in enumerate(
            (
                "Candidate",
                "Layer",
                "Shape",
                "Bits per weight",
                "SNR, dB",
                "Output error",
                "KL by itself, nats",
            )
        )
    )
    if not lines:
        return ""
    told = "".join(
        f"<p>{escape(text)}.</p>" for text in map(additivity, results.candidates) if text
    )
    return (
        "<details><summary>The three noisiest layers of each candidate</summary>"
        '<div class="scroll"><table><caption>Those that cause most KL by themselves, where that '
        "was measured; else those whose weights moved most.</caption><thead><tr>"
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{told}</details>"
    )


def _rest(table: Table) -> str:
    rest = table.only(primary=False)
    if not rest.columns:
        return ""
    count = len(rest.columns)
    return (
        f"<details><summary>{count} more measure{'' if count == 1 else 's'}</summary>"
        f"{_table(rest, 'more', 'Further measures of the same candidates.')}</details>"
    )
