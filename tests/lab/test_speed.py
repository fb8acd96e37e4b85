"""Latency: paired, kept, honest about what was not measured. Nothing here depends on a duration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.kernels.packed import PackedModule
from pytest_qlab.lab import Lab
from pytest_qlab.measuring import runnable, speed
from pytest_qlab.measuring.runnable import dtype_name
from pytest_qlab.metrics import latency
from pytest_qlab.metrics.latency import PairedLatency, Round
from tests.architectures import CONTEXT
from tests.lab.tiny import tiny_lab


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 6)
    monkeypatch.setattr(speed, "FLOOR_ROUNDS", 6)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 0.0)


@pytest.fixture
def as_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is measured in the lab's own dtype, in which models can be compared closely."""
    monkeypatch.setattr(runnable, "speed_dtype", lambda dtype, device: dtype)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs each call once, and pretends that 40 rounds were timed, slower from time to time."""
    runs: list[dict[str, Any]] = []

    def pretended(baseline: Any, candidate: Any, **options: Any) -> PairedLatency:
        options["between"]()
        outputs = baseline(), candidate()
        number = len(runs) + 1
        runs.append({**options, "outputs": outputs})
        one = 1_000_000 * number
        each = Round(baseline=one, candidate=2 * one, cpu=3 * one, wall=3 * one, switches=0)
        kept = ("candidate_id", "convention", "simulated", "phase", "threads")
        return PairedLatency((each,) * 40, **{k: options[k] for k in kept if k in options})

    monkeypatch.setattr(speed, "measure_pair", pretended)
    return runs


@pytest.mark.usefixtures("few_rounds", "quiet")
def test_latency_is_paired_kept_and_named(tmp_path: Path) -> None:
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
    assert found.ratio.floor is not None
    assert "the base model beside itself" in found.ratio.detail
    with pytest.raises(MetricError, match="299 samples"):
        found.p99  # noqa: B018
    with pytest.raises(MetricError, match="29 samples"):
        found.p90  # noqa: B018

    again = tiny_lab(tmp_path)
    assert again.candidate("rtn")["latency.p50"] == found.p50
    assert again.candidate("rtn")["latency.ratio"].floor == found.ratio.floor
    assert again.store.built == {}
    assert again.forwards == 0
    assert not again.baseline.checkpoint.simulated


@pytest.mark.usefixtures("few_rounds")
def test_a_disturbed_measurement_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 1e9)
    lab = tiny_lab(tmp_path, run_dir=tmp_path / "run")
    for _ in range(2):
        with pytest.raises(NotMeasuredError, match="quiet machine"):
            lab.candidate("rtn").latency.p50  # noqa: B018
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 0.0)
    assert lab.candidate("rtn").latency.p50 > 0, "a disturbance was remembered"


@pytest.mark.usefixtures("few_rounds", "quiet")
def test_a_disturbed_floor_is_none_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = tiny_lab(tmp_path).candidate("rtn").latency.p50
    shutil.rmtree(tmp_path / "v1" / "latency_floor")
    measure = latency.measure_pair

    def disturbed(*calls: Any, **options: Any) -> PairedLatency:
        found = measure(*calls, **options)
        busy = [Round(r.baseline, r.candidate, -1, r.wall, r.switches) for r in found.rounds]
        return PairedLatency(tuple(busy), threads=1)

    monkeypatch.setattr(speed, "measure_pair", disturbed)
    ratio = tiny_lab(tmp_path).candidate("rtn").latency.ratio
    assert ratio.floor is None
    assert "beside itself was disturbed" in ratio.detail


@pytest.mark.usefixtures("as_the_lab")
def test_each_phase_runs_what_it_says(tmp_path: Path, timer: list[dict[str, Any]]) -> None:
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("rtn")
    assert timer == [], "nothing is timed before it is read"
    assert candidate.latency.decode.p50 == pytest.approx(0.002)
    assert candidate.measured.keys() >= {"latency.decode.p50", "latency.decode.p90"}
    assert candidate["latency.decode512.p50"].convention == f"decode after {CONTEXT - 1}-float32"
    assert candidate["latency.prefill512.ratio"].convention == f"prefill{CONTEXT}-float32"
    assert candidate.latency.prefill.p90.metric == "latency.p90"
    with pytest.raises(MetricError, match=r"decode\.p51.*Did you mean 'latency\.decode\.p50'"):
        candidate["latency.decode.p51"]
    with pytest.raises(MetricError, match=r"no measure 'latency\.encode\.p50'"):
        candidate["latency.encode.p50"]

    ids = speed.prompt(lab, CONTEXT)
    decode, floor, *_ = timer
    assert (decode["phase"], decode["rounds"], floor["rounds"]) == ("decode.", 400, 100)
    for model, output in zip(
        (lab.speed_base, candidate.speed_model), decode["outputs"], strict=True
    ):
        with torch.no_grad():
            whole = model(input_ids=ids).logits[:, -1:]
        torch.testing.assert_close(output.logits, whole)
        assert output.past_key_values.get_seq_length() == CONTEXT
    torch.testing.assert_close(floor["outputs"][0].logits, floor["outputs"][1].logits)


def test_the_base_model_is_compared_with_as_it_was_beside_the_candidate(
    tmp_path: Path, timer: list[dict[str, Any]]
) -> None:
    """Each pretended run is slower than the one before, as on a machine that others slow down."""
    lab = tiny_lab(tmp_path)
    first, second, baseline = lab.candidate("rtn"), lab.candidate("rtn:bits=3"), lab.baseline
    assert second.latency.p50 == 2 * baseline.latency.p50
    assert first.latency.p50 == 2 * baseline.latency.p50
    assert first.latency.p50 < 2.1 * baseline.latency.p50
    assert not first.latency.p50 < 1.9 * baseline.latency.p50
    assert second.latency.p50 == 2 * baseline.latency.p50
    assert first.latency.decode.p50 == 2 * baseline.latency.decode.p50
    assert baseline.measured["latency.p50"].candidate == "none"
    runs = len(timer)
    assert baseline.latency.ratio == 2, "its own, which has to be timed"
    assert len(timer) == runs + 1
    assert baseline.latency.p50 == 2e-3 * (runs + 1)


def test_the_base_model_alone_is_timed_beside_itself(
    tmp_path: Path, timer: list[dict[str, Any]]
) -> None:
    assert tiny_lab(tmp_path).baseline.latency.p50 == pytest.approx(0.002)


@pytest.mark.usefixtures("as_the_lab")
def test_weights_stored_as_numbers_run_as_the_base_models(
    tmp_path: Path, timer: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that bfloat16 holds are stored so, and must not be converted while time is taken."""
    lab = tiny_lab(tmp_path)
    for parameter in lab.base_model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    candidate = lab.baseline
    stored = [m for m in candidate.model.modules() if isinstance(m, PackedModule)]
    assert {next(m.buffers()).dtype for m in stored} == {torch.bfloat16}
    packed = [m for m in candidate.speed_model.modules() if isinstance(m, PackedModule)]
    seen: list[set[bool]] = []
    forward = type(candidate.speed_model).forward

    def looking(model: Any, *given: Any, **more: Any) -> Any:
        if model is candidate.speed_model:
            seen.append({m.materialized or next(m.buffers()).dtype == m.dtype for m in packed})
        return forward(model, *given, **more)

    monkeypatch.setattr(speed, "last_logits_only", lambda model: {})
    monkeypatch.setattr(type(candidate.speed_model), "forward", looking)
    _ = candidate.latency.p50
    assert seen == [{True}]
    assert not any(m.materialized for m in packed), "the copies were kept"
    resident = sum(m.packed.nbytes for m in stored)
    assert lab.candidate("none").memory.resident > resident


def test_the_prompt_is_text_of_the_evaluation_set(tmp_path: Path) -> None:
    lab: Lab = tiny_lab(tmp_path)
    ids = speed.prompt(lab, 40)
    assert ids.shape == (1, 40)
    assert ids[0].tolist() == list(lab.eval_data.windows[0].ids[:40])
