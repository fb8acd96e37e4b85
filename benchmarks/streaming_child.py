"""Quantizes or measures one model under a limit on its memory: a process that says what it took.

    python -m benchmarks.streaming_child WORK MODEL STORE SPEC STREAM LIMIT SEQUENCES LENGTH

WORK is `quantize`, or `measure`: the KL of the candidate, its noise floor included; that quantizes
it first if the store does not have it. SEQUENCES of LENGTH tokens are calibrated on, or measured
on. LIMIT is in bytes, of private writable memory (RLIMIT_DATA), imports included; 0 for none.

Prints one line of JSON: `idle` and `peak`, the most bytes that were resident before and in all,
mapped pages of files included; `data`, what LIMIT counts, before; `seconds` of processor time; `kl`
where it was measured; `error`, where memory was refused.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Quantize or measure what the arguments say."""
    work, model, store, spec, stream, *numbers = arguments
    limit, sequences, length = map(int, numbers)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from pytest_qlab import Lab, QlabError

    lab = Lab(
        model,
        store=store,
        threads=1,
        stream=stream,
        evaluation="prose",
        window_length=length,
        max_windows=sequences,
        calibration="prose",
        calibration_length=length,
        calibration_sequences=sequences,
    )
    given = lab.calibration.sequences if work == "quantize" else lab.eval_data.windows
    answer: dict[str, Any] = {
        "sequences": len(given),
        "idle": peak_resident(),
        "data": status("VmData"),
    }
    started = time.process_time()
    try:
        answer["directory"] = str(lab.candidate(spec).checkpoint.directory)
        if work == "measure":
            answer["kl"] = lab.candidate(spec).fidelity.estimates()["kl.mean"].to_dict()
    except (MemoryError, RuntimeError, QlabError) as error:
        if not any(sign in repr(error).lower() for sign in ("memory", "alloc")):
            raise
        answer["error"] = repr(error)
    answer.update(seconds=time.process_time() - started, peak=peak_resident())
    print(json.dumps(answer))


def peak_resident() -> int:
    """The most bytes that this process has had resident."""
    # Linux's ru_maxrss also counts what the parent held when it started this process.
    found = status("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def status(field: str) -> int | None:
    """Bytes that Linux says this process has of something; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(sys.argv[1:])
