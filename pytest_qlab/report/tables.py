"""The document as CSV: one row a candidate, every measure with its interval, at full precision."""

from __future__ import annotations

import csv
import io
import json

from pytest_qlab.report.columns import columns_of
from pytest_qlab.results import Results

FIXED = ("id", "method", "options", "kernel", "simulated", "error")
OUTCOMES = ("passed", "failed", "error", "skipped")
PARTS = ("", ".lower", ".upper")
CHANGED = (".saved", ".difference", ".outcome")


def render_csv(results: Results) -> str:
    """RFC 4180 with newlines of one character; absent values are empty; options are JSON.

    Each measure has the columns NAME, NAME.lower and NAME.upper, in the measure's own unit. One
    that was compared with a saved baseline has NAME.saved, NAME.difference and NAME.outcome, too.
    """
    names = [column.name for column in columns_of(results)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [*FIXED, *(f"tests.{outcome}" for outcome in OUTCOMES)]
    changed = {change.metric for row in results.candidates for change in row.changes}
    compared = [name for name in names if name in changed]
    heads += [name + part for name in names for part in PARTS]
    writer.writerow([*heads, *(name + part for name in compared for part in CHANGED)])
    for row in results.candidates:
        options = json.dumps(row.options, sort_keys=True)
        fields: list[object] = [row.id, row.method, options, row.kernel, row.simulated, row.error]
        outcomes = list(row.tests.values())
        fields += [outcomes.count(outcome) for outcome in OUTCOMES]  # type: ignore[arg-type]
        for name in names:
            measure = row.measures.get(name)
            numbers = (
                (None, None, None)
                if measure is None
                else (measure.value, measure.lower, measure.upper)
            )
            fields += ["" if number is None else repr(number) for number in numbers]
        changes = {change.metric: change for change in row.changes}
        for name in compared:
            change = changes.get(name)
            fields += (
                ["", "", ""]
                if change is None
                else [repr(change.saved), repr(change.difference), change.outcome]
            )
        writer.writerow(fields)
    return out.getvalue()
