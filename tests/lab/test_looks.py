"""Careful assertions on a tiny model: few windows where few will do, all where all are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_qlab import Document, Lab
from pytest_qlab import inputs as inputs_module
from pytest_qlab.errors import MetricError
from pytest_qlab.results import CandidateResult
from tests.lab.tiny import documents, tiny_lab

WINDOWS = 64
FIRST, SECOND = 16, 32
"""A quarter and a half of them."""
SPEC = "rtn:bits=3"


def lab_of(store: Path, architecture: str = "llama", **options: Any) -> Lab:
    prose, code = documents(13, seed=1), documents(12, seed=5)
    mixed = [*prose, *(Document(each.id, "code", each.text) for each in code)]
    options = {"evaluation": mixed, "max_windows": WINDOWS, "window_length": 40, **options}
    return tiny_lab(store, architecture, **options)


def at_once(store: Path, architecture: str = "llama") -> Lab:
    """A lab that evaluates all windows in one look, as if there were none."""
    lab = lab_of(store, architecture)
    lab.__dict__["looks"] = (tuple(range(WINDOWS)),)
    return lab


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_look_by_look_gives_what_all_windows_at_once_give_to_the_bit(
    architecture: str, tmp_path: Path
) -> None:
    lab = lab_of(tmp_path / "a", architecture)
    assert [len(look) for look in lab.looks] == [FIRST, SECOND - FIRST, WINDOWS - SECOND]
    single = at_once(tmp_path / "b", architecture)
    ours, theirs = lab.candidate(SPEC), single.candidate(SPEC)
    assert ours.perplexity_ratio.within(2.0), "some windows are evaluated before the others"
    assert ours.fidelity.estimates().keys() == theirs.fidelity.estimates().keys()
    for metric, expected in theirs.fidelity.estimates().items():
        found = ours.fidelity.estimates()[metric].to_dict()
        # The noise floor is that of some windows of the first look, which `single` has none of.
        assert {**found, "floor": None} == {**expected.to_dict(), "floor": None}, metric
    for name, tensor in theirs.fidelity.to_tensors().items():
        assert ours.fidelity.to_tensors()[name].equal(tensor), name
    pairs = zip(lab.reference.predictions(), single.reference.predictions(), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


def test_a_look_measures_its_windows_and_those_before_it(tmp_path: Path) -> None:
    lab = lab_of(tmp_path / "a")
    decision = lab.candidate(SPEC).perplexity_ratio.within(2.0)
    kept = {number for look in lab.looks[:1] for number in look}
    assert (decision.windows, decision.most, len(kept)) == (FIRST, WINDOWS, FIRST)
    windows = [lab.eval_data.windows[number] for number in sorted(kept)]
    assert lab.windows_of(0) == windows
    # What an evaluation of just these windows says.
    alone = at_once(tmp_path / "b").candidate(SPEC).fidelity.tokens
    sums = [row for row in alone.windows if int(row["window"]) in kept]
    total = sum(int(row["tokens"]) for row in sums)
    mean = sum(float(row["delta"]) for row in sums) / total
    assert decision.n == total == sum(window.scored for window in windows)
    assert float(decision.value) == pytest.approx(torch.tensor(mean).double().exp().item())
    assert decision.clusters == len({window.document for window in windows})


def test_clear_cases_run_few_windows_and_plain_comparisons_all(tmp_path: Path) -> None:
    lab = lab_of(tmp_path)
    candidate = lab.candidate(SPEC)
    _ = candidate.checkpoint, lab.noise_floor  # for which the base model runs the first look
    before = lab.forwards
    measure = candidate.perplexity_ratio
    assert lab.forwards == before, "nothing is run for a measure that nobody looks at"
    decision = measure.within(2.0)
    assert decision
    assert (decision.outcome, decision.windows) == ("pass", FIRST)
    assert lab.forwards == before + FIRST
    assert candidate.perplexity_ratio.within(2.0).windows == FIRST
    assert lab.forwards == before + FIRST
    assert candidate.fragment().measures["perplexity_ratio"].n == decision.n

    whole = sum(window.scored for window in lab.eval_data.windows)
    assert measure.n == whole
    assert measure == candidate.fidelity.perplexity_ratio
    rest = WINDOWS - FIRST
    assert lab.forwards == before + FIRST + 2 * rest, "once each, for base model and candidate"
    assert candidate.fragment().measures["perplexity_ratio"].n == whole
    assert candidate.perplexity_ratio.within(2.0).windows == FIRST
    assert candidate.fragment().measures["perplexity_ratio"].n == whole, "nothing is taken back"


def test_doubt_draws_up_to_all_windows(tmp_path: Path) -> None:
    lab = lab_of(tmp_path)
    candidate = lab.candidate(SPEC)
    truth = float(lab.candidate(SPEC).log_perplexity_delta)
    decision = candidate.log_perplexity_delta.within(truth)
    assert (decision.outcome, decision.windows, decision.looks) == ("inconclusive", WINDOWS, 3)


@pytest.mark.parametrize("share", [0.2, 0.8, 1.0, 1.2, 5.0])
def test_the_outcome_does_not_depend_on_what_was_evaluated_before(
    share: float, tmp_path: Path
) -> None:
    known = lab_of(tmp_path / "a").candidate(SPEC)
    budget = share * float(known.fidelity.kl.mean)
    fresh = lab_of(tmp_path / "b").candidate(SPEC)
    assert fresh.kl.mean.within(budget) == known.kl.mean.within(budget)


def test_later_runs_read_the_looks_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lab_of(tmp_path)
    decision = first.candidate(SPEC).perplexity_ratio.within(2.0)

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("text was tokenized again")

    with monkeypatch.context() as patched:
        patched.setattr(inputs_module, "make_windows", never)
        later = lab_of(tmp_path)
        assert later.candidate(SPEC).perplexity_ratio.within(2.0) == decision
        assert later.store.built == {}
        assert later.forwards == 0
    # The rest is added to them.
    assert later.candidate(SPEC).perplexity_ratio.n == first.candidate(SPEC).perplexity_ratio.n
    assert later.forwards == 2 * (WINDOWS - FIRST)


def test_a_domain_is_measured_on_all_windows_whatever_was_drawn(tmp_path: Path) -> None:
    lab = lab_of(tmp_path)
    candidate = lab.candidate(SPEC)
    assert candidate.perplexity_ratio.within(2.0).windows == FIRST
    found = candidate["perplexity_ratio[code]"]
    assert found.n == sum(
        window.scored
        for window in lab.eval_data.windows
        if lab.eval_data.documents[window.document][1] == "code"
    )
    assert found == candidate.domain("code").perplexity_ratio
    assert found.within(2.0)


def test_results_keep_the_estimate_of_the_most_windows(tmp_path: Path) -> None:
    lab = lab_of(tmp_path)
    candidate = lab.candidate(SPEC)
    assert candidate.perplexity_ratio.within(2.0)
    few = candidate.fragment()
    assert candidate.perplexity_ratio < 2.0
    many = candidate.fragment()
    expected = many.measures["perplexity_ratio"]
    assert expected.value != few.measures["perplexity_ratio"].value
    for order in ((few, many), (many, few)):
        row = CandidateResult(id=few.id, method=few.method, options=few.options)
        for fragment in order:
            row.merge(fragment.model_copy(deep=True))
        assert row.measures["perplexity_ratio"] == expected


def test_an_exact_copy_passes_at_the_first_look(tmp_path: Path) -> None:
    baseline = lab_of(tmp_path).baseline
    for measure in (baseline.kl.mean, baseline.kl.p99, baseline.log_perplexity_delta):
        decision = measure.within(0.0)
        assert decision
        assert (decision.value, decision.windows) == (0, FIRST)
    assert baseline.top1_agreement.at_least(1.0).windows == FIRST


def test_every_measure_can_be_held_by_name(tmp_path: Path) -> None:
    candidate = lab_of(tmp_path).candidate("rtn:bits=8")
    for metric in ("perplexity_ratio", "kl.median", "kl.p99"):
        assert candidate[metric].within(1e3).windows == FIRST, metric
    for metric in ("top1_agreement", "cosine", "snr_db"):
        assert candidate[metric].at_least(-1.0).windows == FIRST, metric
    for metric in ("size", "layer_error", "bits_per_weight"):
        decision = candidate[metric].within(1e9)
        assert decision
        assert (decision.windows, decision.lower) == (None, decision.value)
    with pytest.raises(MetricError, match="no interval"):
        candidate["kl.max"].within(1.0)


def test_of_neighbouring_windows_only_plain_comparisons_are_made(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, sampling="contiguous", max_windows=20)
    candidate = lab.candidate(SPEC)
    with pytest.raises(MetricError, match=r"spread-contiguous.*--qlab-sampling=contiguous"):
        candidate.perplexity_ratio.within(2.0)
    assert lab.store.built == {}
    assert candidate.size.within(1e9)
    assert candidate.perplexity_ratio < 2.0
    assert candidate.perplexity_ratio.convention == "spread40-contiguous"
    assert len(lab.eval_data.windows) == 20
    assert lab.eval_data.windows == lab_of(tmp_path, max_windows=0).eval_data.windows[:20]
    with pytest.raises(MetricError, match="windows are neighbours"):
        candidate.domain("noise").perplexity_ratio.within(2.0)


def test_neighbours_are_other_windows_for_the_store_too(tmp_path: Path) -> None:
    spread = lab_of(tmp_path, max_windows=20).candidate(SPEC)
    assert spread.perplexity_ratio < 2.0
    contiguous = lab_of(tmp_path, max_windows=20, sampling="contiguous").candidate(SPEC)
    assert contiguous.perplexity_ratio != spread.perplexity_ratio


def test_what_is_stored_is_decided_without_a_look_at_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab_of(tmp_path).candidate(SPEC).perplexity_ratio.within(2.0)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("its configuration is read, which imports all of transformers")

    monkeypatch.setattr(inputs_module, "context_length", refuse)
    assert lab_of(tmp_path).candidate(SPEC).perplexity_ratio.within(2.0)
    with pytest.raises(AssertionError, match="configuration is read"):
        _ = lab_of(tmp_path).evaluation.convention
