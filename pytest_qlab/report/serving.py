"""What `qlab serve-bench` prints and writes: one line per load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.serving import QUANTILES, ServingRun
from pytest_qlab.stats.intervals import sample_quantile

VERSION = 2
LENGTH_TOLERANCE = 0.1
"""Speeds are comparable while replies are, in the mean, this close to the length asked for."""

MOST_CACHED = 0.2
"""Share of the prompts' tokens: the first few of a short one may be the same by chance."""


def kept_length(run: ServingRun) -> bool:
    """Whether the replies are about as long as was asked for, and nobody has to guess it."""
    return run.saturated or (abs(run.drift - 1) <= LENGTH_TOLERANCE and not run.unverified)


def describe_run(run: ServingRun, name: str) -> dict[str, Any]:
    """One load as plain JSON types: measures with their intervals, and what was not kept."""
    try:
        found, missing = run.estimates(name)
        problem = ""
    except MetricError as error:
        found, missing, problem = {}, {}, str(error)
    prompts = [each.prompt_tokens for each in run.measured if each.prompt_tokens is not None]
    gaps = run.itl()
    return {
        "load": run.load.name,
        "tokens": run.tokens,
        "requests": len(run.measured),
        "failed": run.failed,
        "stopped": run.stopped,
        "problem": problem,
        "measures": {metric: each.to_dict() for metric, each in found.items()},
        "missing": missing,
        "itl": {f"p{100 * q:.0f}": sample_quantile(gaps, q).value for q in QUANTILES if gaps},
        "prompt_tokens": {
            "least": min(prompts),
            "median": statistics.median(prompts),
            "most": max(prompts),
        }
        if prompts
        else None,
        "cached_share": run.cached_share,
        "counted": sorted({each.counted for each in run.measured}),
        "wrong_lengths": run.wrong_lengths,
        "unverified_lengths": run.unverified,
        "cut_off": run.cut_off,
        "drift": run.drift if run.measured else None,
    }


def document(runs: Sequence[ServingRun], endpoint: str, model: str) -> dict[str, Any]:
    """All loads of one endpoint as plain JSON types."""
    return {
        "schema": "qlab-serve-bench",
        "version": VERSION,
        "endpoint": endpoint,
        "model": model,
        "runs": [describe_run(run, model) for run in runs],
    }


def render_runs(runs: Sequence[ServingRun], model: str) -> str:
    """A table for the terminal, and below it what has to be known to read it."""
    head = [
        "load",
        "requests",
        *(f"{w} p{100 * q:.0f}" for w in ("ttft", "tpot") for q in QUANTILES),
    ]
    lines = [[*head, "tokens/s"]]
    notes: list[str] = []
    for run in runs:
        described = describe_run(run, model)
        name, measures = run.load.name, described["measures"]
        cells = [name, str(len(run.measured))]
        for what in ("ttft", "tpot"):
            for quantile in QUANTILES:
                found = measures.get(f"serving.{what}.p{100 * quantile:.0f}[{name}]")
                cells.append("-" if found is None else f"{1000 * found['value']:.4g} ms")
        rate = measures.get(f"serving.tokens_per_second[{name}]")
        cells.append("-" if rate is None else f"{rate['value']:.4g}")
        lines.append(cells)
        notes += [f"{name}: {note}" for note in _notes(run, described)]
    if any("-" in line for line in lines):
        notes.append("-: too few requests to bound it from above at 95 % (p90: 29, p99: 299)")
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*table, *notes]) + "\n"


def _notes(run: ServingRun, described: dict[str, Any]) -> list[str]:
    notes = []
    if described["problem"]:
        notes.append(described["problem"])
    if run.failed:
        notes.append(f"{run.failed} requests failed and are left out")
    if (run.cached_share or 0) > MOST_CACHED:
        notes.append(
            f"the server had {run.cached_share:.0%} of the prompts' tokens in a cache of prefixes, "
            "so the time to the first token is not the model's alone"
        )
    if run.wrong_lengths:
        kept = "" if kept_length(run) else ", so that speeds cannot be compared"
        notes.append(
            f"{run.wrong_lengths} replies have not the {run.tokens} tokens that were asked for; in "
            f"the mean they have {run.drift:.1%} of them{kept}"
        )
    if run.cut_off:
        notes.append(
            f"{run.cut_off} replies ended early and without a reason: something cut them off. "
            "llama-cpp-python's server does so whenever another request comes, unless it is "
            "started with --interrupt_requests false"
        )
    if "length" in described["counted"]:
        notes.append(
            "the server sent no usage, but ended replies for their length, so they have the "
            f"{run.tokens} tokens that were asked for"
        )
    if "chunks" in described["counted"]:
        notes.append("the server sent no usage, so chunks are counted as tokens")
    if run.unverified:
        notes.append(
            f"nothing says how long {run.unverified} of the replies are, so that speeds cannot be "
            "compared"
        )
    if run.stopped == "seconds":
        notes.append("ended by the time limit")
    return notes
