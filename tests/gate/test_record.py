"""What is saved of a candidate: its sums as they are, nothing of this machine, little."""

from __future__ import annotations

import getpass
import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_qlab import Document, Lab
from pytest_qlab.directions import LATENCY_PHASES, split_domain
from pytest_qlab.gate.baselines import Baseline
from pytest_qlab.gate.compare import changes, paired_difference
from pytest_qlab.gate.record import record_of
from pytest_qlab.gate.thresholds import PAIRED, parse_thresholds
from pytest_qlab.machine import processor_name
from pytest_qlab.measuring.runnable import dtype_name
from pytest_qlab.metrics.latency import PairedLatency, Round
from tests.lab.tiny import documents, tiny_lab

SPECS = ("rtn:bits=8:group_size=16", "rtn:bits=4:group_size=16", "gptq:bits=3:group_size=16")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    texts = documents(6, seed=1) + [
        Document(f"code-{each.id}", "code", each.text) for each in documents(5, seed=7)
    ]
    return tiny_lab(tmp_path_factory.mktemp("store"), evaluation=texts)


def test_a_saved_candidate_is_compared_as_if_it_was_evaluated_again(
    lab: Lab, tmp_path: Path
) -> None:
    """Values of both sides are those that `Fidelity` gives, of the text and of its domains."""
    old, new = (lab.candidate(spec) for spec in SPECS[1:])
    record_of(old, evaluated=True).write(tmp_path / "v1.json")
    saved = Baseline.read(tmp_path / "v1.json")
    fresh = record_of(new, evaluated=True)
    assert saved.windows is not None
    assert saved.windows.domains == ["noise", "code"]
    saved_sums, sums = saved.candidates[old.id].sums, fresh.candidates[new.id].sums
    assert saved_sums is not None
    assert sums is not None
    for metric in [*PAIRED, *(f"{metric}[code]" for metric in PAIRED)]:
        found = paired_difference(metric, saved.windows, saved_sums, sums)
        before, after = (each.fidelity.estimates()[metric] for each in (old, new))
        assert found.saved == pytest.approx(float(before), rel=1e-5, abs=1e-5), metric
        assert found.value == pytest.approx(float(after), rel=1e-5, abs=1e-5), metric
        assert found.clusters == before.clusters
        if split_domain(metric)[0] != "perplexity_delta":
            continue
        # The base model's own difference from itself is what `perplexity_delta` is of.
        none = record_of(lab.baseline, evaluated=True).candidates["none"].sums
        assert none is not None
        alone = paired_difference(metric, saved.windows, none, sums)
        assert alone.standard_error == pytest.approx(after.standard_error, rel=1e-4)


def test_rounding_moves_no_estimate_by_a_ten_thousandth_of_its_error(lab: Lab) -> None:
    for spec in SPECS:
        candidate = lab.candidate(spec)
        found = record_of(candidate, evaluated=True)
        sums = found.candidates[candidate.id].sums
        assert found.windows is not None
        assert sums is not None
        for metric in PAIRED:
            exact = candidate.fidelity.estimates()[metric]
            value = paired_difference(metric, found.windows, sums, sums).value
            assert exact.standard_error is not None
            assert abs(value - exact) <= 1e-4 * exact.standard_error, (spec, metric)


def test_a_candidate_has_not_changed_since_it_was_saved(lab: Lab) -> None:
    candidate = lab.candidate(SPECS[0])
    _ = candidate.memory, candidate.layers
    first, second = record_of(candidate, evaluated=True), record_of(candidate, evaluated=True)
    thresholds = parse_thresholds(f"{metric}:0" for metric in (*PAIRED, "size", "memory.peak"))
    found = changes("v1", candidate.id, first, second, thresholds)
    assert {change.outcome for change in found if change.metric in thresholds} == {"pass"}
    assert {change.difference for change in found} == {0}
    assert {"weights.snr_db", "layer_error", "memory.resident"} <= {c.metric for c in found}


def test_what_is_not_known_is_not_computed(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("rtn")
    assert candidate.size > 0
    before = lab.forwards
    found = record_of(candidate, evaluated=False)
    assert lab.forwards == before
    assert found.windows is None
    assert found.candidates["rtn-w4g128"].sums is None
    assert found.candidates["rtn-w4g128"].measures["size"] == candidate.size
    assert found.candidates["rtn-w4g128"].memory_dtype == ""


def test_it_is_saved_in_what_memory_was_measured(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("rtn")
    _ = candidate.memory
    found = record_of(candidate, evaluated=False).candidates["rtn-w4g128"]
    assert found.memory_dtype == dtype_name(lab.speed_base)
    assert found.measures["memory.peak"] == candidate.memory.peak


def test_another_lab_over_the_same_inputs_saves_the_same_bytes(tmp_path: Path) -> None:
    texts = [
        record_of(tiny_lab(tmp_path / name, threads=threads).candidate("gptq"), evaluated=True)
        for name, threads in (("a", 1), ("b", 3))
    ]
    assert texts[0].to_text() == texts[1].to_text()


def test_a_latency_is_saved_where_one_was_measured(tmp_path: Path) -> None:
    """Of 300 rounds of which the candidate takes 2 us and the base model 1 us, one takes longer."""
    candidate = tiny_lab(tmp_path).candidate("rtn")
    assert record_of(candidate, evaluated=False).candidates["rtn-w4g128"].latency is None
    plain = Round(baseline=1000, candidate=2000, cpu=3000, wall=3000, switches=0)
    slow = Round(baseline=9000, candidate=9000, cpu=18000, wall=18000, switches=0)
    paired = PairedLatency((*[plain] * 299, slow), threads=1, convention="prefill32")
    timed = {"": paired, "decode.": replace(paired, convention="decode after 31")}
    measured = {prefix: SimpleNamespace(measured=timed.get(prefix)) for prefix in LATENCY_PHASES}
    candidate.__dict__["latency"] = SimpleNamespace(phases=lambda: measured)
    saved = record_of(candidate, evaluated=False).candidates["rtn-w4g128"]
    assert saved.latencies.keys() == {"decode."}
    assert saved.timed("latency.decode.p50") == saved.latencies["decode."]
    assert saved.latencies["decode."].convention == "decode after 31"
    assert saved.timed("latency.decode512.ratio") is None
    found = saved.latency
    assert found is not None
    assert saved.timed("latency.ratio") is found
    assert (found.p50, found.baseline_p50, found.ratio) == pytest.approx((2e-6, 1e-6, 2))
    assert found.ratio_lower <= 2 <= found.ratio_upper
    assert (found.rounds, found.threads, found.convention) == (300, 1, "prefill32")
    assert found.processor == processor_name()


def test_nothing_of_this_machine_is_in_it(tmp_path: Path) -> None:
    """No directory, user, host or time: a model and texts are given by absolute paths."""
    from tests.lab.tiny import saved_tiny_model

    model = saved_tiny_model(tmp_path / "model")
    for name, seed in (("evaluation", 1), ("calibration", 2)):
        (tmp_path / name).mkdir()
        for number, document in enumerate(documents(6, seed)):
            (tmp_path / name / f"{number}.txt").write_text(document.text, encoding="utf-8")
    lab = Lab(
        str(model),
        evaluation=[str(tmp_path / "evaluation"), str(tmp_path / "evaluation" / "1.txt")],
        calibration=str(tmp_path / "calibration"),
        window_length=48,
        calibration_length=32,
        store=tmp_path / "store",
        threads=1,
    )
    candidate = lab.candidate("gptq:bits=3")
    _ = candidate.layer_error, candidate.memory
    found = record_of(candidate, evaluated=True)
    text = found.to_text()
    assert found.model.name == "model"
    assert found.windows is not None
    assert found.windows.name == "evaluation,1.txt"
    assert str(tmp_path) not in text
    assert "/" not in text
    # Names of users and hosts may be words, such as root; as values of their own they are not.
    words = set(re.findall(r'"([^"]*)"', text))
    assert not words & {getpass.getuser(), socket.gethostname()}
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d", text)
    assert "seconds" not in text


def test_a_file_is_small(tmp_path: Path) -> None:
    """64 windows and three candidates."""
    lab = tiny_lab(tmp_path, evaluation=documents(22, seed=1))
    baseline = record_of(lab.candidate(SPECS[0]), evaluated=True)
    one = len(baseline.to_text())
    for spec in SPECS[1:]:
        baseline.merge(record_of(lab.candidate(spec), evaluated=True))
    assert baseline.windows is not None
    assert len(baseline.windows.tokens) == 64
    assert one < 7_000
    assert len(baseline.to_text()) - one < 2 * 4_500
    assert json.loads(baseline.to_text())["windows"]["domains"] == ["noise"]
