"""What the views say of careful assertions, beside plain ones."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pytest_qlab.report.columns import column_named
from pytest_qlab.report.html import render_section
from pytest_qlab.report.markdown import render_markdown
from pytest_qlab.report.table import build_table, decision_text, outcome_word, verdict_text
from pytest_qlab.report.terminal import render_terminal
from pytest_qlab.results import Budget, CandidateResult, Measure, Results


def budget(**fields: Any) -> Budget:
    given = {
        "test": "test_gate",
        "metric": "kl.mean",
        "value": 0.012,
        "op": "<=",
        "budget": 0.02,
        "ok": True,
        **fields,
    }
    return Budget.model_validate(given)


def document(*budgets: Budget) -> Results:
    results = Results(version="0.1.0", created="2026-11-27T00:00:00+00:00")
    measure = Measure(value=0.012, lower=0.011, upper=0.013, n=100, unit="nats")
    results.add(
        CandidateResult(
            id="gptq-w4g128",
            method="gptq",
            measures={"kl.mean": measure},
            budgets=list(budgets),
            tests={"test_gate": "passed" if all(b.ok for b in budgets) else "failed"},
        )
    )
    return results


PASSED = budget(outcome="pass", lower=0.0105, upper=0.0135, windows=16)
FAILED = budget(budget=0.01, ok=False, outcome="fail", lower=0.0105, upper=0.0135, windows=16)
OPEN = budget(budget=0.0121, ok=False, outcome="inconclusive", lower=0.011, upper=0.013, windows=64)
UNBOUNDED = budget(ok=False, outcome="inconclusive", windows=1)
COUNTED = budget(outcome="pass", lower=0.012, upper=0.012)
PLAIN = budget()


@pytest.mark.parametrize(
    ("given", "word", "told"),
    [
        (PASSED, "kept", "at most 0.0135 nats, 16 windows"),
        (FAILED, "not kept", "at least 0.0105 nats, 16 windows"),
        (OPEN, "undecided", "between 0.011 and 0.013 nats, 64 windows"),
        (UNBOUNDED, "undecided", "between -∞ and ∞ nats, 1 window"),
        (COUNTED, "kept", "exact"),
        (PLAIN, "kept", ""),
        (budget(ok=False, budget=0.01), "not kept", ""),
    ],
)
def test_a_decision_in_words(given: Budget, word: str, told: str) -> None:
    column = column_named("kl.mean").fitted([given.value])
    assert outcome_word(given) == word
    assert decision_text(column, given) == told


def test_the_bound_of_a_measure_of_which_more_is_better() -> None:
    column = column_named("snr_db").fitted([20.0])
    more: dict[str, Any] = {"metric": "snr_db", "op": ">=", "value": 20.0}
    kept = budget(**more, budget=15.0, outcome="pass", lower=18.0, upper=22.0, windows=16)
    missed = budget(**more, budget=25.0, ok=False, outcome="fail", lower=18.0, upper=22.0)
    assert decision_text(column, kept) == "at least 18 dB, 16 windows"
    assert decision_text(column, missed) == "at most 22 dB"


@pytest.mark.parametrize(
    ("value", "ok", "expected"),
    [(0.019, False, "left"), (0.021, False, "over"), (0.021, True, "over"), (0.019, True, "left")],
)
def test_what_is_undecided_may_be_on_either_side_of_its_budget(
    value: float, ok: bool, expected: str
) -> None:
    column = column_named("kl.mean").fitted([value])
    given = budget(value=value, ok=ok, outcome="inconclusive", lower=0.01, upper=0.03, windows=64)
    told = verdict_text(column, given)
    assert re.fullmatch(rf"undecided, 0\.001 nats {expected} \(between .*, 64 windows\)", told)


def test_every_view_says_that_a_gate_is_undecided_and_between_what() -> None:
    results = document(OPEN)
    for text in ("\n".join(render_terminal(results, 200)), render_markdown(results)):
        plain = text.replace("\\", "")
        assert "undecided, " in plain
        assert "between 0.011 and 0.013 nats, 64 windows" in plain
    page = render_section(results)
    assert '<span class="judged">? undecided</span>' in page
    assert "between 0.011 and 0.013 nats, 64 windows" in page


def test_the_page_has_a_column_for_decisions_only_where_there_are_any() -> None:
    assert "Decided by" in render_section(document(PASSED, PLAIN))
    assert "Decided by" not in render_section(document(PLAIN))


def test_the_cell_says_what_a_passing_gate_rests_on() -> None:
    (row,) = build_table(document(PASSED)).rows
    (cell,) = [each for each in row.cells if each.budgets]
    assert cell.ok
    assert "0.008 nats left (at most 0.0135 nats, 16 windows)" in cell.title


def test_budgets_that_were_not_kept_come_first_and_undecided_ones_before_failed_ones() -> None:
    page = render_section(document(PASSED, FAILED, OPEN))
    body = page[page.index("<h3>Budgets</h3>") :]
    words = re.findall(r'<span class="judged">. ([a-z ]+)</span></td>', body)
    assert words == ["undecided", "not kept", "kept"]


def test_speed_under_load_has_the_columns_of_its_measure() -> None:
    column = column_named("serving.ttft.p90[4]").fitted([0.025])
    assert (column.heading, column.unit, column.better) == ("TTFT p90, 4", "ms", "lower")
    served = column_named("serving.tokens_per_second[rate=2]").fitted([250.0])
    assert (served.unit, served.better) == ("tokens/s", "higher")
