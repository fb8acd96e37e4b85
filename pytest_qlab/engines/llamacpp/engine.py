"""llama.cpp with one GGUF file open in it, and its quantizer."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from pytest_qlab.engines.base import EngineLoad, Generated
from pytest_qlab.engines.llamacpp.process import Child
from pytest_qlab.errors import EngineError

if TYPE_CHECKING:
    from pytest_qlab.engines.llamacpp.process import Fields

# What a very slow and busy machine does in a second; time limits follow from them.
_OPERATIONS, _QUANTIZED_WEIGHTS, _READ_BYTES = 1e9, 1e5, 1e7


class LlamaCppEngine:
    """An `Engine`: a child process in which llama.cpp has opened a GGUF file.

    Calls from several threads take turns. Logits have the same bits in every run and with any
    number of threads, on one kind of processor.

    Args:
        file: the GGUF file.
        threads: that an operation in llama.cpp may use; they do not change results.
        patience: every limit on time is multiplied by it.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        EngineError: it cannot be loaded, or cannot open the file.
    """

    def __init__(self, file: Path, *, threads: int = 1, patience: float = 1.0) -> None:
        self._file = Path(file).absolute()
        self._turn = threading.Lock()
        self._holder: int | None = None
        self._child = Child(patience=patience)
        try:
            started = self._child.ask("loading its library", {"do": "start"})
            self._facts = self._open(threads)
        except BaseException:
            self._child.close()
            raise
        self._name = f"llama.cpp {started['version']}"
        self._idle_memory = int(started["idle_memory"])

    def _open(self, threads: int) -> Fields:
        return self._child.ask(
            f"opening {self._file}",
            {"do": "open", "file": str(self._file), "threads": threads},
            seconds=_size_of(self._file) / _READ_BYTES,
        )

    @property
    def name(self) -> str:
        """The version of llama-cpp-python that it is."""
        return self._name

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        return int(self._facts["vocabulary"])

    @property
    def context(self) -> int:
        """The longest window that can be run, in tokens: the model's trained context."""
        return int(self._facts["context"])

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to llama.cpp's default key-value cache, which is float16."""
        return int(self._facts["kv_bytes_per_token"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in the file."""
        return int(self._facts["weight_bytes"])

    @property
    def peak_memory(self) -> int:
        """The most bytes that the child has had resident; of the file, those pages that it read."""
        with self._my_turn():
            return int(self._child.ask("reading its memory", {"do": "memory"})["peak"])

    @property
    def idle_memory(self) -> int:
        """What that was before the file was opened: Python and the library."""
        return self._idle_memory

    @property
    def cpu_ns(self) -> int:
        """CPU time of the child, nanoseconds, at its latest answer."""
        return self._child.cpu_ns

    @property
    def switches(self) -> int:
        """Involuntary context switches of the child, at its latest answer."""
        return self._child.switches

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Tensor]:
        """Predictions of the positions first .. len(ids) - 2; see `Engine.logits`.

        Keys and values are kept in float32 and attention is computed in float32, so that the file's
        quantization is all that is measured; llama.cpp rounds both to float16 by default. Pieces
        hold 64 MiB or 512 tokens at most.

        Raises:
            EngineError: the window is longer than the model's context, a token is not in its
                vocabulary, or llama.cpp fails.
        """
        self._check(ids)
        if not 0 <= first < len(ids) - 1:
            raise ValueError(f"first must be in 0 .. {len(ids) - 2}, not {first}")
        return self._logits(ids[:-1], first)

    def _logits(self, ids: Sequence[int], first: int) -> Iterator[Tensor]:
        what, seconds = f"computing logits of {len(ids)} tokens", self._seconds(len(ids))
        request = {"do": "logits", "first": first, "columns": self.vocabulary}
        left = len(ids) - first
        self._take_turn()
        try:
            self._child.send(what, request, array("i", ids).tobytes(), seconds=seconds)
            while True:
                answer, data = self._child.receive(what, seconds=seconds)
                left = answer["left"]
                piece = torch.frombuffer(data, dtype=torch.float32).view(-1, self.vocabulary)
                if not left:
                    break
                yield piece
        except GeneratorExit:
            # The rest is on its way, and must not be taken for the answer to another request.
            with suppress(EngineError):
                while left:
                    left = self._child.receive(what, seconds=seconds)[0]["left"]
            raise
        finally:
            self._end_turn()
        yield piece  # Others may compute while it is used.

    def prefill(self, ids: Sequence[int]) -> None:
        """Run all of `ids` from an empty cache, as llama.cpp does by default; for timing.

        That is with flash attention, keys and values in float16, and weights repacked for the
        processor, except for its AMX units, with which llama.cpp is known to crash.

        Raises:
            EngineError: as of `logits`.
        """
        self._check(ids)
        what = f"running {len(ids)} tokens"
        with self._my_turn():
            tokens = array("i", ids).tobytes()
            self._child.ask(what, {"do": "prefill"}, tokens, seconds=self._seconds(len(ids)))

    def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold `ids`, run as `prefill` does; what it holds of them stays.

        Raises:
            EngineError: as of `logits`, or no token fits behind them.
        """
        self._check(ids, room=1)
        what = f"running {len(ids)} tokens"
        with self._my_turn():
            tokens = array("i", ids).tobytes()
            self._child.ask(what, {"do": "fill"}, tokens, seconds=self._seconds(len(ids)))

    def decode(self, token: int) -> None:
        """Run one more token after those of `fill`, as llama.cpp does by default; for timing.

        Raises:
            EngineError: the cache was not filled, or llama.cpp fails.
        """
        with self._my_turn():
            self._child.ask(
                "running a token",
                {"do": "decode"},
                array("i", [token]).tobytes(),
                seconds=self._seconds(1),
            )

    def generate(self, ids: Sequence[int], tokens: int) -> Generated:
        """Exactly that many tokens after `ids`, by llama.cpp's greedy sampler; for timing.

        Runs as `prefill` does. A token that ends a text is one as any other.

        Raises:
            EngineError: as of `logits`, or the tokens do not fit behind `ids`.
        """
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {tokens}")
        self._check(ids, room=tokens)
        with self._my_turn():
            answer = self._child.ask(
                f"generating {tokens} tokens after {len(ids)}",
                {"do": "generate", "tokens": tokens},
                array("i", ids).tobytes(),
                seconds=self._seconds(len(ids) + tokens),
            )
        return Generated(tuple(answer["tokens"]), answer["first_ns"], answer["rest_ns"])

    def close(self) -> None:
        """End the child process; a second call does nothing."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self, ids: Sequence[int], *, room: int = 0) -> None:
        length = len(ids) + room
        if length > self.context:
            raise EngineError(
                f"A window of {length} tokens does not fit into the context of {self.context} "
                f"tokens of {self._file.name}. Use shorter windows: --qlab-window-length="
                f"{self.context}."
            )
        if length < 2 or min(ids, default=-1) < 0 or max(ids) >= self.vocabulary:
            raise EngineError(
                f"{self._file.name} takes windows of at least 2 tokens from 0 to "
                f"{self.vocabulary - 1}; a window of {len(ids)} tokens from "
                f"{min(ids, default=0)} to {max(ids, default=0)} was given. The file does not "
                "belong to this tokenizer."
            )

    def _seconds(self, tokens: int) -> float:
        # The file may have to be opened anew for another kind of run.
        operations = 2.0 * int(self._facts["parameters"]) * tokens
        return operations / _OPERATIONS + self.weight_bytes / _READ_BYTES

    def _take_turn(self) -> None:
        mine = threading.get_ident()
        if self._holder == mine:
            raise RuntimeError("an iterator over logits of this engine is not exhausted yet")
        self._turn.acquire()
        self._holder = mine

    def _end_turn(self) -> None:
        self._holder = None
        self._turn.release()

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        self._take_turn()
        try:
            yield
        finally:
            self._end_turn()


def time_load(
    file: Path, ids: Sequence[int], *, steady: int, threads: int = 1, patience: float = 1.0
) -> EngineLoad:
    """Open a GGUF file in a fresh process, as llama.cpp does by default, and time it.

    That is with the file mapped, weights repacked for the processor, and a context for `ids` and
    one token; then the token after `ids` is generated again and again, each time from an empty
    cache. The process has imported the library before.

    Args:
        steady: how often after the first time.
        threads: that an operation in llama.cpp may use.
        patience: every limit on time is multiplied by it.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        EngineError: it cannot be loaded, cannot open the file, or fails.
    """
    file = Path(file).absolute()
    request = {"do": "load", "file": str(file), "threads": threads, "steady": steady}
    size = _size_of(file)
    # No type of weights has fewer than 2 bits.
    operations = 2.0 * 4 * size * len(ids) * (1 + steady)
    child = Child(patience=patience)
    try:
        child.ask("loading its library", {"do": "start"})
        answer = child.ask(
            f"loading {file}",
            request,
            array("i", ids).tobytes(),
            seconds=size / _READ_BYTES + operations / _OPERATIONS,
        )
    finally:
        child.close()
    return EngineLoad(answer["load"], answer["first"], tuple(answer["steady"]), answer["token"])


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise EngineError(f"llama.cpp cannot open {file}: {error.strerror}.") from error


def quantize_file(
    source: Path,
    target: Path,
    file_type: str,
    *,
    weights: int,
    pure: bool = False,
    importance: Mapping[str, Tensor] | None = None,
    threads: int = 1,
    patience: float = 1.0,
) -> str:
    """Let llama.cpp quantize a GGUF file of F32, F16 or BF16 weights.

    Args:
        file_type: of llama.cpp's `LLAMA_FTYPE`, such as `MOSTLY_Q4_K_M`.
        weights: how many there are, for the time limit.
        pure: one type for all matrices, where `file_type` names a mix.
        importance: float32 [in_features] by the tensor's name in the file; llama.cpp's imatrix.
        threads: for the quantizer; they do not change the result.
        patience: every limit on time is multiplied by it.

    Returns:
        The version of llama-cpp-python.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        EngineError: it cannot be loaded, or fails.
    """
    given = importance or {}
    values = [tensor.detach().to("cpu", torch.float32).contiguous() for tensor in given.values()]
    request: dict[str, Any] = {
        "do": "quantize",
        "source": str(source.absolute()),
        "target": str(target.absolute()),
        "ftype": f"LLAMA_FTYPE_{file_type}",
        "threads": threads,
        "pure": pure,
        "importance": [(name, len(tensor)) for name, tensor in zip(given, values, strict=True)],
    }
    child = Child(patience=patience)
    try:
        version = child.ask("loading its library", {"do": "start"})["version"]
        child.ask(
            f"quantizing to {file_type.removeprefix('MOSTLY_')}",
            request,
            b"".join(tensor.numpy().tobytes() for tensor in values),
            seconds=weights / _QUANTIZED_WEIGHTS,
        )
    finally:
        child.close()
    return str(version)
