"""Latencies in the JSON form of pytest-benchmark, for the tools that read it."""

from __future__ import annotations

import json
import math
from typing import Any

from pytest_qlab.errors import DataError
from pytest_qlab.report.columns import is_baseline
from pytest_qlab.results import CandidateResult, Results

LEFT_OUT = (
    "Only candidates with a measured latency are exported, and of the quality measures only "
    "extra_info carries anything. A results document holds the median and the 99th percentile, not "
    "the samples: 'median', 'rounds' and 'max' (where there is a p99) are measured; 'min', 'mean', "
    "'stddev', 'iqr' and the outlier counts, which the readers of the format insist on, repeat the "
    "median or are zero, and extra_info.not_measured of each benchmark names them. Machine and "
    "commit information is what the results document knows."
)
_TIMED = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3")


def render_benchmark(results: Results) -> str:
    """The document as pytest-benchmark's JSON; `LEFT_OUT` says what it lacks.

    Raises:
        DataError: no candidate has a latency.
    """
    benchmarks = [_benchmark(row) for row in results.candidates if "latency.p50" in row.measures]
    if not benchmarks:
        raise DataError(
            "No candidate in the results has a latency (latency.p50), and pytest-benchmark's "
            "format holds nothing else. Run a test that asks for quantized.latency, or export to "
            "csv instead."
        )
    environment = results.environment
    document = {
        "machine_info": {
            "node": str(environment.get("node", "")),
            "processor": str(environment.get("processor", "")),
            "machine": str(environment.get("machine", "")),
            "python_version": str(environment.get("python", "")),
            "system": str(environment.get("system", environment.get("platform", ""))),
            "cpu": {"brand_raw": str(environment.get("cpu", ""))},
        },
        "commit_info": {
            "id": str(environment.get("commit", "")) or None,
            "time": None,
            "dirty": False,
            "branch": "(unknown)",
            "project": str(results.model.get("name", "")),
        },
        "benchmarks": benchmarks,
        "datetime": results.created,
        "version": f"{results.generator} {results.version}".strip(),
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _benchmark(row: CandidateResult) -> dict[str, Any]:
    median = row.measures["latency.p50"]
    stats: dict[str, Any] = {"median": median.value}
    for name in _TIMED:
        measure = row.measures.get(f"latency.{name}")
        if measure is not None:
            stats[name] = measure.value
    if "max" not in stats and "latency.p99" in row.measures:
        stats["max"] = row.measures["latency.p99"].value
    missing = [name for name in _TIMED if name not in stats]
    for name in missing:
        stats[name] = 0.0 if name in ("stddev", "iqr") else median.value
    rounds = median.n or 1
    stats |= {
        "rounds": rounds,
        "iterations": 1,
        "ops": 1 / stats["mean"] if stats["mean"] else 0.0,
        "total": stats["mean"] * rounds,
        "hd15iqr": stats["max"],
        "ld15iqr": stats["min"],
        "outliers": "0;0",
        "iqr_outliers": 0,
        "stddev_outliers": 0,
    }
    finite = {k: v.value for k, v in row.measures.items() if math.isfinite(v.value)}
    return {
        "group": None,
        "name": f"latency[{row.id}]",
        "fullname": f"pytest_qlab::latency[{row.id}]",
        "params": {"candidate": row.id},
        "param": row.id,
        "extra_info": {
            "method": row.method,
            "baseline": is_baseline(row),
            "simulated": row.simulated or median.simulated,
            "kernel": row.kernel,
            "not_measured": missing,
            "measures": finite,
        },
        "options": {"disable_gc": False, "timer": "perf_counter", "warmup": True},
        "stats": stats,
    }
