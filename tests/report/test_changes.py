"""Views of what has changed since a baseline was saved."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest

from pytest_qlab.errors import DataError
from pytest_qlab.report.html import render_page
from pytest_qlab.report.markdown import render_markdown
from pytest_qlab.report.tables import render_csv
from pytest_qlab.report.terminal import render_terminal, width_of
from pytest_qlab.results import CandidateResult, Change, Measure, Results, merge_results


def change(metric: str, saved: float, value: float, **more: Any) -> Change:
    return Change(metric=metric, saved=saved, value=value, difference=value - saved, **more)


def compared(*changes: Change, baseline: str = "v1") -> Results:
    measures = {each.metric: Measure(value=each.value) for each in changes}
    row = CandidateResult(id="small", method="rtn", measures=measures, changes=list(changes))
    return Results(baseline=baseline, candidates=[row])


WORSE = change("top1_agreement", 0.75, 0.5, lower=-0.3, upper=-0.2, margin=0.01, outcome="fail")
KEPT = change("size", 2048.0, 1024.0, lower=-1024, upper=-1024, margin=0.0, outcome="pass")
OPEN = change("kl.mean", 0.25, 0.5, margin=0.1, outcome="inconclusive")
SHOWN = change("perplexity_delta", 1.0, 1.5, lower=0.25, upper=0.75)
QUIET = change("layer_error", 0.1, 0.2, lower=0.1, upper=0.1)


def block(results: Results, width: int = 200) -> list[str]:
    lines = render_terminal(results, width)
    start = lines.index(f"against the baseline {results.baseline}:")
    return lines[start + 1 : start + 1 + sum(line.startswith("  ") for line in lines[start + 1 :])]


def test_what_matters_is_told_worst_first() -> None:
    assert block(compared(QUIET, SHOWN, KEPT, OPEN, WORSE)) == [
        "  small: top1_agreement 75.00 -> 50.00%, -25 [-30, -20], may be worse by 1 points: worse",
        "  small: kl.mean 0.250 -> 0.500 nats, +0.25 (not bounded), may be worse by 0.1 nats: "
        "undecided",
        "  small: size 2.0 -> 1.0 KiB, -1, may be worse by 0 KiB: kept",
        "  small: perplexity_delta +1.00 -> +1.50, +0.5 [+0.25, +0.75]",
    ]


def test_what_is_as_it_was_is_one_line() -> None:
    same = [
        change("size", 9.0, 9.0, lower=0, upper=0, margin=0.0, outcome="pass"),
        change("kl.mean", 0.1, 0.1, lower=0, upper=0),
    ]
    assert block(compared(*same)) == ["  small: as saved (held to it: size)"]
    assert block(compared(same[1])) == ["  small: as saved"]


def test_without_a_baseline_there_is_nothing() -> None:
    results = compared(baseline="")
    for view in ("\n".join(render_terminal(results, 80)), render_page(results)):
        assert "against the baseline" not in view.lower()
    assert ".saved" not in render_csv(results)
    assert "Against" not in render_markdown(results)


@pytest.mark.parametrize("width", [20, 60, 200])
def test_lines_fit(width: int) -> None:
    lines = render_terminal(compared(WORSE, SHOWN), width)
    assert max(map(width_of, lines)) <= width


def test_the_page_has_all_of_them_with_their_numbers() -> None:
    page = render_page(compared(QUIET, SHOWN, KEPT, OPEN, WORSE))
    table = page.split("Against the baseline v1</h3>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(?!<th scope=.col)(.*?)</tr>", table)
    assert [re.findall(r'data-c="metric" data-v="([^"]+)"', row)[0] for row in rows] == [
        "top1_agreement",
        "kl.mean",
        "size",
        "layer_error",
        "perplexity_delta",
    ]
    assert 'data-c="difference" data-v="-0.25">-25 [-30, -20]<' in rows[0]
    assert [re.findall(r'class="judged">([^<]*)<', row)[0] for row in rows] == [
        "✗ worse",
        "? undecided",
        "✓ kept",
        "",
        "",
    ]
    assert "1 measure worse than saved" in page


def test_markdown_shows_them_as_text() -> None:
    results = compared(WORSE, baseline="v<1>")
    text = render_markdown(results)
    assert "### Against the baseline v&lt;1\\>" in text
    assert "top1\\_agreement 75.00 \\-\\> 50.00%" in text


def test_the_csv_has_saved_values_and_differences() -> None:
    results = compared(WORSE, SHOWN)
    other = CandidateResult(id="new", method="rtn", measures={"size": Measure(value=1.0)})
    results.candidates.append(other)
    rows = list(csv.DictReader(io.StringIO(render_csv(results))))
    assert rows[0]["top1_agreement.saved"] == "0.75"
    assert rows[0]["top1_agreement.difference"] == "-0.25"
    assert rows[0]["top1_agreement.outcome"] == "fail"
    assert rows[0]["perplexity_delta.outcome"] == rows[1]["top1_agreement.saved"] == ""
    assert "size.saved" not in rows[0]


def test_shards_of_one_baseline_are_merged() -> None:
    first, second = compared(WORSE), compared(KEPT)
    again = compared(WORSE.model_copy(update={"value": 0.6}))
    merged = merge_results([compared(baseline=""), first, second, again])
    assert merged.baseline == "v1"
    (row,) = merged.candidates
    assert {each.metric: each.value for each in row.changes} == {
        "size": 1024.0,
        "top1_agreement": 0.6,
    }
    with pytest.raises(DataError, match=r"different baselines \('v1' and 'v2'\)"):
        merge_results([first, compared(KEPT, baseline="v2")])
