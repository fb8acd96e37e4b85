"""Servers of somebody else's, started here, and `qlab serve-bench` against them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        port: int = each.getsockname()[1]
    return port


@contextmanager
def running(command: Sequence[str], log: Path, *, port: int, ready: str) -> Iterator[str]:
    """The address below which a server that was started has `/completions`.

    `ready`: the path that answers once it is ready.
    """
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, *command],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with suppress(OSError), urllib.request.urlopen(url + ready):
                break
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait(30)


def qlab(*words: str) -> subprocess.CompletedProcess[str]:
    """The console script, in a process of its own."""
    program = "import sys; from pytest_qlab.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )


def serve_bench(endpoint: str, model: str, *options: str) -> subprocess.CompletedProcess[str]:
    return qlab("serve-bench", "--endpoint", endpoint, "--model", model, *options)
