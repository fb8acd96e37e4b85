"""A new candidate against a saved one: paired differences per window, exact ones where counted.

Both ran over the same windows beside the same base model, so what a window costs any model cancels.
The difference is linearised per window and its variance taken between documents, as for every other
measure. Source: regression against the last release, theta = new - old, with a margin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.directions import RATES, direction_of, split_domain
from pytest_qlab.errors import BaselineError, did_you_mean
from pytest_qlab.gate.baselines import (
    VALUE_DIGITS,
    Baseline,
    LatencySummary,
    SavedCandidate,
    Sums,
    Windows,
    rounded,
)
from pytest_qlab.gate.thresholds import COUNTED, PAIRED, TIMED, Threshold
from pytest_qlab.metrics.fidelity import SNR_CAP_DB
from pytest_qlab.results import Change
from pytest_qlab.stats.decisions import bounds, judge
from pytest_qlab.stats.paired import (
    Spread,
    cluster_index,
    log_ratio,
    mean_influence,
    spread,
    token_mean,
)
from pytest_qlab.stats.rates import rate_bounds

# Clusters with which Student's t is the normal distribution, for what is not clustered.
_MANY = 100_000
_DECIBELS = 10 / math.log(10)
_SUMS_OF = {
    "kl.mean": "kl",
    "kl.tail": "tail",
    "top1_agreement": "agree",
    "cosine": "hidden_distance",
}
_HIDDEN = ("snr_db", "cosine")


@dataclass(frozen=True)
class Difference:
    """New minus saved, in the measure's unit.

    Attributes:
        clusters: None for counted numbers. tokens: of which a rate is a share, else None.
    """

    saved: float
    value: float
    difference: float
    standard_error: float | None = None
    clusters: int | None = None
    tokens: int | None = None


def paired_difference(metric: str, windows: Windows, saved: Sums, new: Sums) -> Difference:
    """The change of a measure of damage over the same windows.

    Args:
        metric: one of `PAIRED`, or one of a domain of the text such as `kl.mean[code]`.
        windows: what both share. saved, new: one sum for each window.

    Raises:
        BaselineError: hidden states were not compared, or the sums are out of all bounds.
    """
    base, domain = split_domain(metric)
    for sums, which in ((saved, "the baseline"), (new, "this run")):
        if base in _HIDDEN and not sums.hidden_error:
            raise BaselineError(
                f"{metric} cannot be compared with the baseline: {which} has no hidden states of "
                "it, because its logits were made in another runtime. Hold kl.mean instead."
            )
    try:
        found = _over_windows(base, domain, windows, saved, new)
    except OverflowError as error:
        raise BaselineError(
            f"{metric} cannot be compared with the baseline: a perplexity overflows, so one of the "
            "two models is broken or the file is. Save the baseline again."
        ) from error
    # The same sums are the same model: nothing is left to chance, of however few documents.
    return replace(found, standard_error=0.0, tokens=None) if saved == new else found


def _over_windows(base: str, domain: str, windows: Windows, saved: Sums, new: Sums) -> Difference:
    kept = np.ones(len(windows.tokens), dtype=bool)
    if domain:
        kept = np.asarray(windows.domain) == windows.domains.index(domain)
    tokens = np.asarray(windows.tokens)[kept]
    clusters = cluster_index(np.asarray(windows.document)[kept])

    def column(values: Iterable[float]) -> NDArray[Any]:
        return np.asarray(values, dtype=np.float64)[kept]

    if base in _SUMS_OF:
        old, ours = (column(getattr(each, _SUMS_OF[base])) for each in (saved, new))
        if base == "cosine":
            old, ours = tokens - old, tokens - ours
        total = float(tokens.sum())
        change = token_mean(ours - old, tokens, clusters)
        found = _difference(float(old.sum()) / total, float(ours.sum()) / total, change)
        return replace(found, tokens=int(total)) if base in RATES else found
    if base == "snr_db":
        signal = column(windows.hidden_signal)
        return _decibels(signal, column(saved.hidden_error), column(new.hidden_error), clusters)
    return _perplexity(
        base, column(windows.base_nll), column(saved.delta), column(new.delta), tokens, clusters
    )


def _perplexity(
    base: str,
    base_nll: NDArray[Any],
    saved: NDArray[Any],
    new: NDArray[Any],
    tokens: NDArray[Any],
    clusters: NDArray[np.int64],
) -> Difference:
    """Perplexity and its relatives: exp of mean losses, by the delta method."""
    total = float(tokens.sum())
    start = 0.0 if base == "perplexity_ratio" else float(base_nll.sum()) / total
    below, above = float(saved.sum()) / total, float(new.sum()) / total
    if base == "log_perplexity_delta":
        return _difference(below, above, token_mean(new - saved, tokens, clusters))
    common = np.zeros_like(base_nll) if base == "perplexity_ratio" else base_nll
    influence = math.exp(start + above) * mean_influence(common + new, tokens)
    influence -= math.exp(start + below) * mean_influence(common + saved, tokens)
    change = math.exp(start + below) * math.expm1(above - below)
    found = spread(change, influence, clusters)
    if base == "perplexity_delta":
        return _difference(
            math.exp(start) * math.expm1(below), math.exp(start) * math.expm1(above), found
        )
    return _difference(math.exp(start + below), math.exp(start + above), found)


def _decibels(
    signal: NDArray[Any], saved: NDArray[Any], new: NDArray[Any], clusters: NDArray[np.int64]
) -> Difference:
    """SNR of the final hidden states; an exact copy has no error, and no interval then."""
    values = [_snr(float(signal.sum()), float(each.sum())) for each in (saved, new)]
    if saved.sum() == 0 or new.sum() == 0:
        return Difference(values[0], values[1], values[1] - values[0])
    found = log_ratio(saved, new, clusters)
    error = None if found.standard_error is None else found.standard_error * _DECIBELS
    return Difference(values[0], values[1], found.value * _DECIBELS, error, found.clusters)


def _snr(signal: float, error: float) -> float:
    if error == 0 or signal == 0:
        return SNR_CAP_DB if error == 0 else -SNR_CAP_DB
    return min(SNR_CAP_DB, max(-SNR_CAP_DB, _DECIBELS * math.log(signal / error)))


def _difference(saved: float, value: float, found: Spread) -> Difference:
    return Difference(saved, value, found.value, found.standard_error, found.clusters)


def latency_difference(metric: str, saved: LatencySummary, new: LatencySummary) -> Difference:
    """The change of a latency, freed from how fast the machine happened to be each time.

    Both candidates were timed in turn with the base model. For a median (`p50`), the saved value is
    scaled by how much slower or faster the base model runs now; the error is that of the ratios.

    Raises:
        BaselineError: timed in another way, or, for a median, on another machine.
    """
    is_median = metric.endswith("p50")
    machine: list[tuple[str, object, object]] = [
        ("threads", saved.threads, new.threads),
        ("convention", saved.convention, new.convention),
    ]
    if is_median:
        machine.append(("processor", saved.processor, new.processor))
        machine.append(("cores", saved.cores, new.cores))
    for what, ours, theirs in machine:
        if ours != theirs:
            raise BaselineError(
                f"{metric} cannot be compared with the baseline: it was timed with {what} "
                f"{ours!r}, and this run with {theirs!r}. Compare on the machine that saved it, or "
                f"hold {metric.rpartition('.')[0]}.ratio, which is relative to the base model."
            )
    expected, value = saved.ratio, new.ratio
    if is_median:
        expected, value = saved.p50 * new.baseline_p50 / saved.baseline_p50, new.p50
    error = math.hypot(expected * _log_error(saved), value * _log_error(new))
    return Difference(expected, value, value - expected, error, _MANY)


def _log_error(summary: LatencySummary) -> float:
    """Standard error of the log of the ratio, from its 95 % interval."""
    width = math.log(summary.ratio_upper / summary.ratio_lower)
    return width / (2 * NormalDist().inv_cdf(0.975))


def check_subject(name: str, saved: Baseline, new: Baseline) -> None:
    """Refuse a baseline of something else.

    Raises:
        BaselineError: of another model, in another dtype, or on other windows.
    """
    again = f"Save it again with --qlab-save={name} if that is meant to be, and commit it."
    if saved.model.id != new.model.id:
        raise BaselineError(
            f"The baseline {name} is of another base model: {saved.model.name} "
            f"({saved.model.id[:12]}) there, {new.model.name} ({new.model.id[:12]}) here. {again}"
        )
    if saved.model.dtype != new.model.dtype:
        raise BaselineError(
            f"The baseline {name} was computed in {saved.model.dtype}, and this run computes in "
            f"{new.model.dtype}: give --qlab-dtype={saved.model.dtype}. {again}"
        )
    ours, theirs = saved.windows, new.windows
    if ours is not None and theirs is not None and ours.digest != theirs.digest:
        raise BaselineError(
            f"The baseline {name} was measured on other windows: {_described(ours)} there, "
            f"{_described(theirs)} here. Give the same text, --qlab-window-length, "
            f"--qlab-max-windows and --qlab-seed. {again}"
        )


def _described(windows: Windows) -> str:
    return (
        f"{len(windows.tokens)} windows of {windows.name or 'some text'} ({windows.convention}, "
        f"{windows.digest[:12]})"
    )


def changes(
    name: str,
    candidate: str,
    saved: Baseline,
    new: Baseline,
    thresholds: dict[str, Threshold],
    *,
    confidence: float = 0.95,
) -> list[Change]:
    """Every measure that both have, and what its threshold says of it.

    Bounds are one-sided, each wrong with 1 - `confidence`. A measure with a threshold has an
    outcome: `fail` if even the optimistic bound is worse by more than the margin, `pass` if even
    the pessimistic one is not, `inconclusive` between.

    Raises:
        BaselineError: the two cannot be compared, or the saved one has not what a threshold is for.
    """
    check_subject(name, saved, new)
    old, ours = saved.candidates[candidate], new.candidates[candidate]
    found = []
    for metric in dict.fromkeys((*PAIRED, *COUNTED, *TIMED, *thresholds)):
        held = thresholds.get(metric)
        if not has(metric, ours) or (held is None and not has(metric, old)):
            continue
        check_saved(name, candidate, saved, metric)
        try:
            difference = _of(metric, saved.windows, old, ours)
        except BaselineError:
            if held is not None:
                raise
            continue
        found.append(_judged(metric, difference, held, confidence))
    return found


def has(metric: str, candidate: SavedCandidate) -> bool:
    """Whether a candidate has what the measure is compared by."""
    if split_domain(metric)[0] in PAIRED:
        return candidate.sums is not None
    if metric in TIMED:
        return candidate.timed(metric) is not None
    return metric in candidate.measures


def check_saved(name: str, candidate: str, saved: Baseline, metric: str) -> None:
    """Refuse a threshold for what the saved candidate has not.

    Raises:
        BaselineError: it was not measured when it was saved, or there is no such domain.
    """
    if not has(metric, saved.candidates[candidate]):
        raise BaselineError(
            f"The baseline {name} has no {metric} of {candidate}, because no test measured it when "
            f"it was saved. Save it again with --qlab-save={name} in a run with a test that does, "
            "or leave the threshold out."
        )
    domain, windows = split_domain(metric)[1], saved.windows
    if domain and windows is not None and domain not in windows.domains:
        raise BaselineError(
            f"{metric}: the evaluation text of the baseline {name} has no domain {domain!r}."
            f"{did_you_mean(domain, windows.domains)}"
        )


def _of(
    metric: str, windows: Windows | None, saved: SavedCandidate, new: SavedCandidate
) -> Difference:
    if saved.sums is not None and new.sums is not None and split_domain(metric)[0] in PAIRED:
        assert windows is not None  # A baseline with sums has them.
        return paired_difference(metric, windows, saved.sums, new.sums)
    if metric in TIMED:
        before, now = saved.timed(metric), new.timed(metric)
        assert before is not None  # Both have what is compared.
        assert now is not None
        return latency_difference(metric, before, now)
    if metric == "layer_error" and saved.calibration != new.calibration:
        raise BaselineError(
            "layer_error cannot be compared with the baseline: it is measured on the calibration "
            "text, which has changed. Save the baseline again."
        )
    if metric.startswith("memory.") and saved.memory_dtype != new.memory_dtype:
        ours, theirs = (each.memory_dtype or "nothing known" for each in (saved, new))
        raise BaselineError(
            f"{metric} cannot be compared with the baseline: it was measured of a model in {ours}, "
            f"and in this run of one in {theirs}, because processors differ in what they multiply "
            "fast. Compare on a machine of the kind that saved it, or save the baseline again."
        )
    old, value = saved.measures[metric], new.measures[metric]
    # 3.9 - 4 is -0.1 here, as it is for whoever writes a threshold.
    return Difference(old, value, rounded(value - old, VALUE_DIGITS - 1), 0.0)


def _judged(
    metric: str, found: Difference, threshold: Threshold | None, confidence: float
) -> Change:
    error, clusters, level = found.standard_error, found.clusters, 1 - confidence
    if error == 0 and found.tokens is not None and clusters is not None:
        # No window has one more or one less of them. That many tokens could still differ unseen.
        _, upper = rate_bounds(0.0, found.tokens, clusters, 1.0, level=level)
        lower = -upper
    else:
        lower, upper = bounds(found.difference, error, clusters, level=level)
    change = Change(
        metric=metric,
        saved=found.saved,
        value=found.value,
        difference=found.difference,
        confidence=confidence,
        lower=lower if math.isfinite(lower) else None,
        upper=upper if math.isfinite(upper) else None,
    )
    if threshold is not None:
        change.margin = threshold.margin(found.saved)
        higher = direction_of(metric) == "higher"
        limit = -change.margin if higher else change.margin
        change.outcome = str(judge(lower, upper, limit, higher_is_better=higher))
    return change
