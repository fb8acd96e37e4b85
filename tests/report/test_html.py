"""The page and the section: well formed, escaped, and saying what the document says."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from pytest_qlab.report.html import render_page, render_section
from pytest_qlab.report.style import STYLE
from pytest_qlab.results import Budget, CandidateResult, LayerRow, Measure, Results

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "\"><script>alert(1)</script><b onclick='x'>&amp;"


class Page(HTMLParser):
    """Checks that tags are balanced and keeps rows of cells with attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.ids: list[str] = []
        self.tables: list[list[list[dict[str, str]]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        assert len(given) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append({**given, "tag": tag, "text": ""})
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1:] == [tag], f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] in ("style", "script"):
            return
        self.text.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.tables[-1][-1][-1]["text"] += data

    def rows(self, place: int = 0) -> dict[str, dict[str, dict[str, str]]]:
        """Cells of a table by row name and column name."""
        found = {}
        for row in self.tables[place]:
            cells = {cell["data-c"]: cell for cell in row if "data-c" in cell}
            if cells and "data-v" in cells.get("id", {}):
                found[cells["id"]["data-v"]] = cells
        return found


@pytest.mark.parametrize("render", [render_page, render_section])
@pytest.mark.parametrize("empty", [False, True])
def test_is_well_formed(document: Results, render: object, empty: bool) -> None:
    assert callable(render)
    page = Page(render(Results() if empty else document))
    assert len(page.ids) == len(set(page.ids))
    assert all(
        attributes["scope"] in ("col", "row", "colgroup")
        for tag, attributes in page.tags
        if tag == "th"
    )
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table")


def test_page_needs_nothing_from_elsewhere(document: Results) -> None:
    for tag, attributes in Page(render_page(document)).tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href", "srcset"} & set(attributes)
    assert "@import" not in render_page(document)
    assert "url(" not in render_page(document)


def test_every_measure_is_in_the_tables_at_full_precision(document: Results) -> None:
    page = Page(render_page(document))
    cells: dict[tuple[str, str], str] = {}
    for place in range(len(page.tables)):
        for name, row in page.rows(place).items():
            for column, cell in row.items():
                cells.setdefault((name, column), cell.get("data-v", ""))
    checked = 0
    for candidate in document.candidates:
        for name, measure in candidate.measures.items():
            assert float(cells[candidate.id, name]) == measure.value
            checked += 1
    assert checked > 200


def test_shown_numbers_are_the_documents(document: Results) -> None:
    rows = Page(render_page(document)).rows()
    for candidate in document.candidates:
        for name, scale in (("perplexity", 1), ("top1_agreement", 100), ("size", 2**-20)):
            if name in candidate.measures:
                shown = re.match(r"[-+]?[\d.]+", rows[candidate.id][name]["text"])
                assert shown is not None
                decimals = len(shown.group().partition(".")[2])
                exact = candidate.measures[name].value * scale
                assert float(shown.group()) == pytest.approx(exact, abs=0.5001 * 10**-decimals)


def test_absent_values_are_en_dashes_without_a_sort_key(document: Results) -> None:
    cell = Page(render_page(document)).rows()["none"]["snr_db"]
    assert cell["text"] == "\N{EN DASH}"
    assert "data-v" not in cell


def test_sort_keys_are_numbers_for_a_script(document: Results) -> None:
    changed = document.model_copy(deep=True)
    changed.candidates[3].measures["kl.mean"] = Measure(value=math.inf)
    changed.candidates[4].measures["kl.mean"] = Measure(value=1e-17)
    rows = Page(render_page(changed)).rows()
    assert rows["static-w8a8"]["kl.mean"]["data-v"] == "Infinity"
    assert rows["static-w8a8"]["kl.mean"]["text"].startswith("∞")
    assert rows["static-w4a8"]["kl.mean"]["text"].startswith("1.0e-17")
    number = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?|-?Infinity")
    for row in rows.values():
        for name, cell in row.items():
            if name != "id" and "data-v" in cell:
                assert number.fullmatch(cell["data-v"]), cell


def test_budgets_are_coloured_signed_and_explained(document: Results) -> None:
    page = Page(render_page(document))
    rows = page.rows()
    broken = rows["gptq-w3g128"]["perplexity_delta"]
    assert "broken" in broken["class"].split()
    assert "✗ < 1.3" in broken["text"]
    over = next(
        b.value - b.budget
        for row in document.candidates
        for b in row.budgets
        if not b.ok and row.id == "gptq-w3g128"
    )
    assert f"{over:.3g} over" in broken["text"]
    assert "budget < 1.3" in broken["title"]
    kept = rows["gptq-w4g128"]["top1_agreement"]
    assert "kept" in kept["class"].split()
    assert "✓ > 85" in kept["text"]
    assert "points left" in kept["title"]
    judged = [row for row in page.tables[1] if any(c.get("data-c") == "margin" for c in row)][1:]
    assert len(judged) == sum(len(row.budgets) for row in document.candidates)
    assert "not kept" in judged[0][0]["text"]


def test_best_is_the_extreme_and_never_the_baseline(document: Results) -> None:
    rows = Page(render_page(document)).rows()
    for name, choose in (("kl.mean", min), ("top1_agreement", max), ("compression_ratio", max)):
        values = {r.id: r.measures[name].value for r in document.candidates[1:] if r.measures}
        best = choose(values, key=lambda identifier: values[identifier])
        marked = [key for key, row in rows.items() if "best" in row.get(name, {}).get("class", "")]
        assert marked == [best]


def test_simulated_latency_is_flagged_explained_and_never_the_best(document: Results) -> None:
    page = Page(render_page(document))
    cells = {name: row["latency.p50"] for name, row in page.rows().items() if len(row) > 1}
    assert "†" not in cells["none"]["text"]
    assert all("†" in cell["text"] for name, cell in cells.items() if name != "none")
    assert not any("best" in cell.get("class", "") for cell in cells.values())
    assert "dequantize-matmul" in "".join(page.text)


def test_a_broken_candidate_is_shown_with_its_error(document: Results) -> None:
    page = Page(render_page(document))
    row = next(row for row in page.tables[0] if row[0].get("data-v") == "awq-w3g96")
    assert "MethodError: awq cannot quantize" in row[1]["text"]
    assert "Check the calibration text" in "".join(page.text)


def test_an_unknown_measure_gets_a_column_at_the_right(document: Results) -> None:
    changed = document.model_copy(deep=True)
    changed.candidates[5].measures["toxicity"] = Measure(value=0.125, unit="points")
    changed.candidates[5].measures["aaa.first"] = Measure(value=2.5)
    rows = Page(render_page(changed)).rows()
    order = list(rows["rtn-w4g128"])
    assert order[-2:] == ["toxicity", "aaa.first"]
    assert rows["gptq-w4g128"]["toxicity"]["text"] == "\N{EN DASH}"


def test_everything_is_escaped() -> None:
    layer = LayerRow(name=f"model.0.{HOSTILE}", shape=(2, 2), bits_per_weight=4.0, snr_db=12.0)
    rows = [
        CandidateResult(
            id=f"{HOSTILE}{index}",
            method=HOSTILE,
            options={HOSTILE: HOSTILE},
            kernel=HOSTILE,
            simulated=True,
            error=HOSTILE if index < 2 else "",
            measures={}
            if index == 0
            else {
                HOSTILE: Measure(value=1.0 + index, unit=HOSTILE, detail=HOSTILE),
                "kl.mean": Measure(value=0.1 + index, convention=HOSTILE),
                "bits_per_weight": Measure(value=4.0 + index),
                "latency.p50": Measure(value=0.1, simulated=True),
            },
            budgets=[
                Budget(test=HOSTILE, metric=HOSTILE, value=1.0, op="<", budget=0.5, ok=False),
                Budget(test=HOSTILE, metric="kl.mean", value=0.1, op="<", budget=0.5, ok=True),
            ],
            layers=[layer],
            keys={HOSTILE: HOSTILE},
            seconds={HOSTILE: 1.0},
            tests={HOSTILE: "failed"},
        )
        for index in range(4)
    ]
    facts = {"id": HOSTILE, "name": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}
    results = Results(
        generator=HOSTILE,
        version=HOSTILE,
        created=HOSTILE,
        model=facts,
        evaluation={**facts, "convention": HOSTILE},
        calibration=facts,
        environment={"cpu": HOSTILE, "python": HOSTILE, HOSTILE: HOSTILE},
        summary={HOSTILE: 3},
        candidates=rows,
    )
    for text in (render_page(results), render_section(results)):
        page = Page(text)
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert "b" not in [tag for tag, _ in page.tags]
        assert not any(key.startswith("on") for _, given in page.tags for key in given)
        assert HOSTILE not in text
        assert "".join(page.text).count(HOSTILE) > 20


def test_plots_are_described_and_inside_their_frame(document: Results) -> None:
    page = Page(render_page(document))
    frames = [given for tag, given in page.tags if tag == "svg"]
    assert len(frames) == 2
    for frame in frames:
        assert frame["role"] == "img"
        assert all(reference in page.ids for reference in frame["aria-labelledby"].split())
    wide = float(frames[0]["viewbox"].split()[2])
    for tag, given in page.tags:
        if tag == "circle":
            assert 0 < float(given["cx"]) < wide


def test_labels_of_the_scatter_do_not_overlap(document: Results) -> None:
    from pytest_qlab.report.plots import CHARACTER, scatter

    texts = re.findall(
        r'<text class="[a-z ]*halo" x="([\d.]+)" y="([\d.]+)"( text-anchor="end")?>([^<]+)<',
        scatter(document),
    )
    boxes = []
    for x, y, end, text in texts:
        wide = CHARACTER * len(text)
        left = float(x) - (wide if end else 0)
        boxes.append((left, float(y) - 10, left + wide, float(y) + 2, text))
    assert len(boxes) == 9  # eight candidates and the budget
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1], (one, other)


def test_layers_of_a_very_deep_model_are_shown_by_block(document: Results) -> None:
    changed = document.model_copy(deep=True)
    row = changed.candidates[5]
    row.layers = [
        LayerRow(
            name=f"model.layers.{block}.experts.{expert}.w1",
            shape=(8, 8),
            bits_per_weight=4.0,
            snr_db=10.0 + expert,
        )
        for block in range(4)
        for expert in range(100)
    ]
    changed.candidates = [changed.candidates[0], row]
    text = render_page(changed)
    assert text.count('<rect class="h1"') == 4 + 1  # one for each block, one in the legend
    assert "the lowest of each block" in text


def test_the_benchmark_stands_before_pytest_htmls_environment() -> None:
    assert "#environment){order:1" in STYLE
