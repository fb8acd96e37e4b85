"""Quantizes one model under a limit on its memory, and says what it took: a process of its own.

    python -m benchmarks.streaming_child MODEL STORE SPEC STREAM LIMIT SEQUENCES LENGTH

LIMIT is in bytes, of private writable memory (RLIMIT_DATA), imports included; 0 for none. Prints
one line of JSON: `idle` and `peak`, the most bytes that were resident before and in all, mapped
pages of files included; `seconds` of processor time; `error`, where memory was refused.
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
    """Quantize what the arguments say."""
    model, store, spec, stream, *numbers = arguments
    limit, sequences, length = map(int, numbers)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from pytest_qlab import Lab, QlabError

    lab = Lab(
        model,
        store=store,
        threads=1,
        stream=stream,
        calibration="prose",
        calibration_length=length,
        calibration_sequences=sequences,
    )
    answer: dict[str, Any] = {"sequences": len(lab.calibration.sequences), "idle": peak_resident()}
    started = time.process_time()
    try:
        answer["directory"] = str(lab.candidate(spec).checkpoint.directory)
    except (MemoryError, RuntimeError, QlabError) as error:
        if not any(sign in repr(error).lower() for sign in ("memory", "alloc")):
            raise
        answer["error"] = repr(error)
    answer.update(seconds=time.process_time() - started, peak=peak_resident())
    print(json.dumps(answer))


def peak_resident() -> int:
    """The most bytes that this process has had resident."""
    try:
        # Linux's ru_maxrss also counts what the parent held when it started this process.
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main(sys.argv[1:])
