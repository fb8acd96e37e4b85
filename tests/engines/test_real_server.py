"""`qlab serve-bench` against a server of somebody else's: `transformers serve`, where installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="transformers serve needs fastapi (transformers[serving])")
pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn (transformers[serving])")
pytestmark = pytest.mark.slow

MODEL = str(files("pytest_qlab") / "embedded" / "model")
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        port: int = each.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    words = ["serve", "--device", "cpu", "--port", str(port), MODEL]
    program = "from transformers.cli.transformers import main; main()"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait(30)


def serve_bench(endpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from pytest_qlab.cli import main; sys.exit(main())"
    words = ["serve-bench", "--endpoint", endpoint, "--model", MODEL, *options]
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )


def test_two_clients_are_measured(endpoint: str, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    few = ("--requests", "6", "--seconds", "60", "--tokens", "8", "--concurrency", "2")
    found = serve_bench(endpoint, "--no-force", *few, "--json", str(report))
    assert found.returncode in (0, 1), found.stderr  # 1: replies that ended early, and it says so
    (run,) = json.loads(report.read_text())["runs"]
    assert run["requests"] >= 6
    assert run["failed"] == 0
    measures = run["measures"]
    for name in ("ttft.p50", "tpot.p50", "tokens_per_second"):
        value = measures[f"serving.{name}[2]"]["value"]
        assert value > 0, name


def test_a_server_that_refuses_forced_lengths_is_quoted(endpoint: str) -> None:
    found = serve_bench(endpoint, "--requests", "1", "--tokens", "4", "--concurrency", "1")
    assert found.returncode == 2
    assert "ignore_eos" in found.stderr
    assert "pass --no-force" in found.stderr
