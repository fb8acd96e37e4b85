"""What a lab is given: models, windows and sequences made by hand, devices, directories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_qlab import CalibrationSet, Lab
from pytest_qlab.data.windows import Window, WindowSet
from pytest_qlab.errors import DataError, ModelError
from pytest_qlab.models.load import load_model
from tests.lab.tiny import documents, saved_tiny_model, tiny_lab


def saved(path: Path) -> dict[str, Any]:
    """Arguments of labs that share a store, on a model that is saved in `path`."""
    saved_tiny_model(path / "model")
    return {
        "evaluation": documents(6, seed=1),
        "calibration": documents(8, seed=2),
        "window_length": 48,
        "calibration_length": 32,
        "threads": 1,
        "store": path / "store",
    }


def test_a_loaded_model_is_known_by_its_own_dtype(tmp_path: Path) -> None:
    options = saved(tmp_path)
    path = str(tmp_path / "model")
    narrow = Lab(load_model(path, dtype="bfloat16"), **options)
    wide = Lab(load_model(path), **options)
    assert narrow.base_identity() == Lab(path, dtype="bfloat16", **options).base_identity()
    assert wide.base_identity() == Lab(path, **options).base_identity()
    assert narrow.baseline.perplexity != wide.baseline.perplexity


def test_some_windows_of_a_set_are_another_set(tmp_path: Path) -> None:
    options = saved(tmp_path)
    path = str(tmp_path / "model")
    everything = Lab(path, **options).eval_data
    some = replace(everything, windows=everything.windows[:3])
    options.pop("evaluation")
    of_all = Lab(path, evaluation=everything, **options).baseline.perplexity
    of_some = Lab(path, evaluation=some, **options).baseline.perplexity
    assert of_all.n == everything.scored
    assert of_some.n == some.scored


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ((), "has no windows"),
        ((Window(0, (5, 6, 7), 0),), "none without a token before it"),
        ((Window(0, (5, 6, 7), 3),), "At least one token is scored"),
        ((Window(1, (5, 6, 7), 1),), "belongs to document 1"),
    ],
)
def test_windows_that_cannot_be_scored_are_refused(
    windows: tuple[Window, ...], message: str, tmp_path: Path
) -> None:
    given = WindowSet("mine", "by hand", (("a", "b"),), windows, "")
    with pytest.raises(DataError, match=message):
        tiny_lab(tmp_path, evaluation=given)


@pytest.mark.parametrize("sequences", [(), ((),), ((5, 6, 7), (5, 6))])
def test_calibration_sequences_that_do_not_fit_are_refused(
    sequences: tuple[tuple[int, ...], ...],
) -> None:
    with pytest.raises(DataError, match="all must have one length"):
        CalibrationSet("mine", sequences)


def test_an_unknown_device_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    options = saved(tmp_path)
    with pytest.raises(ModelError, match=r"'abacus' cannot be used.* Give cpu"):
        _ = Lab(str(tmp_path / "model"), device="abacus", **options).baseline.size


def test_the_store_is_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert tiny_lab(Path("~/artefacts")).store.root == tmp_path / "artefacts"
    assert tiny_lab(Path("artefacts")).store.root == tmp_path / "artefacts"
