"""End to end: loading, first generation, throughput, serving. Nothing depends on a duration."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig

from pytest_qlab.engines.server import Reply, Request
from pytest_qlab.errors import MetricError, NotMeasuredError, QlabError
from pytest_qlab.measuring import endtoend, loading, loadtimes, runnable
from pytest_qlab.measuring.alone import load_as_run
from pytest_qlab.measuring.pagecache import cached_share, drop_from_cache
from pytest_qlab.measuring.runnable import packed_job
from pytest_qlab.measuring.speed import text_tokens
from pytest_qlab.metrics import throughput
from tests.architectures import CONTEXT, llama, token_ids
from tests.lab.tiny import tiny_lab


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "QUIET_CPU_SHARE", 0.0)
    monkeypatch.setattr(endtoend, "ROUNDS", 6)
    monkeypatch.setattr(endtoend, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(endtoend, "NEW_TOKENS", 3)


# Throughput


def test_throughput_is_paired_kept_and_named(tmp_path: Path, quick: None) -> None:
    lab = tiny_lab(tmp_path)
    found = lab.candidate("rtn").throughput
    assert found.prefill > 0
    assert found.decode.convention == "12+3 tokens, one request"
    assert found.decode.simulated
    assert found.decode_ratio > 0
    assert len(found.paired.rounds) == 6
    assert "throughput.decode" in lab.candidate("rtn").measured

    again = tiny_lab(tmp_path)
    assert again.candidate("rtn")["throughput.decode"] == found.decode
    assert again.store.built == {}


def test_a_generation_goes_on_after_an_end_of_sequence_and_times_itself() -> None:
    model: Any = llama()
    ids = token_ids(10)
    with torch.no_grad():
        model.generation_config.eos_token_id = int(model(ids).logits[0, -1].argmax())
    ticks = itertools.count()
    # Ticks: the start, the prompt, then each token.
    assert endtoend.generation(model, ids, 5, lambda: next(ticks))() == (2, 4)


def test_a_generation_that_ends_early_is_an_error() -> None:
    model: Any = llama()
    model.generation_config.max_time = 0.0
    with pytest.raises(MetricError, match="1 tokens, and 5 were asked"):
        endtoend.generation(model, token_ids(10), 5)()


@pytest.mark.parametrize(("prompt", "tokens"), [(128, 32), (4, 2), (10_000, 10_000)])
def test_lengths_fit_the_context(tmp_path: Path, prompt: int, tokens: int) -> None:
    ours, new = endtoend._lengths(tiny_lab(tmp_path), prompt, tokens)
    assert ours + new == min(prompt + tokens, CONTEXT)
    assert new >= 2
    assert ours >= new or (prompt, tokens) == (10_000, 10_000)


# Loading


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("llama", "none"),
        ("llama", "rtn"),
        ("llama", "dynamic"),
        ("gemma", "rtn"),
        ("gpt2", "rtn"),
        ("mixtral", "rtn"),
    ],
)
def test_what_a_process_loads_is_what_runs(tmp_path: Path, architecture: str, method: str) -> None:
    """The model whose latency is measured: its dtype, its kernels, its numbers."""
    lab = tiny_lab(tmp_path / "store", architecture)
    candidate = lab.candidate(method)
    with packed_job(candidate) as job:
        assert job["dtype"] == str(next(lab.speed_base.parameters()).dtype).split(".")[1]
        loaded: Any = load_as_run(job, AutoConfig.from_pretrained(job["config"]))
    expected = candidate.speed_model
    kinds = {name: type(module) for name, module in expected.named_modules()}
    for name in candidate.checkpoint.layers():
        assert type(loaded.get_submodule(name)) is kinds[name], name
    ids = token_ids(16)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


@pytest.mark.slow
def test_loads_happen_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadtimes, "REPEATS", 1)
    monkeypatch.setattr(loadtimes, "MEDIAN_SAMPLES", 1)
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("rtn")
    found = candidate.load
    assert found.warm > 0
    assert candidate.first_generation > 0
    assert candidate["load.warm"] == found.warm
    stored = next(iter(lab.store.entries("loading")))
    answer = lab.store.peek("loading", stored)["warm"][0]
    ids = torch.tensor([text_tokens(lab, lab.model.fitting(128))])
    assert answer["token"] == loading.generate_one(candidate.speed_model, ids[:, :CONTEXT])
    runs = f"{runnable.dtype_name(lab.speed_base)}, {candidate.kernels}"
    assert found.warm.convention == f"fresh process, {runs}"
    assert len(answer["steady"]) == loading.STEADY


def answers(monkeypatch: pytest.MonkeyPatch, loads: list[float]) -> list[dict[str, Any]]:
    """Instead of processes: loads take the given times."""
    given: list[dict[str, Any]] = []
    times = iter(loads)

    def answer(candidate: str, what: dict[str, Any]) -> dict[str, Any]:
        given.append(what)
        load = next(times)
        return {"load": load, "first": load / 10, "steady": [0.001], "token": 1}

    monkeypatch.setattr(loadtimes, "_loaded", answer)
    return given


def test_cold_and_warm_loads_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = answers(monkeypatch, [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 1.5, 6.0, 2.5, 10.0, 4.0])
    monkeypatch.setattr(loadtimes, "make_cold", lambda files: "")
    found = tiny_lab(tmp_path).candidate("rtn").load
    # Of six loads: the lower median, and the extremes as its bounds.
    assert (found.cold, found.cold.lower, found.cold.upper) == (7.0, 5.0, 10.0)
    assert (found.warm, found.warm.lower, found.warm.upper) == (2.0, 1.0, 4.0)
    assert "5 to 10 s in 6 loads" in found.cold.detail
    # Of all twelve, the third from either end: 2 * P(Binomial(12, 1/2) <= 2) = 3.9 %.
    first = found.first_generation
    assert (first, first.lower, first.upper) == (0.4, 0.2, 0.8)
    assert "in the steady state 1 ms" in first.detail
    assert {len(each["ids"]) for each in given} == {CONTEXT}


def test_a_cold_load_is_refused_where_the_cache_cannot_be_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(loadtimes, "cached_share", lambda file: 1.0)
    candidate = tiny_lab(tmp_path).candidate("rtn")
    assert candidate.load.warm == 3.0
    with pytest.raises(NotMeasuredError, match=r"100% of model\.safetensors stayed in memory"):
        candidate["load.cold"]


def test_cold_loads_that_are_too_few_to_bound_their_median_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, [1.0] * 11)
    reasons = iter(["", "", "", "", "", "a process has mapped it."])
    monkeypatch.setattr(loadtimes, "make_cold", lambda files: next(reasons))
    candidate = tiny_lab(tmp_path).candidate("rtn")
    assert candidate.load.warm == 1.0
    with pytest.raises(NotMeasuredError, match="a process has mapped it"):
        candidate.load.cold  # noqa: B018


def test_loads_that_take_too_long_are_no_measurement_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, [1.0] * 12)
    monkeypatch.setattr(loadtimes, "make_cold", lambda files: "")
    times = iter([0.0, 0.0, 1000.0, 1799.0, 1800.0])
    monkeypatch.setattr(loadtimes, "monotonic", lambda: next(times))
    candidate = tiny_lab(tmp_path).candidate("rtn")
    with pytest.raises(NotMeasuredError, match=r"3 loads were made in 1800 seconds.*takes 6"):
        candidate.load  # noqa: B018
    monkeypatch.undo()
    assert not list(candidate.lab.store.entries("loading"))


def test_what_has_no_file_is_never_cold() -> None:
    assert "no file" in loadtimes.make_cold([])


def test_a_system_that_does_not_tell_gives_no_cold_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadtimes, "cached_share", lambda file: None)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    assert "does not tell" in loadtimes.make_cold([file])


def test_a_child_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(MetricError, match="ended with status 1: nothing was printed"):
        loadtimes._loaded("c", {})


def test_files_leave_the_page_cache_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 4096)
    drop_from_cache(file)
    share = cached_share(file)
    if share is None or share == 1.0:
        pytest.skip("this file system keeps files in memory, or the system does not tell")
    assert share == 0.0
    assert loadtimes.make_cold([file]) == ""
    file.read_bytes()
    assert cached_share(file) == 1.0
    empty = tmp_path / "empty"
    empty.touch()
    assert cached_share(empty) == 0.0


def test_pages_that_are_mapped_are_touched() -> None:
    for tensor in (torch.zeros(0), torch.ones(3), torch.ones(5000, dtype=torch.bool)):
        loading.touch(tensor)


# Serving


def test_serving_is_kept_and_named_by_its_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endtoend, "waited_ns", lambda: 0)
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("rtn")
    found = candidate.serving(2, prompt_tokens=8, new_tokens=3, requests=6, max_seconds=600)
    assert len(found.run.measured) == 6
    assert {reply.tokens for reply in found.run.replies} == {3}
    assert {reply.prompt_tokens for reply in found.run.replies} == {8}
    assert found.ttft.p50 > 0
    assert found.tpot.p50 > 0
    assert found.tokens_per_second > 0
    assert found.ttft.p50.simulated
    assert found.ttft.p50.convention == "closed2, 8+3 tokens"
    assert candidate["serving.ttft.p50[2]"] == found.ttft.p50
    with pytest.raises(MetricError, match="needs 299 requests"):
        found.ttft.p99  # noqa: B018

    again = tiny_lab(tmp_path)
    kept = again.candidate("rtn").serving(
        2, prompt_tokens=8, new_tokens=3, requests=6, max_seconds=600
    )
    assert kept.run == found.run
    assert again.store.built == {}


class Instant:
    """A server whose replies come one second after another."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waiting: list[Request] = []

    def now(self) -> float:
        return self.time

    def send(self, request: Request) -> None:
        self.waiting.append(request)

    def wait(self, until: float) -> Reply | None:
        if not self.waiting or self.time + 1 > until:
            self.time = max(self.time, until)
            return None
        self.time += 1
        request = self.waiting.pop(0)
        times = tuple(self.time + number / 1024 for number in range(request.tokens))
        return Reply(request.number, self.time - 1, times, (1,) * request.tokens)


class Serve:
    """In the place of continuous batching; what it was asked for is kept."""

    asked: ClassVar[list[tuple[int, int, int]]] = []

    def __init__(self, model: object, *, requests: int, prompt: int, tokens: int) -> None:
        self.asked.append((requests, prompt, tokens))

    def __enter__(self) -> Instant:
        return Instant()

    def __exit__(self, *error: object) -> None: ...


def test_a_disturbed_server_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endtoend, "continuous_batching", Serve)
    waited = iter([0, 10**15, 0, 0])  # By far more than the time that this test takes; then none.
    monkeypatch.setattr(endtoend, "waited_ns", lambda: next(waited))
    candidate = tiny_lab(tmp_path).candidate("rtn")
    with pytest.raises(NotMeasuredError, match="other processes held the CPU"):
        candidate.serving(2)
    assert candidate.serving(2).ttft.p50 == 1.0, "a disturbance was remembered"


def test_the_wait_for_a_core_is_that_of_all_threads(tmp_path: Path) -> None:
    for thread, line in (("1", "900 250 3\n"), ("2", "70 50 1\n")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(line)
    (tmp_path / "3").mkdir()
    assert endtoend.waited_ns(tmp_path) == 300
    assert endtoend.waited_ns(tmp_path / "none") == 0


def test_names_of_measures_lead_to_their_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Serve.asked
    asked.clear()
    monkeypatch.setattr(endtoend, "continuous_batching", Serve)
    monkeypatch.setattr(endtoend, "waited_ns", lambda: 0)
    candidate = tiny_lab(tmp_path).candidate("rtn")
    prompt, tokens = endtoend._lengths(candidate.lab, 64, 32)
    assert candidate["serving.ttft.p50[1]"] == 1.0
    assert asked == [(1, prompt, tokens)]
    assert candidate.serving().ttft.p50 == 1.0
    assert candidate["serving.tpot.p50[rate=0.25]"] == 1 / 1024
    assert asked[-1] == (endtoend.OPEN_LOOP_BATCH, prompt, tokens)
    with pytest.raises(MetricError, match=r"serving\.ttft\.p50\[4\]"):
        candidate["serving.ttft.p50"]


# What cannot be measured


@pytest.mark.parametrize("metric", ["throughput.decode", "load.warm", "serving.ttft.p50[1]"])
def test_simulated_speed_can_be_refused(tmp_path: Path, metric: str) -> None:
    for policy, error in (("skip", NotMeasuredError), ("fail", MetricError)):
        lab = tiny_lab(tmp_path, simulated_latency=policy)
        with pytest.raises(error, match="would need W4 matmul"):
            lab.candidate("rtn")[metric]


def test_another_runtime_is_pointed_to_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = tiny_lab(tmp_path).candidate("rtn")
    monkeypatch.setattr(type(candidate.method), "engine", lambda *given, **options: None)
    with pytest.raises(QlabError, match="qlab serve-bench"):
        candidate.serving(2)
