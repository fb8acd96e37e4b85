"""What a server of completions is to whoever puts it under load: requests in, timed replies out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol, Self


@dataclass(frozen=True)
class Request:
    """One request: its number, its prompt (token ids, or text), and how many tokens to generate."""

    number: int
    prompt: tuple[int, ...] | str
    tokens: int


@dataclass(frozen=True)
class Reply:
    """One finished request; all times are seconds by the server's clock.

    Attributes:
        number: of the request.
        sent: when it was sent.
        times: when each chunk arrived, in order.
        counts: how many tokens each chunk brought.
        prompt_tokens: how many tokens the prompt had; None where nobody told.
        cached_tokens: how many of them the server had in a cache of prefixes; None where nobody
            told.
        counted: what `counts` come from: `tokens` (each seen by itself), `usage` (the server's
            count), `length` (the server says that it ended at the length asked for), or `chunks`
            (nothing better was there).
        finish: why it ended, in the server's word; empty where it gave none.
        error: why it failed; else empty.
    """

    number: int
    sent: float
    times: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    counted: str = "tokens"
    finish: str = ""
    error: str = ""

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(self.counts)

    @property
    def ttft(self) -> float:
        """Time to the first token: its arrival less the time of sending."""
        return self.times[0] - self.sent

    @property
    def e2e(self) -> float:
        """From sending to the last token."""
        return self.times[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (n - 1); None for one token."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: times between chunks that follow each other."""
        return [b - a for a, b in pairwise(self.times)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        lists = {key: tuple(fields[key]) for key in ("times", "counts")}
        return cls(**{**fields, **lists})


class Server(Protocol):
    """A server under load, driven by one thread; it has a clock of its own."""

    def now(self) -> float:
        """Seconds; never goes back."""
        ...

    def send(self, request: Request) -> None:
        """Start a request and return at once."""
        ...

    def wait(self, until: float) -> Reply | None:
        """The next reply that is complete or has failed, or None when `now()` reaches `until`.

        Raises:
            EngineError: the server is gone, so that no reply will come any more.
        """
        ...
