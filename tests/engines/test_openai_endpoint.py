"""An OpenAI-compatible endpoint against a scripted server, whose clock only the script moves."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from pytest_qlab.cli import main
from pytest_qlab.engines.openai_endpoint import Endpoint, Stream
from pytest_qlab.engines.server import Reply, Request
from pytest_qlab.errors import EngineError
from pytest_qlab.metrics.load import drive, unique_prompts
from pytest_qlab.metrics.serving import Limits, Load
from tests.engines.completions_server import (
    Exchange,
    Handler,
    SharedClock,
    final,
    serving,
    steady,
    text,
    usage,
    vllm,
)

FOREVER = float("inf")


def ask(
    handle: Handler, *, tokens: int = 4, clock: Callable[[], float] = perf_counter, **options: Any
) -> Reply:
    with serving(handle) as url:
        endpoint = Endpoint(url, "m", clock=clock, **options)
        endpoint.send(Request(3, "Once upon", tokens))
        reply = endpoint.wait(FOREVER)
    assert reply is not None
    assert reply.number == 3
    return reply


def answer(*events: Any, chunked: bool = False) -> Handler:
    def handle(exchange: Exchange) -> None:
        exchange.begin(chunked=chunked)
        for event in events:
            exchange.event(event)
        exchange.end()

    return handle


# Times


def test_the_servers_schedule_comes_out_exactly() -> None:
    clock = SharedClock()
    reply = ask(steady(clock, 0.25, 0.0625), tokens=9, clock=clock)
    assert reply.error == ""
    assert reply.ttft == 0.25
    assert reply.tpot == 0.0625
    assert reply.gaps == [0.0625] * 8
    assert (reply.tokens, reply.prompt_tokens, reply.counted) == (9, 7, "usage")


def test_chunks_of_several_tokens_are_counted_by_usage() -> None:
    clock = SharedClock()
    reply = ask(steady(clock, 0.5, 0.25, per_chunk=[1, 4, 4]), tokens=9, clock=clock)
    assert reply.tokens == 9
    assert reply.tpot == 0.5 / 8
    assert reply.gaps == [0.25, 0.25]


def test_a_driven_endpoint_gives_the_schedules_percentiles() -> None:
    clock = SharedClock()
    with serving(steady(clock, 0.25, 0.0625)) as url:
        endpoint = Endpoint(url, "m", clock=clock)
        run = drive(endpoint, Load(concurrency=1), ["a"], 5, Limits(requests=30, seconds=1e9))
    found, _ = run.estimates("m")
    assert found["serving.ttft.p90[1]"] == 0.25
    assert found["serving.tpot.p90[1]"] == 0.0625
    assert found["serving.tokens_per_second[1]"] == 5 / 0.5


# What is asked, how it is counted


def test_the_request_forces_its_length() -> None:
    seen: list[Exchange] = []

    def handle(exchange: Exchange) -> None:
        seen.append(exchange)
        answer(text("x"), final(2, 1), "[DONE]")(exchange)

    ask(handle, tokens=7, key="secret")
    ask(handle, tokens=7, force=False)
    forced, plain = (each.body for each in seen)
    assert seen[0].path == "/v1/completions"
    assert seen[0].headers["Authorization"] == "Bearer secret"
    assert (forced["max_tokens"], forced["min_tokens"], forced["ignore_eos"]) == (7, 7, True)
    assert forced["temperature"] == 0
    assert forced["stream"] is True
    assert forced["stream_options"]["include_usage"] is True
    assert "min_tokens" not in plain
    assert "ignore_eos" not in plain
    assert plain["max_tokens"] == 7


def test_token_ids_are_sent_as_they_are() -> None:
    assert Endpoint("http://h/v1", "m").body(Request(0, (5, 6), 1))["prompt"] == [5, 6]


@pytest.mark.parametrize("chunked", [False, True])
def test_streams_with_and_without_chunked_encoding(chunked: bool) -> None:
    events = [text("a"), text("b"), final(2, 2), "[DONE]"]
    assert ask(answer(*events, chunked=chunked)).counts == (1, 1)


def test_usage_at_every_chunk_is_exact() -> None:
    reply = ask(
        answer(
            text("a", usage=usage(2, 1)),
            text("bcd", usage=usage(2, 4)),
            text("", usage=usage(2, 5)),  # a token that is no text yet
            {"choices": [{"text": "", "finish_reason": "length"}], "usage": usage(2, 5)},
            "[DONE]",
        )
    )
    assert reply.counts == (1, 3, 1)
    assert reply.counted == "usage"


def test_usage_at_the_end_is_spread_over_the_chunks() -> None:
    reply = ask(answer(text("a"), text("bcd"), text("e"), final(2, 5), "[DONE]"))
    assert reply.tokens == 5
    assert len(reply.counts) == 3


@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_without_usage_a_reply_that_ended_for_its_length_has_it(chunks: int) -> None:
    events = [text("word ")] * chunks
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    reply = ask(answer(*events, end, "[DONE]"), tokens=4)
    assert (reply.tokens, len(reply.times), reply.counted) == (4, chunks, "length")
    assert reply.finish == "length"


def test_without_usage_another_end_tells_no_length() -> None:
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    reply = ask(answer(text("a"), text("b"), end, "[DONE]"), tokens=4)
    assert (reply.tokens, reply.counted, reply.finish) == (2, "chunks", "stop")


def test_without_usage_chunks_are_counted_and_that_is_said() -> None:
    reply = ask(answer(text("a"), text("b"), "[DONE]"))
    assert (reply.counts, reply.counted, reply.prompt_tokens) == ((1, 1), "chunks", None)


def test_comments_names_of_events_and_an_end_without_done_are_understood() -> None:
    def handle(exchange: Exchange) -> None:
        exchange.begin()
        exchange.write(": ping\n\nevent: message\nid: 3\n")
        exchange.write(f"data:{json.dumps(text('a'))}\r\n\r\n")
        exchange.event({"choices": [{"text": "b", "finish_reason": "length"}]})

    assert ask(handle, tokens=2).counts == (1, 1)


@pytest.mark.parametrize("per_step", [1, 3])
def test_vllm_is_forced_to_lengths_that_it_would_not_reach(per_step: int) -> None:
    handle = vllm(eos_after=5, per_step=per_step)
    forced = ask(handle, tokens=12)
    assert (forced.tokens, forced.counted, forced.finish) == (12, "usage", "length")
    assert forced.counts == (per_step,) * (12 // per_step)
    assert forced.prompt_tokens == 2
    free = ask(handle, tokens=12, force=False)
    assert (free.tokens, free.counted, free.finish) == (5, "usage", "stop")
    whole = ask(handle, tokens=5, force=False)
    assert (whole.tokens, whole.finish) == (5, "stop")


def test_a_server_counts_a_reply_that_is_not_streamed() -> None:
    seen: list[dict[str, Any]] = []

    def handle(exchange: Exchange) -> None:
        seen.append(exchange.body)
        exchange.reply({"choices": [{"text": "abc"}], "usage": usage(2, 3)})

    with serving(handle) as url:
        endpoint = Endpoint(url, "m")
        assert endpoint.count(Request(0, "Once upon", 9)) == 3
    (body,) = seen
    assert "stream" not in body
    assert "stream_options" not in body
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"]) == ("Once upon", 9, True)
    with serving(lambda exchange: exchange.reply({"choices": []})) as url:
        assert Endpoint(url, "m").count(Request(0, "a", 9)) is None
    for broken in (lambda e: e.reply([1]), lambda e: e.refuse(503, "overloaded")):
        with serving(broken) as url, pytest.raises(EngineError, match=r"stream: |overloaded"):
            Endpoint(url, "m").count(Request(0, "a", 9))


# What goes wrong


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "--no-force"), (401, "--api-key-env"), (404, "ends in /v1"), (503, "overloaded")],
)
def test_refusals_carry_what_the_server_says_and_a_remedy(status: int, hint: str) -> None:
    reply = ask(lambda exchange: exchange.refuse(status, "overloaded"))
    assert f"answered with HTTP {status}" in reply.error
    assert hint in reply.error


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (["{broken"], "no streamed completion: {broken"),
        (["[1, 2]"], "no streamed completion"),
        ([{"choices": [{"message": {}}]}], "no streamed completion"),
        ([{"object": "list"}], "no streamed completion"),
        ([{"error": {"message": "out of memory"}}], "failed while it generated.*out of memory"),
        (["[DONE]"], "without a token"),
        ([text("a")], "broke the stream off after 1 chunks"),
        ([], "broke the stream off after 0 chunks"),
        ([text("a"), final(2, 0), "[DONE]"], "counted 0 tokens in 1 chunks"),
        (
            [text("a", usage=usage(2, 3)), text("b", usage=usage(2, 1)), "[DONE]"],
            "counted 1 tokens",
        ),
    ],
)
def test_streams_that_are_none(events: list[Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        raise EngineError(ask(answer(*events)).error)


def test_a_server_that_says_nothing_is_given_up() -> None:
    release = threading.Event()

    def silent(exchange: Exchange) -> None:
        release.wait(10)

    reply = ask(silent, timeout=0.05)
    release.set()
    assert "sent nothing for 0.05 seconds" in reply.error


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "m")
    endpoint.send(Request(0, "a", 1))
    reply = endpoint.wait(FOREVER)
    assert reply is not None
    assert "cannot be reached" in reply.error


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://h:port/v1", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(EngineError, match="not the address of an endpoint"):
        Endpoint(url, "m")


def test_waiting_ends_at_its_time() -> None:
    assert Endpoint("http://h/v1", "m", clock=lambda: 5.0).wait(5.0) is None


def test_events_add_up_without_a_server() -> None:
    stream = Stream(3)
    for number in range(3):
        stream.add(json.dumps(text("x")).encode(), 1.0 + number)
    stream.add(b"[DONE]", 9.0)
    assert stream.reply(0, 0.5).times == (1.0, 2.0, 3.0)


# The command


def test_the_command_measures_each_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts: list[str] = []

    def handle(exchange: Exchange) -> None:
        prompts.append(exchange.body["prompt"])
        count = exchange.body["max_tokens"]
        answer(*[text("x")] * count, final(9, count), "[DONE]")(exchange)

    out = tmp_path / "bench.json"
    with serving(handle) as url:
        arguments = f"serve-bench --endpoint {url} --model m --concurrency 1,2 --rate 100"
        lengths = "--requests 6 --tokens 3 --prompt-words 5 --json"
        status = main([*arguments.split(), *lengths.split(), str(out)])
    assert status == 0
    written = json.loads(out.read_text("utf-8"))
    assert (written["schema"], written["version"], written["model"]) == ("qlab-serve-bench", 2, "m")
    assert [run["load"] for run in written["runs"]] == ["1", "2", "rate=100"]
    for run in written["runs"]:
        assert (run["requests"], run["failed"], run["wrong_lengths"], run["drift"]) == (6, 0, 0, 1)
        assert run["prompt_tokens"] == {"least": 9, "median": 9, "most": 9}
        assert f"serving.ttft.p50[{run['load']}]" in run["measures"]
        assert f"serving.ttft.p99[{run['load']}]" in run["missing"]
    table = capsys.readouterr().out
    assert "ttft p99" in table
    assert "too few requests" in table
    assert {len(prompt.split()) for prompt in prompts} == {5}


def test_no_load_sends_what_a_server_may_remember(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither of the same run nor of one before."""
    seen: list[str] = []

    def handle(exchange: Exchange) -> None:
        seen.append(exchange.body["prompt"])
        answer(text("x"), final(9, 1), "[DONE]")(exchange)

    with serving(handle) as url:
        arguments = f"serve-bench --endpoint {url} --model m --concurrency 1,2 --rate 200"
        for _ in range(2):  # 1: over-saturated, on a busy machine
            assert main([*arguments.split(), "--requests", "30", "--tokens", "1"]) in (0, 1)
    assert len(seen) >= 2 * 2 * 30
    assert len({prompt.split()[0] for prompt in seen}) == len(seen)
    # A tokenizer cuts the first word up, and all but a few differ in its first letters.
    assert len({prompt[:4] for prompt in seen}) > 0.9 * len(seen)
    assert "cache of prefixes" not in capsys.readouterr().out


@pytest.mark.parametrize(("cached", "said"), [(None, False), (0, False), (16, False), (40, True)])
def test_what_a_server_had_in_its_cache_is_said(
    cached: int | None, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = final(80, 2)
    last["usage"]["prompt_tokens_details"] = None if cached is None else {"cached_tokens": cached}
    out = tmp_path / "bench.json"
    with serving(answer(text("x"), text("y"), last, "[DONE]")) as url:
        arguments = f"serve-bench --endpoint {url} --model m --concurrency 1 --requests 4"
        assert main([*arguments.split(), "--tokens", "2", "--json", str(out)]) == 0
    (run,) = json.loads(out.read_text("utf-8"))["runs"]
    assert run["cached_share"] == (None if cached is None else cached / 80)
    note = "the server had 50% of the prompts' tokens in a cache of prefixes"
    assert (note in capsys.readouterr().out) == said


def test_the_command_reports_replies_that_are_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "m", "--concurrency", "1", "--requests", "5", "--tokens", "8"]
    with serving(answer(text("x"), text("y"), "[DONE]")) as url:
        status = main(["serve-bench", "--endpoint", url, *arguments])
    assert status == 1
    table = capsys.readouterr().out
    assert "5 replies have not the 8 tokens" in table
    assert "25.0% of them, so that speeds cannot be compared" in table
    assert "chunks are counted as tokens" in table


def cutting(most: int, *, counts: bool = True) -> Handler:
    """As a server without usage in streams, whose context has room for so many tokens."""

    def handle(exchange: Exchange) -> None:
        found = min(most, exchange.body["max_tokens"])
        if not exchange.body.get("stream"):
            exchange.reply({"choices": [], "usage": usage(2, found)} if counts else {})
            return
        end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
        answer(*[text("x ")] * found, end, "[DONE]")(exchange)

    return handle


def test_the_command_holds_a_server_to_its_own_count(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "m", "--concurrency", "1", "--requests", "5", "--tokens", "8"]
    with serving(cutting(8)) as url:
        assert main(["serve-bench", "--endpoint", url, *arguments]) == 0
    assert "so they have the 8 tokens that were asked for" in capsys.readouterr().out
    with serving(cutting(6)) as url:
        assert main(["serve-bench", "--endpoint", url, *arguments]) == 2
    found = capsys.readouterr()
    assert "generates 6 tokens where 8 are asked for" in found.err
    assert "ttft" not in found.out
    with serving(cutting(8, counts=False)) as url:
        assert main(["serve-bench", "--endpoint", url, *arguments]) == 0


def test_the_command_does_not_compare_lengths_that_nothing_tells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", "m", "--concurrency", "1", "--requests", "5", "--tokens", "20"]
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    with serving(answer(*[text("x")] * 19, end, "[DONE]")) as url:
        # 95 % of the tokens, as far as chunks tell.
        assert main(["serve-bench", "--endpoint", url, *arguments]) == 1
    table = capsys.readouterr().out
    assert "nothing says how long 5 of the replies are" in table
    assert "cut them off" not in table
    with serving(answer(*[text("x")] * 20, "[DONE]")) as url:
        assert main(["serve-bench", "--endpoint", url, *arguments]) == 0
    with serving(answer(*[text("x")] * 19, "[DONE]")) as url:
        assert main(["serve-bench", "--endpoint", url, *arguments]) == 1
    assert "5 replies ended early and without a reason" in capsys.readouterr().out


def test_the_command_fails_in_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda exchange: exchange.refuse(500, "no")) as url:
        given = ["serve-bench", "--endpoint", url, "--model", "m"]
        assert main([*given, "--concurrency", "1"]) == 2
        assert "answered with HTTP 500" in capsys.readouterr().err
        monkeypatch.delenv("NO_SUCH_KEY", raising=False)
        assert main([*given, "--api-key-env", "NO_SUCH_KEY"]) == 2
        assert "NO_SUCH_KEY, which is not set" in capsys.readouterr().err
        assert main([*given, "--concurrency", "many"]) == 2
        assert "'many' is not a load" in capsys.readouterr().err


def test_prompts_begin_differently() -> None:
    prompts = unique_prompts(20, 300)
    assert len({prompt.split()[0] for prompt in prompts}) == 300
    assert {len(prompt.split()) for prompt in prompts} == {20}
