"""Putting a server under load: closed and open loop, which stop by themselves.

A closed loop has k clients, each of which sends its next request when its last is complete. An open
loop sends at the times of a Poisson process, whatever the server does; there the time of sending is
the time that was drawn. Requests are measured by their number, not by whether they were fast enough
to finish: the first ones are a warm-up, then a given number counts, and the load is kept up until
the last of those is complete.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pytest_qlab.engines.server import Reply, Request, Server
from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.metrics.serving import Limits, Load, ServingRun
from pytest_qlab.stats.trend import is_growing

Prompt = tuple[int, ...] | str
_SATURATION_FROM = 40
_SATURATION_EVERY = 20
_PATIENCE = 4.0


def drive(
    server: Server,
    load: Load,
    prompts: Sequence[Prompt],
    tokens: int,
    limits: Limits | None = None,
    *,
    seed: int = 0,
) -> ServingRun:
    """Put a server under a load until enough requests are complete.

    Args:
        prompts: taken in turn, one a request.
        tokens: how many each request generates.
        seed: of the Poisson process.

    Raises:
        NotMeasuredError: the time ran out before any request that counts was sent, or complete.
        MetricError: more requests failed than the limits allow, or no prompt was given.
        EngineError: the server is gone.
    """
    if not prompts or tokens < 1:
        raise MetricError("A load needs a prompt and at least one token to generate.")
    return _Driver(server, load, prompts, tokens, limits or Limits(), seed).run()


def check_lengths(
    run: ServingRun, prompts: Sequence[Prompt], count: Callable[[Request], int | None]
) -> None:
    """Hold a server that says its replies ended at their length to its own count of one.

    A server may cut replies to what its context has room for, and say the same of them; theirs
    would be the fewest chunks.

    Args:
        prompts: as given to `drive`.
        count: how many tokens the server generates for a request; None where it does not say.

    Raises:
        MetricError: it generates another number than was asked for.
        EngineError: it does not answer.
    """
    claimed = [each for each in run.measured if each.counted == "length"]
    if not claimed:
        return
    shortest = min(claimed, key=lambda each: len(each.times))
    prompt = prompts[shortest.number % len(prompts)]
    found = count(Request(shortest.number, prompt, run.tokens))
    if found is not None and found != run.tokens:
        raise MetricError(
            f"The load {run.load} was not measured: the server ends replies for their length, but "
            f"by its own count generates {found} tokens where {run.tokens} are asked for. Its "
            "context may have no room for more: give it a longer one (--n_ctx of "
            "llama-cpp-python's server), or ask for fewer --tokens or --prompt-words."
        )


def unique_prompts(words: int, count: int = 2000, *, run: str = "") -> list[str]:
    """Prose of so many words, each with another beginning, so that no cache of prefixes helps.

    Args:
        run: prompts of another run begin differently, too: a server remembers those of the last.

    Raises:
        MetricError: fewer than 1 word is asked for.
    """
    from pytest_qlab.data.text import load_documents

    if words < 1:
        raise MetricError(f"A prompt has 1 word or more, not {words}.")
    documents = load_documents("prose", split="evaluation")
    text = " ".join(document.text for document in documents).split()
    starts = (number * words % max(1, len(text) - words) for number in range(count))
    return [
        " ".join([_beginning(run, number), *text[start : start + words - 1]][:words])
        for number, start in enumerate(starts)
    ]


def _beginning(run: str, number: int) -> str:
    """A word that differs from others in its first letters, by which a cache would find them."""
    return f"{hashlib.sha256(f'{run}/{number}'.encode()).hexdigest()[:8]}-{number}"


class _Driver:
    def __init__(
        self,
        server: Server,
        load: Load,
        prompts: Sequence[Prompt],
        tokens: int,
        limits: Limits,
        seed: int,
    ) -> None:
        self._server, self._load = server, load
        self._prompts, self._tokens, self._limits = prompts, tokens, limits
        # The first round of a closed loop comes all at once, which later ones do not.
        self._first = limits.warmup if limits.warmup is not None else 2 * (load.concurrency or 4)
        self._last = self._first + limits.requests
        self._stopped = "requests"
        self._due: dict[int, float] = {}
        self._replies: dict[int, Reply] = {}
        self._sent = self._failed = 0
        self._in_flight: list[tuple[float, int]] = []
        self._started = server.now()
        self._arrivals = None if load.rate is None else self._poisson(load.rate, seed)

    def _poisson(self, rate: float, seed: int) -> Iterator[float]:
        draw, time = random.Random(seed), self._started
        while True:
            time += draw.expovariate(rate)
            yield time

    def run(self) -> ServingRun:
        if self._arrivals is None:
            for _ in range(self._load.concurrency or 1):
                self._send(self._server.now())
            self._until_done(None)
        else:
            self._until_done(self._arrivals)
        if self._stopped != "over-saturated":
            while len(self._replies) < self._sent:  # Their tokens count in the rate of tokens.
                self._receive(self._give_up_at)
        found = ServingRun(
            load=self._load,
            tokens=self._tokens,
            replies=tuple(self._replies[number] for number in sorted(self._replies)),
            first=self._first,
            last=self._last,
            stopped=self._stopped,
        )
        if not found.measured and not found.saturated:
            raise MetricError(
                f"The load {self._load} was not measured: none of its {self._sent} requests "
                f"brought a token. {next((each.error for each in found.replies if each.error), '')}"
            )
        return found

    @property
    def _give_up_at(self) -> float:
        return self._started + _PATIENCE * self._limits.seconds

    def _until_done(self, arrivals: Iterator[float] | None) -> None:
        due = next(arrivals) if arrivals is not None else None
        missing = set(range(self._first, self._last))
        end = self._started + self._limits.seconds
        while missing:
            if self._server.now() >= end and self._stopped == "requests":
                self._cut_off()
                missing &= set(range(self._first, self._last))
                continue
            until = self._give_up_at if self._stopped == "seconds" else end
            reply = self._receive(until if due is None else min(due, until))
            if reply is not None:
                missing.discard(reply.number)
                if arrivals is None and missing:
                    self._send(self._server.now())
            if arrivals is not None and due is not None and due <= self._server.now():
                self._send(due)
                due = next(arrivals)
                if self._is_over_saturated():
                    self._stopped = "over-saturated"
                    return

    def _cut_off(self) -> None:
        """Count only what was sent within the time; it is waited for."""
        self._stopped = "seconds"
        self._last = min(self._last, self._sent)
        if self._last <= self._first:
            raise NotMeasuredError(
                f"The load {self._load} was not measured: in {self._limits.seconds:g} seconds only "
                f"{self._sent} requests were sent, and the first {self._first} are a warm-up. "
                "Allow more seconds, ask for fewer tokens, or raise the rate."
            )

    def _send(self, due: float) -> None:
        number = self._sent
        self._due[number] = due
        self._in_flight.append((due, self._sent - len(self._replies)))
        self._sent += 1
        prompt = self._prompts[number % len(self._prompts)]
        self._server.send(Request(number, prompt, self._tokens))

    def _receive(self, until: float) -> Reply | None:
        reply = self._server.wait(until)
        if reply is None:
            if self._server.now() >= self._give_up_at:
                raise NotMeasuredError(
                    f"The load {self._load} was not measured: {self._sent - len(self._replies)} "
                    f"requests were still in flight {_PATIENCE:g} times as long as the limit of "
                    f"{self._limits.seconds:g} seconds. The server does not keep up: lower the "
                    "load, ask for fewer tokens, or allow more seconds."
                )
            return None
        if self._arrivals is not None:
            # Who sends late must not hide how long the request has waited.
            reply = replace(reply, sent=self._due[reply.number])
        self._replies[reply.number] = reply
        self._failed += bool(reply.error)
        if self._failed > self._limits.failures:
            raise MetricError(
                f"{self._failed} of {self._sent} requests failed, and {self._limits.failures} were "
                f"allowed. The last one: {reply.error}"
            )
        return reply

    def _is_over_saturated(self) -> bool:
        """Whether both the time to the first token and the requests in flight grow with time."""
        counted = self._in_flight[self._first :]
        if len(counted) < _SATURATION_FROM or len(counted) % _SATURATION_EVERY:
            return False
        replies = [self._replies[number] for number in sorted(self._replies)]
        first = [(r.sent, r.ttft) for r in replies if r.number >= self._first and not r.error]
        return len(first) >= _SATURATION_FROM // 2 and all(
            is_growing([time for time, _ in series], [value for _, value in series])
            for series in (counted, first)
        )
