"""Differences from a saved baseline, against textbook formulas on the tokens themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_qlab.errors import BaselineError
from pytest_qlab.gate.baselines import (
    Baseline,
    LatencySummary,
    SavedCandidate,
    Subject,
    Sums,
    Windows,
)
from pytest_qlab.gate.compare import (
    changes,
    check_saved,
    latency_difference,
    paired_difference,
)
from pytest_qlab.gate.thresholds import PAIRED, parse_thresholds
from pytest_qlab.results import Change
from pytest_qlab.stats.decisions import bounds
from tests.gate.tokens import (
    DOMAINS,
    Array,
    Model,
    Numbers,
    Text,
    draw,
    rounded_sums,
    sums_of,
    windows_of,
)

# Of the means over tokens of what `columns` gives, in order: the change of each measure.
Measure = Callable[[Array], float]


def columns(text: Text, old: Model, new: Model) -> Array:
    """(12, tokens)."""
    return np.array(
        [
            text.base,
            *(old.nll, new.nll),
            *(old.kl, new.kl),
            *((old.kl > 1).astype(float), (new.kl > 1).astype(float)),
            *(old.agree, new.agree),
            text.signal,
            *(old.error, new.error),
            *(old.cosine, new.cosine),
        ]
    )


def decibels(signal: float, error: float) -> float:
    return 10 * math.log10(signal / error)


VALUES: dict[str, tuple[Measure, Measure]] = {
    "perplexity": (lambda m: math.exp(m[1]), lambda m: math.exp(m[2])),
    "perplexity_delta": (
        lambda m: math.exp(m[1]) - math.exp(m[0]),
        lambda m: math.exp(m[2]) - math.exp(m[0]),
    ),
    "log_perplexity_delta": (lambda m: m[1] - m[0], lambda m: m[2] - m[0]),
    "perplexity_ratio": (lambda m: math.exp(m[1] - m[0]), lambda m: math.exp(m[2] - m[0])),
    "kl.mean": (lambda m: m[3], lambda m: m[4]),
    "kl.tail": (lambda m: m[5], lambda m: m[6]),
    "top1_agreement": (lambda m: m[7], lambda m: m[8]),
    "snr_db": (lambda m: decibels(m[9], m[10]), lambda m: decibels(m[9], m[11])),
    "cosine": (lambda m: m[12], lambda m: m[13]),
}


def change_of(metric: str) -> Measure:
    saved, value = VALUES[metric]
    return lambda means: value(means) - saved(means)


def textbook_error(values: Array, cluster: Numbers, function: Measure) -> float:
    """Delta method with a numeric gradient over the cluster-robust covariance of the means.

    C/(C-1) sum over clusters of the outer product of the summed residuals, over N^2: Cameron and
    Miller 2015, "A practitioner's guide to cluster-robust inference", for a vector of means.
    """
    means = values.mean(axis=1)
    gradient = np.empty(len(means))
    for place in range(len(means)):
        step = np.zeros(len(means))
        step[place] = 1e-6 * max(1e-3, abs(means[place]))
        gradient[place] = (function(means + step) - function(means - step)) / (2 * step[place])
    names = np.unique(cluster)
    summed = np.array([(values - means[:, None])[:, cluster == name].sum(axis=1) for name in names])
    covariance = summed.T @ summed / values.shape[1] ** 2 * len(names) / (len(names) - 1)
    return math.sqrt(gradient @ covariance @ gradient)


def jackknife_error(values: Array, cluster: Numbers, function: Measure) -> float:
    """Leaving out one document at a time."""
    names = np.unique(cluster)
    left = np.array([function(values[:, cluster != name].mean(axis=1)) for name in names])
    return math.sqrt((len(names) - 1) / len(names) * np.square(left - left.mean()).sum())


def test_every_paired_measure_has_an_oracle() -> None:
    assert set(VALUES) == set(PAIRED)


@pytest.mark.parametrize("domain", ["", *DOMAINS])
@pytest.mark.parametrize("metric", PAIRED)
@pytest.mark.parametrize("damages", [(0.03, 0.04), (0.001, 0.3)])
def test_differences_are_those_of_the_tokens(
    metric: str, domain: str, damages: tuple[float, float]
) -> None:
    text, (old, new) = draw(5, damages)
    name = f"{metric}[{domain}]" if domain else metric
    found = paired_difference(name, windows_of(text), sums_of(text, old), sums_of(text, new))
    kept = text.domain == DOMAINS.index(domain) if domain else np.ones(len(text.base), dtype=bool)
    values, cluster = columns(text, old, new)[:, kept], text.document[kept]
    means = values.mean(axis=1)
    saved, value = (each(means) for each in VALUES[metric])
    assert (found.saved, found.value) == pytest.approx((saved, value), rel=1e-9)
    assert found.difference == pytest.approx(value - saved, rel=1e-6, abs=1e-12)
    assert found.clusters == len(np.unique(cluster))
    assert found.standard_error == pytest.approx(
        textbook_error(values, cluster, change_of(metric)), rel=1e-4
    )
    assert found.standard_error == pytest.approx(
        jackknife_error(values, cluster, change_of(metric)), rel=0.12
    )


def test_what_both_have_in_common_cancels() -> None:
    """Paired, the error is a fraction of what two separate intervals would give."""
    text, (old, _) = draw(3, (0.03, 0.03))
    new = replace(old, nll=old.nll + 0.001 * np.arange(len(old.nll)) / len(old.nll))
    found = paired_difference(
        "perplexity", windows_of(text), sums_of(text, old), sums_of(text, new)
    )
    values = columns(text, old, new)
    alone = textbook_error(values, text.document, VALUES["perplexity"][1])
    assert found.standard_error is not None
    assert 0 < found.standard_error < alone / 100


@pytest.mark.parametrize("metric", PAIRED)
@pytest.mark.parametrize("damages", [(1e-4, 1.2e-4), (0.03, 0.031), (0.02, 0.5)])
def test_rounding_moves_nothing_that_matters(metric: str, damages: tuple[float, float]) -> None:
    """By less than 1e-4 of the error of the difference, and of that of each value."""
    text, (old, new) = draw(11, damages)
    windows = windows_of(text)
    short = Windows(
        **{**windows.model_dump(), "base_nll": [float(f"{x:.6g}") for x in windows.base_nll]}
    )
    sums = [sums_of(text, model) for model in (old, new)]
    exact = paired_difference(metric, windows, *sums)
    found = paired_difference(metric, short, *map(rounded_sums, sums))
    assert exact.standard_error is not None
    assert exact.standard_error > 0 or metric == "kl.tail"  # which is counted
    assert abs(found.difference - exact.difference) <= 1e-4 * exact.standard_error
    assert found.standard_error == pytest.approx(exact.standard_error, rel=1e-4)
    values = columns(text, old, new)
    for name, measure in zip(("saved", "value"), VALUES[metric], strict=True):
        error = textbook_error(values, text.document, measure)
        assert abs(getattr(found, name) - getattr(exact, name)) <= 1e-4 * error


# Outcomes


def baseline_of(
    text: Text, *models: Model, measures: dict[str, float] | None = None, **changed: object
) -> Baseline:
    """Candidates c0, c1, ...; `changed` goes to the model."""
    fields = {"id": "m" * 64, "name": "model", "dtype": "float32", **changed}
    return Baseline(
        model=Subject.model_validate(fields),
        windows=windows_of(text),
        candidates={
            f"c{place}": SavedCandidate(
                method="rtn", sums=sums_of(text, model), measures=measures or {}
            )
            for place, model in enumerate(models)
        },
    )


def judged(saved: Baseline, new: Baseline, *thresholds: str, **more: float) -> dict[str, Change]:
    found = changes("v1", "c0", saved, new, parse_thresholds(thresholds), **more)
    return {change.metric: change for change in found}


def test_the_same_candidate_passes_without_any_margin() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    saved = baseline_of(text, model)
    found = judged(saved, saved, "kl.mean:0", "top1_agreement:0", "kl.tail:0", "snr_db:0%")
    assert set(PAIRED) <= set(found)
    for change in found.values():
        assert change.difference == change.lower == change.upper == 0
    assert {c.metric for c in found.values() if c.outcome == "pass"} == {
        *("kl.mean", "top1_agreement", "kl.tail", "snr_db")
    }


def test_the_same_candidate_passes_on_a_single_short_document() -> None:
    text, (model, _) = draw(1, (0.03, 0.03), documents=1)
    saved = baseline_of(text, model)
    assert judged(saved, saved, "kl.mean:0")["kl.mean"].outcome == "pass"


def test_of_a_single_short_document_nothing_is_known() -> None:
    text, models = draw(1, (0.03, 0.3), documents=1)
    old, new = (baseline_of(text, model) for model in models)
    change = judged(old, new, "kl.mean:9")["kl.mean"]
    assert (change.outcome, change.lower, change.upper) == ("inconclusive", None, None)


@pytest.mark.parametrize("metric", PAIRED)
def test_outcomes_are_those_of_the_one_sided_bounds(metric: str) -> None:
    text, models = draw(7, (0.03, 0.05))
    old, new = (baseline_of(text, model) for model in models)
    change = judged(old, new, f"{metric}:9e9", confidence=0.9)[metric]
    values = columns(text, *models)
    error = textbook_error(values, text.document, change_of(metric))
    expected = bounds(change.difference, error, 40, level=0.1)
    assert change.lower is not None
    assert change.upper is not None
    assert (change.lower, change.upper) == pytest.approx(expected, rel=1e-3)
    higher = metric in ("top1_agreement", "snr_db", "cosine")
    least, most = (-change.upper, -change.lower) if higher else (change.lower, change.upper)
    assert least > 0, "the worse candidate should be worse for sure"
    for margin, outcome in (
        (most * 1.001, "pass"),
        (most * 0.999, "inconclusive"),
        (least * 1.001, "inconclusive"),
        (least * 0.999, "fail"),
    ):
        again = judged(old, new, f"{metric}:{margin!r}", confidence=0.9)[metric]
        assert (again.outcome, again.margin) == (outcome, margin)
    # The other way round it is better, which is never too much.
    assert judged(new, old, f"{metric}:0", confidence=0.9)[metric].outcome == "pass"


def test_a_percentage_is_one_of_the_saved_value() -> None:
    text, models = draw(7, (0.03, 0.05))
    old, new = (baseline_of(text, model) for model in models)
    change = judged(old, new, "kl.mean:5%")["kl.mean"]
    assert change.margin == pytest.approx(0.05 * models[0].kl.mean())


def test_a_rate_that_no_window_shows_to_differ_may_differ_unseen() -> None:
    """With no event in n tokens, a rate is below 3/n at 95 %: the rule of three."""
    text, (old, new) = draw(2, (1e-4, 1.1e-4))
    saved, other = baseline_of(text, old), baseline_of(text, new)
    assert not any((old.kl > 1) | (new.kl > 1))
    n = len(text.base)
    change = judged(saved, other, f"kl.tail:{2 / n}")["kl.tail"]
    assert change.outcome == "inconclusive"
    assert change.upper == pytest.approx(3 / n, rel=0.1)
    assert judged(saved, other, f"kl.tail:{4 / n}")["kl.tail"].outcome == "pass"


def test_counted_numbers_are_exact() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    old = baseline_of(text, model, measures={"size": 1000.0, "compression_ratio": 4.0})
    new = baseline_of(text, model, measures={"size": 1011.0, "compression_ratio": 3.9})
    found = judged(old, new, "size:1%", "compression_ratio:0.1")
    assert (found["size"].difference, found["size"].margin) == (11, 10)
    assert found["size"].outcome == "fail"
    assert found["compression_ratio"].lower == pytest.approx(-0.1)
    assert found["compression_ratio"].outcome == "pass"
    assert judged(old, new, "size:11")["size"].outcome == "pass"


# What cannot be compared


def test_what_is_not_the_same_is_refused() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    saved = baseline_of(text, model)
    with pytest.raises(
        BaselineError, match=r"v1 is of another base model: model .mmmm.*--qlab-save"
    ):
        judged(saved, baseline_of(text, model, id="o" * 64))
    with pytest.raises(BaselineError, match=r"computed in float32.*bfloat16.*--qlab-dtype=float32"):
        judged(saved, baseline_of(text, model, dtype="bfloat16"))
    other = saved.model_copy(deep=True)
    assert other.windows is not None
    other.windows.digest = "e"
    with pytest.raises(BaselineError, match=r"on other windows: \d+ windows of .*--qlab-seed"):
        judged(saved, other)


def test_versions_of_libraries_are_not_compared() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    saved = baseline_of(text, model, versions={"torch": "1"})
    assert judged(saved, baseline_of(text, model, versions={"torch": "2"}))


def test_a_threshold_for_what_was_not_saved_is_refused() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    saved, new = baseline_of(text, model), baseline_of(text, model, measures={"memory.peak": 9.0})
    with pytest.raises(BaselineError, match=r"v1 has no memory\.peak of c0.*--qlab-save=v1"):
        judged(saved, new, "memory.peak:5%")
    assert "memory.peak" not in judged(saved, new)
    with pytest.raises(BaselineError, match="no domain 'chat'"):
        judged(saved, new, "kl.mean[chat]:1")


def test_what_a_run_has_not_measured_is_left_out() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    saved = baseline_of(text, model, measures={"memory.peak": 9.0, "size": 1.0})
    new = baseline_of(text, model, measures={"size": 1.0})
    new.candidates["c0"].sums = new.windows = None
    assert list(judged(saved, new, "kl.mean:1", "memory.peak:1", "latency.p50:1")) == ["size"]


def test_without_hidden_states_other_measures_are_still_compared() -> None:
    text, models = draw(1, (0.03, 0.05))
    old, new = (baseline_of(text, model) for model in models)
    sums = new.candidates["c0"].sums
    assert sums is not None
    sums.hidden_error = sums.hidden_distance = []
    assert not {"snr_db", "cosine"} & set(judged(old, new, "kl.mean:1"))
    for which, pair in (("this run", (old, new)), ("the baseline", (new, old))):
        with pytest.raises(BaselineError, match=f"{which} has no hidden states"):
            judged(*pair, "snr_db:1")


def test_an_error_on_layers_needs_the_same_calibration_text() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    saved = baseline_of(text, model, measures={"layer_error": 0.01})
    new = saved.model_copy(deep=True)
    new.candidates["c0"].calibration = "other"
    assert "layer_error" not in judged(saved, new)
    with pytest.raises(BaselineError, match="calibration text, which has changed"):
        judged(saved, new, "layer_error:1%")


def test_memory_of_a_model_in_another_dtype_is_not_compared() -> None:
    """As on a processor that is not fast in bfloat16; what else was counted still is."""
    text, (model, _) = draw(1, (0.03, 0.03))
    saved = baseline_of(text, model, measures={"memory.peak": 9.0, "size": 1.0})
    saved.candidates["c0"].memory_dtype = "bfloat16"
    new = saved.model_copy(deep=True)
    assert judged(saved, new, "memory.peak:1%")["memory.peak"].outcome == "pass"
    for other in ("float32", ""):
        new.candidates["c0"].memory_dtype = other
        found = judged(saved, new, "size:1%")
        assert "memory.peak" not in found
        assert found["size"].outcome == "pass"
        with pytest.raises(BaselineError, match=f"in bfloat16, .* in {other or 'nothing known'},"):
            judged(saved, new, "memory.peak:1%")


def test_sums_without_bounds_are_refused() -> None:
    text, (model, _) = draw(1, (0.03, 0.03))
    saved, new = baseline_of(text, model), baseline_of(text, model)
    sums = saved.candidates["c0"].sums
    assert isinstance(sums, Sums)
    sums.delta = [1e300] * len(sums.delta)
    with pytest.raises(BaselineError, match="overflows"):
        judged(saved, new, "perplexity:1")


# Latency


def timed(p50: float, base: float, width: float = 0.02, **changed: Any) -> LatencySummary:
    ratio = p50 / base
    fields = {
        "p50": p50,
        "baseline_p50": base,
        "ratio": ratio,
        "ratio_lower": ratio * math.exp(-width),
        "ratio_upper": ratio * math.exp(width),
        "rounds": 400,
        "threads": 1,
        "convention": "prefill128",
        "processor": "P",
        "cores": 4,
        **changed,
    }
    return LatencySummary.model_validate(fields)


def test_a_machine_that_is_slower_today_is_no_regression() -> None:
    """Both models take twice as long: the saved time is scaled by the base model's."""
    found = latency_difference("latency.p50", timed(0.010, 0.008), timed(0.020, 0.016))
    assert (found.saved, found.value) == pytest.approx((0.020, 0.020))
    assert found.difference == pytest.approx(0)


@pytest.mark.parametrize("metric", ["latency.p50", "latency.ratio"])
def test_the_error_of_a_latency_is_that_of_both_ratios(metric: str) -> None:
    """Against draws of both log ratios from normal distributions."""
    saved, new = timed(0.010, 0.010, 0.03), timed(0.012, 0.010, 0.02)
    found = latency_difference(metric, saved, new)
    random = np.random.default_rng(0)
    scale = 0.010 if metric == "latency.p50" else 1.0
    logs = [np.log(each.ratio) for each in (saved, new)]
    spread = [0.03 / 1.959964, 0.02 / 1.959964]
    drawn = [np.exp(random.normal(m, s, 400_000)) for m, s in zip(logs, spread, strict=True)]
    assert found.difference == pytest.approx(scale * 0.2)
    assert found.standard_error == pytest.approx(scale * (drawn[1] - drawn[0]).std(), rel=0.01)


@pytest.mark.parametrize(
    ("changed", "ratio_too"),
    [({"threads": 2}, True), ({"convention": "x"}, True), ({"processor": "Q"}, False)],
)
def test_times_of_other_machines_are_not_compared(changed: dict[str, Any], ratio_too: bool) -> None:
    saved, new = timed(0.010, 0.008), timed(0.010, 0.008, **changed)
    with pytest.raises(BaselineError, match="was timed with"):
        latency_difference("latency.p50", saved, new)
    if ratio_too:
        with pytest.raises(BaselineError, match="was timed with"):
            latency_difference("latency.ratio", saved, new)
    else:
        assert latency_difference("latency.ratio", saved, new).difference == 0


def test_each_phase_is_compared_with_its_own() -> None:
    """Prefill is 10 % slower than it was, decoding 30 % faster, and nothing else was timed."""
    text, (model, _) = draw(1, (0.03, 0.03))
    saved, new = baseline_of(text, model), baseline_of(text, model)
    for each, prefill, decode in ((saved, 0.010, 0.010), (new, 0.011, 0.007)):
        each.candidates["c0"].latency = timed(prefill, 0.010)
        each.candidates["c0"].latencies = {"decode.": timed(decode, 0.010, convention="decode")}
    found = judged(saved, new, "latency.ratio:5%", "latency.decode.p50:5%")
    assert found["latency.ratio"].outcome == "fail"
    assert found["latency.ratio"].difference == pytest.approx(0.1)
    assert found["latency.decode.p50"].outcome == "pass"
    assert found["latency.decode.p50"].difference == pytest.approx(-0.003)
    assert {name for name in found if name.startswith("latency.")} == {
        f"latency.{phase}{name}" for phase in ("", "decode.") for name in ("p50", "ratio")
    }
    with pytest.raises(BaselineError, match=r"has no latency\.decode512\.ratio of c0"):
        check_saved("v1", "c0", saved, "latency.decode512.ratio")
    other = timed(0.007, 0.010, processor="Q")
    with pytest.raises(BaselineError, match=r"hold latency\.decode\.ratio"):
        latency_difference("latency.decode.p50", timed(0.010, 0.010), other)
