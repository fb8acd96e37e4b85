"""The noise floor beside KL, and what single layers cause, in every view."""

from __future__ import annotations

import json
import re

from pytest_qlab.report.html import render_page
from pytest_qlab.report.markdown import render_markdown
from pytest_qlab.report.terminal import render_terminal
from pytest_qlab.results import (
    Additivity,
    CandidateResult,
    LayerRow,
    Measure,
    Results,
    merge_results,
)

FLOOR = {
    "mean": 1.234e-9,
    "median": 0.0,
    "p99": 1e-8,
    "max": 1e-7,
    "path": "base model prefilled in two pieces",
    "windows": 8,
}
TOLD = "oise floor of KL: 1.2e-09 nats (base model prefilled in two pieces, 8 windows)"


def layer(name: str, kl: float | None = None, snr: float | None = None) -> LayerRow:
    return LayerRow(name=name, shape=(4, 8), bits_per_weight=4.1, snr_db=snr, kl=kl)


def row(*layers: LayerRow, additivity: Additivity | None = None) -> CandidateResult:
    measures = {"kl.mean": Measure(value=0.01, unit="nats", floor=1.234e-9)}
    return CandidateResult(
        id="rtn", method="rtn", measures=measures, layers=list(layers), additivity=additivity
    )


def document(*rows: CandidateResult, floor: object = None) -> Results:
    evaluation = {"id": "e", "name": "text"}
    more = {} if floor is None else {"noise_floor": floor}
    return Results(candidates=list(rows), model={"id": "m"}, evaluation={**evaluation, **more})


def plain(markdown: str) -> str:
    return markdown.replace("\\", "")


def views(results: Results) -> list[str]:
    terminal = " ".join(line.strip() for line in render_terminal(results, 78))
    return [terminal, plain(render_markdown(results)), render_page(results)]


def test_every_view_says_what_the_floor_is() -> None:
    for text in views(document(row(), floor=FLOOR)):
        assert TOLD in text


def test_every_view_says_that_it_could_not_be_measured() -> None:
    unknown = {**FLOOR, "path": "", "mean": 0.0}
    for text in views(document(row(), floor=unknown)):
        assert "oise floor of KL: not known" in text
        assert "0 nats" not in text


def test_no_view_speaks_of_a_floor_where_no_damage_was_measured() -> None:
    for text in views(document(row())):
        assert "oise floor of" not in text


def test_the_cell_says_its_own() -> None:
    assert "; noise floor 1.2e-09" in render_page(document(row()))
    bare = CandidateResult(id="none", method="none", measures={"kl.mean": Measure(value=0.0)})
    assert "noise floor" not in render_page(document(bare))


def test_shards_share_what_one_of_them_knows() -> None:
    merged = merge_results([document(row()), document(row(), floor=FLOOR), document(row())])
    assert merged.evaluation["noise_floor"] == FLOOR


def test_layers_that_cause_most_come_first_with_what_they_add_up_to() -> None:
    found = row(
        layer("blocks.0.a", kl=0.001, snr=5.0),
        layer("blocks.0.b", kl=0.004, snr=20.0),
        layer("blocks.0.c", kl=0.002, snr=10.0),
        layer("blocks.0.d", kl=0.0005, snr=1.0),
        additivity=Additivity(sum=0.0075, total=0.01, windows=8, tokens=768),
    )
    page = render_page(document(found))
    table = page[page.index("three noisiest layers") :]
    assert re.findall(r'class="text">(blocks\.0\.\w)<', table) == [
        "blocks.0.b",
        "blocks.0.c",
        "blocks.0.a",
    ]
    assert "<td>0.004</td>" in table
    assert (
        "rtn: all parts by themselves add up to 0.0075 nats, together they cause 0.01, 75% "
        "(768 tokens of 8 windows)." in table
    )


def test_layers_whose_weights_moved_most_come_first_where_nothing_else_is_known() -> None:
    page = render_page(document(row(layer("blocks.0.a", snr=20.0), layer("blocks.0.b", snr=5.0))))
    table = page[page.index("three noisiest layers") :]
    assert re.findall(r'class="text">(blocks\.0\.\w)<', table) == ["blocks.0.b", "blocks.0.a"]
    assert "add up" not in table


def test_layers_of_which_only_the_kl_is_known_are_shown() -> None:
    page = render_page(document(row(layer("blocks.0.a", kl=0.002))))
    assert "<td>0.002</td>" in page


def test_fragments_complete_each_other() -> None:
    whole = Additivity(sum=1.0, total=1.0)
    known = row(layer("a", kl=0.1), layer("b", kl=0.2), additivity=whole)
    later = row(layer("a", snr=9.0), layer("b", snr=8.0))
    known.merge(later)
    assert [(each.kl, each.snr_db) for each in known.layers] == [(0.1, 9.0), (0.2, 8.0)]
    assert known.additivity == whole
    known.merge(row())
    assert len(known.layers) == 2


def test_the_document_keeps_it() -> None:
    found = row(
        layer("a", kl=0.1), additivity=Additivity(sum=0.3, total=0.2, embeddings={"e": 0.2})
    )
    results = document(found, floor=FLOOR)
    again = Results.model_validate(json.loads(results.model_dump_json()))
    assert again == results
