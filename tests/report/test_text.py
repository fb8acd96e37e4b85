"""Markdown, CSV and pytest-benchmark's JSON."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from pytest_qlab.errors import DataError
from pytest_qlab.report.benchmark import render_benchmark
from pytest_qlab.report.markdown import render_markdown
from pytest_qlab.report.tables import render_csv
from pytest_qlab.results import Budget, CandidateResult, Measure, Results


def table(markdown: str) -> list[list[str]]:
    """Cells of the Markdown table, as GitHub splits them: at pipes that are not escaped."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_table_is_well_formed(document: Results) -> None:
    rows = table(render_markdown(document))
    assert len(rows) == 2 + len(document.candidates)
    assert len({len(row) for row in rows}) == 1
    assert set(rows[1]) == {":---", "---:"}
    assert rows[2][0].startswith("none")


def test_markdown_shows_values_budgets_and_failures(document: Results) -> None:
    text = render_markdown(document)
    cells = {row[0].replace("\\", ""): row for row in table(text)}
    place = next(i for i, head in enumerate(table(text)[0]) if head.endswith("perplexity"))
    assert cells["gptq-w3g128"][place].startswith("❌ \\+1.442")
    assert cells["gptq-w4g128"][place].startswith("✅ \\+0.232")
    assert "❌ awq-w3g96" in cells
    assert "### Failures" in text


def test_markdown_of_hostile_text_stays_one_table() -> None:
    hostile = "a|b\n|c| <script> [x](http://e) @someone `q` **z**"
    row = CandidateResult(
        id=hostile,
        method="m",
        measures={"kl.mean": Measure(value=1.0), hostile: Measure(value=2.0, unit="a|b")},
        error=hostile,
        budgets=[Budget(test=hostile, metric=hostile, value=2.0, op="<", budget=1.0, ok=False)],
    )
    text = render_markdown(Results(candidates=[row], model={"name": hostile}))
    rows = table(text)
    assert len(rows) == 3
    assert {len(cells) for cells in rows} == {3}
    assert "<script" not in text
    assert "@someone" not in text
    assert re.search(r"(?<!\\)\[x", text) is None
    assert "http://" not in text


def test_markdown_stays_below_its_limit() -> None:
    rows = [
        CandidateResult(
            id=f"candidate-{index}-" + "x" * 250,
            method="m",
            measures={"kl.mean": Measure(value=1.0 + index)},
            error="e" * 500 if index % 2 else "",
        )
        for index in range(900)
    ]
    text = render_markdown(Results(candidates=rows))
    assert 40_000 < len(text.encode()) < 60_000
    assert "further candidates are left out" in text
    assert "further failures" in text


def test_csv_round_trip(document: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(document))))
    assert [row["id"] for row in rows] == [row.id for row in document.candidates]
    for row, candidate in zip(rows, document.candidates, strict=True):
        assert json.loads(row["options"]) == candidate.options
        assert row["error"] == candidate.error
        assert row["tests.passed"] == str(list(candidate.tests.values()).count("passed"))
        names = {key for key in row if f"{key}.lower" in row}
        assert names >= set(candidate.measures)
        for name in names:
            measure = candidate.measures.get(name)
            parts = (name, f"{name}.lower", f"{name}.upper")
            shown = [float(row[part]) if row[part] else None for part in parts]
            if measure is None:
                assert shown == [None, None, None]
            else:
                assert shown == [measure.value, measure.lower, measure.upper]


def test_csv_of_nothing_is_its_heading() -> None:
    assert render_csv(Results()).count("\n") == 1


def test_benchmark_holds_what_was_measured_and_names_what_was_not(document: Results) -> None:
    exported = json.loads(render_benchmark(document))
    rows = {row["param"]: row for row in exported["benchmarks"]}
    measured = [row for row in document.candidates if "latency.p50" in row.measures]
    assert list(rows) == [row.id for row in measured]
    for candidate in measured:
        stats = rows[candidate.id]["stats"]
        assert stats["median"] == candidate.measures["latency.p50"].value
        assert stats["max"] == candidate.measures["latency.p99"].value
        assert stats["rounds"] == candidate.measures["latency.p50"].n
        extra = rows[candidate.id]["extra_info"]
        assert {"min", "mean", "stddev", "iqr"} <= set(extra["not_measured"])
        assert "median" not in extra["not_measured"]
        assert extra["simulated"] == (candidate.id != "none")


def test_benchmark_without_latencies_says_what_to_do() -> None:
    row = CandidateResult(id="a", method="m", measures={"kl.mean": Measure(value=1.0)})
    with pytest.raises(DataError, match="latency"):
        render_benchmark(Results(candidates=[row]))
