"""Latency: paired, kept, honest about what was not measured. Nothing here depends on a duration."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.measuring import speed
from pytest_qlab.measuring.runnable import dtype_name
from pytest_qlab.metrics import latency
from tests.architectures import CONTEXT
from tests.lab.tiny import tiny_lab


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 6)


def test_latency_is_paired_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_rounds: None
) -> None:
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 0.0)
    lab = tiny_lab(tmp_path)
    found = lab.candidate("rtn").latency
    assert found.p50 > 0
    assert found.baseline.p50 > 0
    assert found.p50.unit == "s"
    assert found.p50.simulated
    assert found.p50.convention == f"prefill{CONTEXT}-{dtype_name(lab.speed_base)}"
    assert not found.baseline.p50.simulated
    assert len(found.paired.rounds) == 6
    assert found.ratio > 0
    with pytest.raises(MetricError, match="299 samples"):
        found.p99  # noqa: B018

    again = tiny_lab(tmp_path)
    assert again.candidate("rtn")["latency.p50"] == found.p50
    assert again.store.built == {}
    assert again.forwards == 0
    assert not again.baseline.checkpoint.simulated


def test_a_disturbed_measurement_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_rounds: None
) -> None:
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 1e9)
    lab = tiny_lab(tmp_path, run_dir=tmp_path / "run")
    for _ in range(2):
        with pytest.raises(NotMeasuredError, match="quiet machine"):
            lab.candidate("rtn").latency  # noqa: B018
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 0.0)
    assert lab.candidate("rtn").latency.p50 > 0, "a disturbance was remembered"


def test_the_prompt_is_text_of_the_evaluation_set(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    ids = speed._prompt(lab, 40)
    assert ids.shape == (1, 40)
    assert ids[0].tolist() == list(lab.eval_data.windows[0].ids[:40])
