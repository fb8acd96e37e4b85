"""Any server that speaks OpenAI's completions over HTTP: vLLM, llama.cpp's server, and others.

Replies are streamed as server-sent events, so that each chunk's time is known. The number of
generated tokens is forced (`max_tokens`, and `min_tokens` and `ignore_eos` where the server knows
them), and counted by the server's own `usage`, because a chunk may bring several tokens. A server
that sends none with a stream still says whether a reply ended at its length (`finish_reason`).
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from pytest_qlab.engines.server import Reply, Request
from pytest_qlab.errors import EngineError

_SHOWN = 300
_LOOK_EVERY = 1.0


class Endpoint:
    """A model behind `URL/completions`, to be put under load.

    Every request has a thread and a connection of its own.

    Args:
        url: such as `http://localhost:8000/v1`.
        model: its name there.
        timeout: seconds without a byte after which a request has failed.
        force: ask for exactly that many tokens in ways that not every server accepts; without it
            a reply may end early.
        key: sent as a bearer token.
        clock: seconds.

    Raises:
        EngineError: the URL is none of http or https.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        force: bool = True,
        key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _no_url(url) from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _no_url(url)
        self._connect = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._host, self._port = parts.hostname, port
        self._path = f"{parts.path.rstrip('/')}/completions"
        self._url, self._model, self._timeout, self._force = url, model, timeout, force
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._clock = clock
        self._done: queue.Queue[Reply] = queue.Queue()

    def now(self) -> float:
        """Seconds."""
        return self._clock()

    def send(self, request: Request) -> None:
        """Start a request on a thread of its own."""
        threading.Thread(target=self._run, args=(request,), daemon=True).start()

    def wait(self, until: float) -> Reply | None:
        """The next reply, complete or failed, or None at that time."""
        while True:
            left = until - self.now()
            try:
                return self._done.get(timeout=max(0.0, min(left, _LOOK_EVERY)))
            except queue.Empty:
                if left <= 0:
                    return None

    def count(self, request: Request) -> int | None:
        """How many tokens the server generates for a request; None where it does not say.

        By the `usage` of a reply that is not streamed, which servers send that have none in
        streams. It waits for the reply.

        Raises:
            EngineError: the request failed.
        """
        whole = {"stream", "stream_options"}
        body = {key: value for key, value in self.body(request).items() if key not in whole}
        try:
            with self._answered(body) as response:
                usage = json.loads(response.read()).get("usage") or {}
            found = usage.get("completion_tokens")
            return None if found is None else int(found)
        except (OSError, http.client.HTTPException, ValueError, AttributeError, TypeError) as error:
            said = str(error) or type(error).__name__
            raise EngineError(f"{self._url} did not answer without a stream: {said}") from error

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent for a request."""
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        forced = {"min_tokens": request.tokens, "ignore_eos": True} if self._force else {}
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": request.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}
            if self._force
            else {"include_usage": True},
            **forced,
        }

    def _run(self, request: Request) -> None:
        sent = self.now()
        try:
            reply = self._ask(request, sent)
        except TimeoutError:
            reply = self._failed(request, sent, f"sent nothing for {self._timeout:g} seconds")
        except (OSError, http.client.HTTPException) as error:
            said = str(error) or type(error).__name__
            reply = self._failed(request, sent, f"cannot be reached, or broke off: {said}")
        except EngineError as error:
            reply = self._failed(request, sent, str(error))
        self._done.put(reply)

    def _failed(self, request: Request, sent: float, what: str) -> Reply:
        return Reply(request.number, sent, error=f"{self._url} {what}")

    def _ask(self, request: Request, sent: float) -> Reply:
        with self._answered(self.body(request)) as response:
            stream = Stream(request.tokens)
            while not stream.done:
                line = response.readline()
                if not line:
                    break
                if line.startswith(b"data:"):
                    stream.add(line[5:].strip(), self.now())
            return stream.reply(request.number, sent)

    @contextmanager
    def _answered(self, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """The response to that body, if it is none that refuses."""
        connection = self._connect(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("POST", self._path, json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                said = response.read(4 * _SHOWN).decode(errors="replace").strip()
                raise EngineError(_refusal(response.status, response.reason, said, self._force))
            yield response
        finally:
            connection.close()


class Stream:
    """The events of one streamed completion, as they come.

    Args:
        asked: how many tokens were asked for.
    """

    def __init__(self, asked: int) -> None:
        self.done = False
        self._asked = asked
        self._finish = ""
        self._times: list[float] = []
        self._seen: list[int | None] = []
        self._usage: Mapping[str, Any] = {}

    def add(self, data: bytes, time: float) -> None:
        """Take over the data of one event, which came at that time.

        Raises:
            EngineError: it is no completion, or the server says that it has failed.
        """
        if data == b"[DONE]":
            self.done = True
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise EngineError(f"failed while it generated: {_cut(event['error'])}")
            usage = event.get("usage") or {}
            total = None if not usage else int(usage["completion_tokens"])
            for choice in event["choices"]:
                self._finish = str(choice.get("finish_reason") or self._finish)
                text = choice["text"]
                known = next((n for n in reversed(self._seen) if n is not None), 0)
                grew = total is not None and total > known
                # A token may be no text yet, as a part of a character; an end brings no token.
                if text or grew or (total is None and choice.get("finish_reason") is None):
                    self._times.append(time)
                    self._seen.append(total)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                "sent an event that is no streamed completion: "
                f"{_cut(data.decode(errors='replace'))}. A server with OpenAI's /v1/completions is "
                "expected."
            ) from error
        self._usage = usage or self._usage

    def reply(self, number: int, sent: float) -> Reply:
        """The reply that the events add up to.

        Without `usage`, a reply that the server ended for its length has the length asked for;
        of another, each chunk is counted as a token.

        Raises:
            EngineError: the stream broke off, or brought no token.
        """
        if not self.done and not self._finish:
            raise EngineError(f"broke the stream off after {len(self._times)} chunks")
        if not self._times:
            raise EngineError("ended the stream without a token")
        chunks = len(self._times)
        total, counted = self._usage.get("completion_tokens"), "usage"
        if total is None:
            counted = "chunks"
            if self._finish == "length":
                total, counted = self._asked, "length"
        counts = [1] * chunks
        if total is not None and None not in self._seen:
            # The server counted at every chunk.
            known = [0, *(n for n in self._seen if n is not None)]
            counts = [b - a for a, b in pairwise(known)]
        elif total is not None and total != chunks:
            counts = [total * (n + 1) // chunks - total * n // chunks for n in range(chunks)]
        if sum(counts) < 1 or min(counts) < 0:
            raise EngineError(f"counted {total} tokens in {chunks} chunks that brought text")
        return Reply(
            number,
            sent,
            times=tuple(self._times),
            counts=tuple(counts),
            prompt_tokens=self._usage.get("prompt_tokens"),
            cached_tokens=self._cached(),
            counted=counted,
            finish=self._finish,
        )

    def _cached(self) -> int | None:
        details = self._usage.get("prompt_tokens_details")
        return details.get("cached_tokens") if isinstance(details, Mapping) else None


def _no_url(url: str) -> EngineError:
    return EngineError(
        f"{url!r} is not the address of an endpoint. Give one such as http://localhost:8000/v1, "
        "below which the server has /completions."
    )


def _refusal(status: int, reason: str, said: str, force: bool) -> str:
    hint = ""
    if status == 404:
        hint = " Is the path right (mostly it ends in /v1), and the model's name?"
    elif status in (401, 403):
        hint = " Name the variable that holds its key with --api-key-env."
    elif status in (400, 422) and force:
        hint = " If it does not know min_tokens or ignore_eos, pass --no-force."
    return f"answered with HTTP {status} {reason}: {_cut(said) or 'nothing more'}.{hint}"


def _cut(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
