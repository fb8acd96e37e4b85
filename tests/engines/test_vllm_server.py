"""`qlab serve-bench` against vLLM itself, on a CPU, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import pytest

from tests.engines.real_servers import free_port, running, serve_bench


def _for_cpus() -> bool:
    """Whether vLLM is there in a build for CPUs, which it knows by the name of its version."""
    try:
        return importlib.util.find_spec("vllm") is not None and "cpu" in version("vllm")
    except PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _for_cpus(), reason="vLLM is not installed in a build for CPUs"),
]
MODEL = str(files("pytest_qlab") / "embedded" / "model")
CONTEXT = 512


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    what = ["--model", MODEL, "--served-model-name", "embedded", "--max-model-len", str(CONTEXT)]
    how = ["--enforce-eager", "--enable-prompt-tokens-details", "--port", str(port)]
    command = ["-m", "vllm.entrypoints.openai.api_server", *what, *how, "--host", "127.0.0.1"]
    with running(command, log, port=port, ready="/health") as url:
        yield url


def hits(endpoint: str) -> tuple[float, float]:
    """Tokens of prompts that vLLM has looked for in its cache of prefixes, and that it had."""
    with urllib.request.urlopen(endpoint.removesuffix("/v1") + "/metrics") as answer:
        said = answer.read().decode()
    kinds = ("queries", "hits")
    found = [re.search(rf"^vllm:prefix_cache_{kind}_total\S* (\S+)$", said, re.M) for kind in kinds]
    queries, hit = (float(each[1]) for each in found if each is not None)
    return queries, hit


def test_forced_lengths_are_kept_and_nothing_comes_from_the_cache(
    endpoint: str, tmp_path: Path
) -> None:
    """Though the second run puts the loads of the first on the same server."""
    few = ("--requests", "32", "--seconds", "120", "--tokens", "24", "--prompt-words", "120")
    for place in range(2):
        report = tmp_path / f"{place}.json"
        found = serve_bench(
            endpoint, "embedded", *few, "--concurrency", "1,4", "--json", str(report)
        )
        assert found.returncode == 0, found.stderr + found.stdout
        runs = json.loads(report.read_text())["runs"]
        assert [run["load"] for run in runs] == ["1", "4"]
        for run in runs:
            assert (run["requests"], run["failed"], run["wrong_lengths"]) == (32, 0, 0)
            assert (run["counted"], run["drift"], run["cached_share"]) == (["usage"], 1.0, 0.0)
            assert run["prompt_tokens"]["least"] > 120
            for name in ("ttft.p50", "ttft.p90", "tpot.p50", "tokens_per_second"):
                assert run["measures"][f"serving.{name}[{run['load']}]"]["value"] > 0, name
    queries, hit = hits(endpoint)
    assert queries > 4 * 32 * 120
    assert hit == 0


def test_an_open_loop_ends_by_itself(endpoint: str, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    few = ("--rate", "5", "--requests", "20", "--tokens", "8", "--json", str(report))
    found = serve_bench(endpoint, "embedded", *few)
    assert found.returncode == 0, found.stderr + found.stdout
    (run,) = json.loads(report.read_text())["runs"]
    assert (run["load"], run["requests"], run["drift"]) == ("rate=5", 20, 1.0)


def test_without_force_a_text_may_end_by_itself_and_that_is_said(
    endpoint: str, tmp_path: Path
) -> None:
    report = tmp_path / "bench.json"
    few = ("--no-force", "--requests", "40", "--tokens", "64", "--json", str(report))
    found = serve_bench(endpoint, "embedded", *few, "--concurrency", "4")
    (run,) = json.loads(report.read_text())["runs"]
    assert run["counted"] == ["usage"]
    assert run["wrong_lengths"] > 0
    assert f"{run['wrong_lengths']} replies have not the 64 tokens" in found.stdout
    assert found.returncode == (0 if abs(run["drift"] - 1) <= 0.1 else 1)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("embedded", ("--prompt-words", "2000"), f"maximum context length is {CONTEXT} tokens"),
        ("another", (), "The model `another` does not exist"),
    ],
)
def test_refusals_are_quoted(
    endpoint: str, model: str, options: tuple[str, ...], said: str
) -> None:
    found = serve_bench(endpoint, model, "--requests", "2", "--concurrency", "1", *options)
    assert found.returncode == 2
    assert said in found.stderr
