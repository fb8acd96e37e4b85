"""What is kept of a measured candidate in a baseline, and what a new one is compared by."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from pytest_qlab.data.windows import digest_of_windows
from pytest_qlab.directions import is_damage
from pytest_qlab.gate.baselines import (
    VALUE_DIGITS,
    Baseline,
    LatencySummary,
    SavedCandidate,
    Subject,
    Sums,
    Windows,
    rounded,
)
from pytest_qlab.gate.thresholds import COUNTED, PAIRED, SAMPLED, TIMED
from pytest_qlab.machine import processor_of
from pytest_qlab.store import content_hash

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qlab.candidate import Candidate
    from pytest_qlab.lab import Lab
    from pytest_qlab.measuring.latency import Latency
    from pytest_qlab.measuring.memory import Memory
    from pytest_qlab.metrics.latency import PairedLatency

PACKAGES = ("torch", "transformers")


def subject_of(lab: Lab) -> Subject:
    """The model of a lab, without the directory that it happens to lie in."""
    import pytest_qlab

    versions = {name: version(name) for name in PACKAGES}
    return Subject(
        id=lab.model.digest,
        name=_short(lab.model.name),
        dtype=lab.model.dtype,
        versions={"pytest-qlab": pytest_qlab.__version__, **versions},
    )


def evaluation_digest(lab: Lab) -> str:
    """Hash of all that is scored and of how it was cut."""
    windows = lab.eval_data
    return digest_of_windows(lab.evaluation.convention, windows.documents, windows.windows)


def record_of(candidate: Candidate, *, evaluated: bool) -> Baseline:
    """A baseline with the one candidate, of what was measured on it so far.

    Args:
        evaluated: whether to run the candidate over all evaluation windows, if it was not.
    """
    lab = candidate.lab
    saved = SavedCandidate(
        method=candidate.method.name,
        options=_portable(candidate.method.model_dump(mode="json")),
    )
    if candidate.method.stream != "none" or "layer_error" in candidate.measured:
        saved.calibration = content_hash(lab.calibration_input.identity)
    found = Baseline(model=subject_of(lab), candidates={candidate.id: saved})
    if evaluated:
        found.windows, saved.sums = _predictions(candidate)
    measured = candidate.measured
    if "checkpoint" in candidate.__dict__:
        saved.quantized = candidate.checkpoint.directory.name
    for name, estimate in measured.items():
        if name in COUNTED or name in SAMPLED:
            saved.measures[name] = rounded(estimate, VALUE_DIGITS)
        elif name in TIMED or (evaluated and name in PAIRED):
            saved.measures[name] = rounded(estimate)
    memory: Memory | None = candidate.__dict__.get("memory")
    saved.memory_dtype = "" if memory is None else memory.dtype
    latencies = _latencies(candidate)
    saved.latency = latencies.pop("", None)
    saved.latencies = latencies
    return found


def _predictions(candidate: Candidate) -> tuple[Windows, Sums]:
    fidelity, lab = candidate.fidelity, candidate.lab
    rows = fidelity.windows[np.argsort(fidelity.windows["window"], kind="stable")]
    of_document = [domain for _, domain in lab.eval_data.documents]
    named = [of_document[number] for number in rows["document"]]
    domains = list(dict.fromkeys(named))
    hidden = fidelity.tokens.has_hidden

    def column(name: str) -> list[float]:
        return [rounded(value) for value in rows[name]]

    distance = rows["tokens"] - rows["hidden_cosine"]

    windows = Windows(
        digest=evaluation_digest(lab),
        name=",".join(_short(name) for name in lab.evaluation.name.split(",")),
        convention=lab.evaluation.convention,
        domains=domains,
        domain=[domains.index(name) for name in named],
        document=rows["document"].tolist(),
        tokens=rows["tokens"].tolist(),
        base_nll=column("base_nll"),
        hidden_signal=column("hidden_signal") if hidden else [],
    )
    sums = Sums(
        delta=column("delta"),
        kl=column("kl"),
        tail=rows["kl_tail"].tolist(),
        agree=rows["agree"].tolist(),
        hidden_error=column("hidden_error") if hidden else [],
        hidden_distance=[rounded(value) for value in distance] if hidden else [],
    )
    return windows, sums


def _latencies(candidate: Candidate) -> dict[str, LatencySummary]:
    """Of the phases that were timed, by the prefix of their measures."""
    latency: Latency | None = candidate.__dict__.get("latency")
    timed = {} if latency is None else latency.phases()
    processor = processor_of(candidate.lab.model.device)
    return {
        prefix: _summary(phase.measured, processor)
        for prefix, phase in timed.items()
        if phase.measured is not None
    }


def _summary(paired: PairedLatency, processor: str) -> LatencySummary:
    ratio = paired.ratio
    return LatencySummary(
        p50=rounded(paired.candidate.p50),
        baseline_p50=rounded(paired.baseline.p50),
        ratio=rounded(ratio),
        ratio_lower=rounded(ratio.lower or 0.0),
        ratio_upper=rounded(ratio.upper or 0.0),
        rounds=len(paired.quiet),
        threads=paired.threads,
        convention=paired.convention,
        processor=processor,
        cores=os.cpu_count() or 1,
        simulated=paired.simulated,
    )


def _short(name: str) -> str:
    """A name as it is, and of an absolute path its last part: a baseline is read elsewhere."""
    name = name.strip()
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _portable(options: dict[str, object]) -> dict[str, object]:
    return {k: _short(v) if isinstance(v, str) else v for k, v in options.items()}


def measured_damage(metrics: Iterable[str]) -> bool:
    """Whether any of the measures comes from running the candidate over the windows."""
    return any(is_damage(metric) for metric in metrics)
