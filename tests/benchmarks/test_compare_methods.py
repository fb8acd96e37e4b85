"""`python -m scripts.compare_methods`: its rows, their order, and the page it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qlab.specs import parse_specs
from pytest_qlab.testing import save_tiny_model
from scripts import compare_methods


def test_every_specification_can_be_read() -> None:
    for bits, texts in compare_methods.METHODS.items():
        specs = [parse_specs([text])[0] for text in texts]
        assert len({spec.id for spec in specs}) == len(texts), bits


def test_the_table_is_ordered_by_damage_and_goes_into_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("rtn:bits=2", "none", "rtn:bits=8")
    monkeypatch.setattr(compare_methods, "METHODS", {4: methods})
    page = tmp_path / "page.md"
    markers = [f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("shape-of-weights", "methods-4")]
    page.write_text("".join(["before\n", *markers, "after\n"]))
    model = save_tiny_model(tmp_path / "model")
    options = {"model": model, "store": tmp_path / "store", "max-windows": 2, "into": page}
    compare_methods.main(["--bits=4", *(f"--{key}={value}" for key, value in options.items())])
    written = page.read_text()
    rows = [line.split("|") for line in written.splitlines() if line.startswith("| `")]
    assert [each[1].strip() for each in rows] == ["`none`", "`rtn-w8g128`", "`rtn-w2g128`"]
    kls = [float(each[3]) for each in rows]
    assert kls[0] < 1e-6
    assert kls == sorted(kls)
    assert "3 methods at 4 bits" in written
    assert "normal numbers: 3" in written
    assert written.startswith("before")
    assert written.endswith("after\n")
    assert capsys.readouterr().out.count("| `") == 3
