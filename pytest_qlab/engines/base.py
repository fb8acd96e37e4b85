"""What another project's runtime offers, with one quantized model open in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """A greedy generation, timed by the engine's process.

    Attributes:
        tokens: what was generated, in order.
        first_ns: nanoseconds from an empty cache to the first token.
        rest_ns: nanoseconds from the first token to the last.
    """

    tokens: tuple[int, ...]
    first_ns: int
    rest_ns: int


@dataclass(frozen=True)
class EngineLoad:
    """One load in a fresh process of the runtime, timed by that process, in seconds.

    Attributes:
        load: from a started process, its libraries imported, to a model that can generate, a byte
            of every page of its file read.
        first: the first token of the first call after that.
        steady: the same of the calls after that.
        token: which token that is.
    """

    load: float
    first: float
    steady: tuple[float, ...]
    token: int


class Engine(Protocol):
    """A runtime that works in a process of its own, so that its crash is an error here.

    Whatever it does may raise `EngineError`. Attributes that are counters cover the life of the
    engine's process, and are those of its latest answer.
    """

    @property
    def name(self) -> str:
        """The runtime and its version, such as `llama.cpp 0.3.36`."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        ...

    @property
    def context(self) -> int:
        """The longest window that can be run, in tokens."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the key-value cache, as the runtime keeps it by default."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that are open."""
        ...

    @property
    def peak_memory(self) -> int:
        """The most bytes that the engine's process has had resident, the model's file included."""
        ...

    @property
    def idle_memory(self) -> int:
        """What that was before a model was opened: the process itself."""
        ...

    @property
    def cpu_ns(self) -> int:
        """CPU time of the engine's process, nanoseconds."""
        ...

    @property
    def switches(self) -> int:
        """How often the kernel took a core from the engine's process."""
        ...

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Tensor]:
        """Predictions for the tokens ids[first + 1:], from an empty cache.

        Yields:
            float32 [k, vocabulary], in order; together the positions first .. len(ids) - 2, of
            which position t predicts the token at t + 1.
        """
        ...

    def prefill(self, ids: Sequence[int]) -> None:
        """Run all of `ids` from an empty cache up to the next token's logits; for timing.

        Runs as the runtime does by default, where `logits` runs as exactly as it can.
        """
        ...

    def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold exactly `ids`; before `decode`, and as `prefill` runs."""
        ...

    def decode(self, token: int) -> None:
        """Run one more token up to the logits after it, and keep it in the cache; for timing."""
        ...

    def generate(self, ids: Sequence[int], tokens: int) -> Generated:
        """Exactly that many greedy tokens after `ids`, from an empty cache; as `prefill` runs.

        No token ends it. Times are taken where the tokens are made.
        """
        ...

    def close(self) -> None:
        """End the engine's process; a second call does nothing."""
        ...

    def __enter__(self) -> Self:
        """The engine itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        ...
