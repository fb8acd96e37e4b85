"""The terminal's table: its width, what it leaves out and what it says failed."""

from __future__ import annotations

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.report.terminal import render_terminal
from pytest_qlab.results import Budget, CandidateResult, Measure, Results


def columns(line: str) -> int:
    """Width on a terminal, by the Unicode properties."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in line
    )


def test_rows_are_in_document_order_with_the_documents_numbers(document: Results) -> None:
    lines = render_terminal(document, 120)
    first = next(place for place, line in enumerate(lines) if line.startswith("none"))
    shown = lines[first : first + len(document.candidates)]
    assert [line.split()[0] for line in shown] == [row.id for row in document.candidates]
    for row, line in zip(document.candidates[:-1], shown, strict=False):
        assert f"{row.measures['perplexity'].value:.2f}" in line.split()


def test_ascii_only(document: Results) -> None:
    for width in (60, 100, 200):
        assert all(line.isascii() for line in render_terminal(document, width))


def test_failures_come_first_then_notes(document: Results) -> None:
    lines = render_terminal(document, 100)
    place = lines.index("failures:")
    after = "\n".join(lines[place:])
    assert "gptq-w3g128: perplexity_delta = +1.442, budget < 1.3, 0.142 over" in after
    assert "awq-w3g96: MethodError" in after
    assert after.index("awq-w3g96") < after.index("left out for width")
    assert lines[-1] == "9 artefacts built, 4 reused, 576 forward passes, 97.4 s"


def test_what_does_not_fit_is_named(document: Results) -> None:
    narrow = " ".join(render_terminal(document, 60))
    assert "left out for width:" in narrow
    assert "latency.p99" in narrow
    wide = " ".join(render_terminal(document, 1000))
    assert "left out for width" not in wide


def test_the_most_important_columns_stay(document: Results) -> None:
    head = next(line for line in render_terminal(document, 60) if line.startswith("candidate"))
    assert {"dppl", "KL", "bits"} <= set(head.split())


def test_nothing_measured() -> None:
    assert render_terminal(Results(), 80) == ["No candidate was measured."]


@given(width=st.integers(60, 200))
@settings(max_examples=60, deadline=None)
def test_width_is_never_exceeded(document: Results, width: int) -> None:
    assert max(map(columns, render_terminal(document, width))) <= width


names = st.text(min_size=1, max_size=60)
numbers = st.floats(allow_nan=False) | st.sampled_from([0.0, 1e-300, 1e300])
measures = st.builds(
    Measure,
    value=numbers,
    lower=st.none() | numbers,
    upper=st.none() | numbers,
    unit=st.sampled_from(["", "s", "bytes", "dB"]) | names,
    simulated=st.booleans(),
)
budgets = st.builds(
    Budget,
    test=names,
    metric=st.sampled_from(["kl.mean", "perplexity"]) | names,
    value=numbers,
    op=st.sampled_from(["<", "<=", ">", ">="]),
    budget=numbers,
    ok=st.booleans(),
)
keys = st.sampled_from(["kl.mean", "perplexity", "latency.p50", "size", "kl.mean[a]"]) | names
candidates = st.builds(
    CandidateResult,
    id=names,
    method=names,
    measures=st.dictionaries(keys, measures, max_size=6),
    budgets=st.lists(budgets, max_size=3),
    error=st.just("") | st.text(max_size=300),
)
anything = st.builds(
    Results,
    candidates=st.lists(candidates, max_size=5),
    model=st.dictionaries(st.sampled_from(["name", "id", "tokens"]), names | st.integers()),
)


@given(results=anything, width=st.integers(60, 200))
@settings(max_examples=150, deadline=None)
def test_any_document_fits_and_carries_no_control_character(results: Results, width: int) -> None:
    for line in render_terminal(results, width):
        assert columns(line) <= width
        assert all(c.isprintable() for c in line)


@given(results=anything)
@settings(max_examples=60, deadline=None)
def test_any_document_becomes_a_page_and_markdown(results: Results) -> None:
    from pytest_qlab.report.html import render_page
    from pytest_qlab.report.markdown import render_markdown
    from pytest_qlab.report.tables import render_csv

    assert render_page(results).endswith("</html>\n")
    assert len(render_markdown(results).encode()) < 60_000
    assert render_csv(results).startswith("id,method,")


def test_simulated_is_explained_only_where_it_is_marked() -> None:
    measured = {"memory.peak": Measure(value=2.0**20, unit="bytes", simulated=True)}
    row = CandidateResult(id="rtn-w4", method="rtn", kernel="dequantize-matmul", simulated=True)
    unmarked = Results(candidates=[row])
    marked = Results(candidates=[row.model_copy(update={"measures": measured})])
    assert not any("simulated" in line for line in render_terminal(unmarked, 100))
    assert any("simulated" in line for line in render_terminal(marked, 100))
