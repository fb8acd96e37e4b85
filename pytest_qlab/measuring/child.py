"""Ask a fresh process: a module of ours that reads a JSON job and prints a JSON answer last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pytest_qlab.errors import MetricError

SECONDS = 1800.0


def answer_of_child(
    module: str, job: dict[str, Any], *, what: str, instead: str = ""
) -> dict[str, Any]:
    """Run `python -m module` with the job on its standard input; what its last line says.

    Args:
        what: what was to be measured, the subject of messages.
        instead: a sentence that tells what to do without it.

    Raises:
        MetricError: the process failed, or was not done after `SECONDS`.
    """
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (home, *sys.path)))
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as error:
        raise MetricError(
            f"{what} was not measured: the process that loads the packed model was not done after "
            f"{SECONDS:g} seconds. {instead}".rstrip()
        ) from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        raise MetricError(
            f"{what} was not measured: the process that loads the packed model by itself ended "
            f"with status {done.returncode}: {said}. {instead}".rstrip()
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
