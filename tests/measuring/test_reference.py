"""What is stored of the base model belongs to the windows that it is read for."""

from __future__ import annotations

from pathlib import Path

from tests.lab.tiny import documents, tiny_lab


def test_given_windows_that_are_drawn_in_another_order_are_other_entries(tmp_path: Path) -> None:
    windows = tiny_lab(tmp_path, evaluation=documents(40, seed=1)).eval_data
    first, second = (tiny_lab(tmp_path / "both", evaluation=windows, seed=n) for n in (0, 1))
    alone = tiny_lab(tmp_path / "alone", evaluation=windows, seed=1)
    assert first.looks != second.looks == alone.looks
    assert first.candidate("rtn:bits=3").kl.mean > 0
    for spec in ("rtn:bits=3", "rtn:bits=2"):
        assert second.candidate(spec).kl.mean == float(alone.candidate(spec).kl.mean)
