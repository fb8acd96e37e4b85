"""`qlab serve-bench` against llama-cpp-python's server, which serves a file that we wrote."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.real_servers import free_port, qlab, running, serve_bench

_NEEDED = (
    "llama_cpp",
    "gguf",
    "uvicorn",
    "fastapi",
    "pydantic_settings",
    "sse_starlette",
    "starlette_context",
)
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(_MISSING),
        reason=f"llama-cpp-python[server] or gguf is not installed: there is no {_MISSING}",
    ),
]
CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in float16: quantized weights crash this server where there is AMX."""
    directory = tmp_path_factory.mktemp("gguf")
    file, store = directory / "embedded.gguf", directory / "store"
    done = qlab("quantize", "gguf:F16", "-o", str(file), "--store", str(store))
    assert done.returncode == 0, done.stderr
    return file


def command(model: Path, port: int, *options: str) -> list[str]:
    given = ["--model", str(model), "--port", str(port), "--n_threads", "1"]
    return ["-m", "llama_cpp.server", *given, "--n_ctx", str(CONTEXT), *options]


@pytest.fixture(scope="module")
def endpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    words = command(model, port, "--interrupt_requests", "false")
    with running(words, log, port=port, ready="/v1/models") as url:
        yield url


def test_forced_lengths_are_kept_and_known_without_usage(endpoint: str, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    few = ("--requests", "8", "--seconds", "120", "--tokens", "16", "--concurrency", "1,2")
    found = serve_bench(endpoint, "any", *few, "--json", str(report))
    assert found.returncode == 0, found.stderr + found.stdout
    assert "ended replies for their length" in found.stdout
    runs = json.loads(report.read_text())["runs"]
    assert [run["load"] for run in runs] == ["1", "2"]
    for run in runs:
        assert (run["requests"], run["failed"], run["wrong_lengths"]) == (8, 0, 0)
        assert (run["counted"], run["drift"], run["unverified_lengths"]) == (["length"], 1.0, 0)
        for name in ("ttft.p50", "tpot.p50", "tokens_per_second"):
            assert run["measures"][f"serving.{name}[{run['load']}]"]["value"] > 0, name


def test_replies_that_a_short_context_cuts_are_not_taken_at_their_word(endpoint: str) -> None:
    few = ("--requests", "4", "--seconds", "120", "--tokens", "200", "--prompt-words", "80")
    found = serve_bench(endpoint, "any", *few, "--concurrency", "1")
    assert found.returncode == 2, found.stdout
    said = re.search(r"own count generates (\d+) tokens where 200 are asked for", found.stderr)
    assert said, found.stderr
    # A prompt of 80 words has 80 tokens or more.
    assert 0 < int(said[1]) <= CONTEXT - 80


def test_replies_that_the_next_request_cuts_off_are_told_so(model: Path, tmp_path: Path) -> None:
    port, report = free_port(), tmp_path / "bench.json"
    few = ("--requests", "6", "--seconds", "120", "--tokens", "64", "--concurrency", "2")
    with running(command(model, port), tmp_path / "log", port=port, ready="/v1/models") as url:
        found = serve_bench(url, "any", *few, "--json", str(report))
    assert found.returncode == 1, found.stderr + found.stdout
    assert "--interrupt_requests false" in found.stdout
    (run,) = json.loads(report.read_text())["runs"]
    assert 0 < run["cut_off"] <= run["wrong_lengths"]
    assert run["unverified_lengths"] >= run["cut_off"]
