"""`qlab serve-bench` against a server of somebody else's: `transformers serve`, where installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tests.engines.real_servers import free_port, running, serve_bench

for _package in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(
        _package, reason=f"transformers serve needs {_package} (transformers[serving])"
    )
pytestmark = pytest.mark.slow

MODEL = str(files("pytest_qlab") / "embedded" / "model")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    program = "from transformers.cli.transformers import main; main()"
    command = ["-c", program, "serve", "--device", "cpu", "--port", str(port), MODEL]
    with running(command, log, port=port, ready="/health") as url:
        yield url


def test_two_clients_are_measured(endpoint: str, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    few = ("--requests", "6", "--seconds", "60", "--tokens", "8", "--concurrency", "2")
    found = serve_bench(endpoint, MODEL, "--no-force", *few, "--json", str(report))
    assert found.returncode in (0, 1), found.stderr  # 1: replies that ended early, and it says so
    (run,) = json.loads(report.read_text())["runs"]
    assert run["requests"] >= 6
    assert run["failed"] == 0
    assert run["counted"] == ["usage"]
    measures = run["measures"]
    for name in ("ttft.p50", "tpot.p50", "tokens_per_second"):
        value = measures[f"serving.{name}[2]"]["value"]
        assert value > 0, name


def test_a_server_that_refuses_forced_lengths_is_quoted(endpoint: str) -> None:
    found = serve_bench(endpoint, MODEL, "--requests", "1", "--tokens", "4", "--concurrency", "1")
    assert found.returncode == 2
    assert "ignore_eos" in found.stderr
    assert "pass --no-force" in found.stderr
