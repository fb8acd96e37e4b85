"""A server of OpenAI's completions on this machine that follows a script, on a clock of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handler = Callable[["Exchange"], None]


class SharedClock:
    """Time stands still until the server moves it; reads by request threads are counted."""

    def __init__(self) -> None:
        self.time = 0.0
        self._reads = 0
        self._changed = threading.Condition()

    def __call__(self) -> float:
        with self._changed:
            if threading.current_thread() is not threading.main_thread():
                self._reads += 1
                self._changed.notify_all()
            return self.time

    @contextmanager
    def read_once_after(self, seconds: float) -> Iterator[None]:
        """Move on; what the block sends is stamped before this returns."""
        with self._changed:
            self.time += seconds
            reads = self._reads
        yield
        with self._changed:
            assert self._changed.wait_for(lambda: self._reads > reads, timeout=60)


class Exchange:
    """One request, and ways to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.body = body
        self.path = handler.path
        self.headers = handler.headers
        self._handler = handler

    def refuse(self, status: int, text: str) -> None:
        self._handler.send_response(status)
        self._handler.end_headers()
        self._handler.wfile.write(text.encode())

    def reply(self, value: Any) -> None:
        """An answer that is not streamed."""
        self._handler.send_response(200)
        self._handler.send_header("Content-Type", "application/json")
        self._handler.end_headers()
        self._handler.wfile.write(json.dumps(value).encode())

    def begin(self, *, chunked: bool = False) -> None:
        self._chunked = chunked
        self._handler.send_response(200)
        self._handler.send_header("Content-Type", "text/event-stream")
        if chunked:
            self._handler.send_header("Transfer-Encoding", "chunked")
        self._handler.end_headers()

    def write(self, text: str) -> None:
        data = text.encode()
        if self._chunked:
            data = f"{len(data):x}\r\n".encode() + data + b"\r\n"
        self._handler.wfile.write(data)
        self._handler.wfile.flush()

    def event(self, event: Any) -> None:
        self.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n")

    def end(self) -> None:
        if self._chunked:
            self._handler.wfile.write(b"0\r\n\r\n")
            self._handler.wfile.flush()


def text(value: str, **more: Any) -> dict[str, Any]:
    """A chunk of a streamed completion."""
    return {"choices": [{"index": 0, "text": value, "finish_reason": None}], **more}


def usage(prompt: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def final(prompt: int, tokens: int) -> dict[str, Any]:
    """The last chunk, which brings the usage and no choice."""
    return {"choices": [], "usage": usage(prompt, tokens)}


def steady(
    clock: SharedClock, first: float, step: float, *, per_chunk: Sequence[int] = ()
) -> Handler:
    """Tokens at fixed times: the first after `first` seconds, then one each `step`.

    `per_chunk`: instead of one, so many tokens in each chunk, `step` apart.
    """

    def handle(exchange: Exchange) -> None:
        counts = list(per_chunk) or [1] * exchange.body["max_tokens"]
        exchange.begin()
        for number, count in enumerate(counts):
            with clock.read_once_after(step if number else first):
                exchange.event(text("word " * count))
        with clock.read_once_after(0):
            exchange.event(final(7, sum(counts)))
        with clock.read_once_after(0):
            exchange.event("[DONE]")

    return handle


def vllm(*, eos_after: int, per_step: int = 1) -> Handler:
    """As vLLM answers a prompt after which its model ends the text by itself.

    After vllm 0.32.0, entrypoints/openai/completion/serving.py: `ignore_eos` and `min_tokens` are
    obeyed, counts come with the stream only where `stream_options` asks for them, and the chunk
    with the last text has the reason of the end.
    """

    def handle(exchange: Exchange) -> None:
        body = exchange.body
        least, most = body.get("min_tokens", 0), body["max_tokens"]
        if least > most:
            exchange.refuse(400, f"min_tokens must be less than or equal to max_tokens={most}")
            return
        end = most if body.get("ignore_eos") else min(most, max(least, eos_after))
        reason = "stop" if end == eos_after and not body.get("ignore_eos") else "length"
        options = body.get("stream_options") or {}
        exchange.begin(chunked=True)
        for known in [*range(per_step, end, per_step), end]:
            chunk = text("word " * per_step)
            if known == end:
                chunk["choices"][0]["finish_reason"] = reason
            if options.get("include_usage") and options.get("continuous_usage_stats"):
                chunk["usage"] = usage(2, known)
            exchange.event(chunk)
        if options.get("include_usage"):
            exchange.event(final(2, end))
        exchange.event("[DONE]")
        exchange.end()

    return handle


@contextmanager
def serving(handle: Handler) -> Iterator[str]:
    """The URL of a server that answers every request by `handle`."""

    class Served(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        close_connection = True

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            handle(Exchange(self, json.loads(self.rfile.read(length))))
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
