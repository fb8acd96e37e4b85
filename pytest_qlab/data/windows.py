"""Token windows cut from documents: the same for every candidate, by named conventions.

Of a window, the tokens `ids[first_scored:]` are scored, each from all tokens before it; the logits
that predict token i stand at position i - 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pytest_qlab.data.text import Document
from pytest_qlab.errors import DataError, did_you_mean
from pytest_qlab.estimate import CONTIGUOUS

CONVENTIONS = ("spread", "gptq2048", "llamacpp512")
SAMPLINGS = ("spread", "contiguous")
SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Of the windows, after which a careful assertion looks at what is known."""
SHORTEST_TAIL = 32
_T = TypeVar("_T")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: Any
    eos_token_id: Any

    def encode(self, text: Any, *, add_special_tokens: bool = True) -> Any:
        """Token ids of a text."""


@dataclass(frozen=True)
class Window:
    """A run of tokens that is scored in one forward.

    Attributes:
        document: index into the set's `documents`.
        ids: token ids, the first being the beginning-of-sequence token where one is used.
        first_scored: index of the first token whose probability counts; at least 1.
    """

    document: int
    ids: tuple[int, ...]
    first_scored: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first_scored


@dataclass(frozen=True)
class WindowSet:
    """The windows that an evaluation runs over.

    Attributes:
        name: what the documents were loaded from, for display.
        convention: how they were cut.
        documents: (id, domain) of each; windows of one document are one cluster in statistics.
        windows: in the order of the documents.
        digest: hex SHA-256 of all that is scored.
    """

    name: str
    convention: str
    documents: tuple[tuple[str, str], ...]
    windows: tuple[Window, ...]
    digest: str

    @property
    def scored(self) -> int:
        """How many tokens are scored in all."""
        return sum(window.scored for window in self.windows)


def make_windows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    convention: str = "spread",
    length: int = 512,
    maximum: int = 64,
    seed: int = 0,
    sampling: str = "spread",
    bos: bool | None = None,
    model_length: int | None = None,
    name: str = "",
) -> WindowSet:
    """Cut documents into windows.

    Conventions:
        spread: each document is cut by itself into windows of `length` tokens that do not overlap,
            each with the beginning-of-sequence token if there is one; a tail is kept if at least
            32 of its tokens are scored.
        gptq2048: the documents joined by blank lines, tokenized once, windows of 2048 tokens (or
            the model's length), the tail dropped; all but a window's first token are scored.
        llamacpp512: as before with 512 tokens, the beginning-of-sequence token put over the first
            of each window, and only the second half scored (255 tokens).

    Of more than `maximum` windows, that many are taken at equal distances over the whole, starting
    at a random one: systematic sampling. With the sampling `contiguous` they are the first ones
    instead, as in other tools; nothing is known of the rest of the text then, and the set's
    convention says so.

    Args:
        documents: what to cut.
        tokenizer: of the model.
        convention: one of the above.
        length: of a window in tokens, with `spread`.
        maximum: how many windows at most; 0 for all.
        seed: of the sampling.
        sampling: `spread` or `contiguous`.
        bos: whether windows begin with the beginning-of-sequence token; by default if the
            tokenizer puts it there.
        model_length: the longest sequence the model takes, if it has a limit.
        name: for the set's display.

    Raises:
        DataError: unknown convention or sampling, impossible length, or too little text for one
            window.
    """
    if convention not in CONVENTIONS:
        raise DataError(
            f"Unknown windowing convention {convention!r}.{did_you_mean(convention, CONVENTIONS)}"
        )
    if sampling not in SAMPLINGS:
        raise DataError(f"Unknown sampling {sampling!r}.{did_you_mean(sampling, SAMPLINGS)}")
    if length < 2 or maximum < 0:
        raise DataError(
            f"Windows of {length} tokens, at most {maximum} of them, cannot be cut: a window has "
            "at least 2 tokens, and the maximum is 0 (all) or more."
        )
    start = _bos(tokenizer) if bos is None else tokenizer.bos_token_id if bos else None
    if bos and start is None:
        raise DataError(
            "Windows were asked for that begin with the beginning-of-sequence token, but the "
            "model's tokenizer has none. Leave the option out."
        )
    if convention == "spread":
        length = min(length, model_length or length)
        names, windows = _spread(documents, tokenizer, length, start)
    else:
        size = 2048 if convention == "gptq2048" else 512
        length = min(size, model_length or size)
        names, windows = _joined(documents, tokenizer, length, start, convention == "llamacpp512")
    if not windows:
        raise DataError(
            f"The text{f' {name!r}' if name else ''} is too short: {len(documents)} documents with "
            f"{sum(len(d.text) for d in documents)} characters in all do not fill one window of "
            f"{length} tokens under the convention {convention!r}. Give more text"
            + (", or use the convention 'spread'." if convention != "spread" else ".")
        )
    if sampling == "spread":
        windows = systematic_sample(windows, maximum, seed)
    else:
        windows = windows[: maximum or None]
        convention += CONTIGUOUS
    digest = digest_of_windows(convention, names, windows)
    return WindowSet(name, convention, tuple(names), tuple(windows), digest)


def digest_of_windows(
    convention: str, documents: Sequence[tuple[str, str]], windows: Sequence[Window]
) -> str:
    """Hex SHA-256 of all that is scored, and of what results are grouped by."""
    content = [convention, [[w.document, w.first_scored, *w.ids] for w in windows], documents]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_windows(given: WindowSet) -> None:
    """Refuse windows, put together by hand, that cannot be scored.

    Raises:
        DataError: there are none, one has no scored token, or one is of no document.
    """
    if not given.windows:
        raise DataError(f"The window set {given.name!r} has no windows. Give at least one.")
    for number, window in enumerate(given.windows):
        if not 1 <= window.first_scored < len(window.ids):
            raise DataError(
                f"Window {number} of {given.name!r} has {len(window.ids)} tokens, of which those "
                f"from {window.first_scored} on would be scored. At least one token is scored, "
                "and none without a token before it: give a first_scored of 1 or more that is "
                "less than the window's length."
            )
        if not 0 <= window.document < len(given.documents):
            raise DataError(
                f"Window {number} of {given.name!r} belongs to document {window.document}, but the "
                f"set has {len(given.documents)}. Number documents from 0."
            )


def systematic_sample(windows: list[_T], maximum: int, seed: int) -> list[_T]:
    """At most `maximum` windows (0: all) at equal distances, from a random start, in order."""
    if maximum == 0 or len(windows) <= maximum:
        return windows
    step = len(windows) / maximum
    start = random.Random(seed).random() * step
    return [windows[min(int(start + i * step), len(windows) - 1)] for i in range(maximum)]


def shares_of(count: int) -> tuple[float, ...]:
    """After which shares of so many windows a careful assertion looks, before it looks at all."""
    return tuple(share for share in SHARES if count * share >= 4 / share)


def looks_of(count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """The order in which windows are drawn: for each look, the numbers of those that it adds.

    The windows of each look and all before it are spread over the whole: an eighth, a quarter, a
    half of them, then all; each of the smaller sets is a systematic sample of the next. A look at a
    share f takes 4 / f windows or more, because the less has been seen, the more has to be proved.

    Args:
        count: of the windows. seed: of the random starts.
    """
    drawn = random.Random(f"looks {seed}")
    nested = [list(range(count))]
    for share in reversed(shares_of(count)):
        size = math.ceil(count * share)
        step = len(nested[0]) / size
        start = drawn.random() * step
        nested.insert(
            0, [nested[0][min(int(start + i * step), len(nested[0]) - 1)] for i in range(size)]
        )
    seen: set[int] = set()
    looks = []
    for numbers in nested:
        looks.append(tuple(number for number in numbers if number not in seen))
        seen.update(numbers)
    return tuple(looks)


def calibration_sequences(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    length: int = 512,
    maximum: int = 128,
    seed: int = 0,
) -> list[list[int]]:
    """Sequences of exactly `length` tokens to calibrate on.

    Documents are shuffled, concatenated with the special tokens the tokenizer puts around a text
    (or else its end-of-sequence token between them), and cut; what does not fill a sequence at the
    end is dropped.

    Raises:
        DataError: there is not enough text for one sequence.
    """
    if length < 1 or maximum < 1:
        raise DataError(
            f"Calibration on {maximum} sequences of {length} tokens is impossible: both numbers "
            "must be at least 1."
        )
    order = list(documents)
    random.Random(seed).shuffle(order)
    start = _bos(tokenizer)
    stream: list[int] = []
    for document in order:
        ids = _encode(tokenizer, document.text)
        if start is not None:
            ids = [start, *ids]
        elif tokenizer.eos_token_id is not None:
            ids = [*ids, int(tokenizer.eos_token_id)]
        stream.extend(ids)
        if len(stream) >= length * maximum:
            break
    count = min(len(stream) // length, maximum)
    if count == 0:
        raise DataError(
            f"The calibration text is too short: {len(documents)} documents with {len(stream)} "
            f"tokens in all do not fill one sequence of {length}. Give more text, or a smaller "
            "calibration length."
        )
    return [stream[i * length : (i + 1) * length] for i in range(count)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def _bos(tokenizer: Tokenizer) -> int | None:
    """The beginning-of-sequence token if the tokenizer puts it before a text."""
    if tokenizer.bos_token_id is None:
        return None
    ids = [int(i) for i in tokenizer.encode("a")]
    bare = _encode(tokenizer, "a")
    bos = int(tokenizer.bos_token_id)
    return bos if ids[:1] == [bos] and ids != bare else None


def _spread(
    documents: Sequence[Document], tokenizer: Tokenizer, length: int, start: int | None
) -> tuple[list[tuple[str, str]], list[Window]]:
    prefix = [start] if start is not None else []
    fresh = length - len(prefix)
    if fresh < 1:
        raise DataError(
            f"A window of {length} tokens has no room beside the beginning-of-sequence token. "
            "Give a longer window."
        )
    windows = []
    for index, document in enumerate(documents):
        ids = _encode(tokenizer, document.text)
        for position in range(0, len(ids), fresh):
            window = Window(index, (*prefix, *ids[position : position + fresh]), 1)
            if len(window.ids) == length or window.scored >= SHORTEST_TAIL:
                windows.append(window)
    return [(document.id, document.domain) for document in documents], windows


def _joined(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    length: int,
    start: int | None,
    second_half: bool,
) -> tuple[list[tuple[str, str]], list[Window]]:
    """Windows over all documents in one; each window is a document of its own in the set."""
    domains = {document.domain for document in documents}
    domain = domains.pop() if len(domains) == 1 else "mixed"
    ids = _encode(tokenizer, "\n\n".join(document.text for document in documents))
    if start is not None:
        ids = [start, *ids]
    names, windows = [], []
    for index in range(len(ids) // length):
        window = ids[index * length : (index + 1) * length]
        if second_half and start is not None:
            window[0] = start
        names.append((f"window-{index + 1}", domain))
        windows.append(Window(index, tuple(window), length // 2 + 1 if second_half else 1))
    return names, windows
