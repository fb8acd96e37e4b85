"""A child process that answers requests, and what becomes of it when it does not.

A crash of the child, an answer that never comes and an answer that is none all become an
`EngineError`. The child is then gone for good: its later requests raise the same error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

from pytest_qlab.errors import EngineError, MissingExtraError

PROGRAM = (sys.executable, "-P", str(Path(__file__).with_name("child.py")))
BASE_SECONDS = 120.0
"""What every request is given, whatever its work."""
_HEADER_BYTES, _MOST_BYTES = 2**16, 2**30
_TAIL_LINES, _TAIL_BYTES = 8, 2**14
_ACCESS_VIOLATION, _ILLEGAL_INSTRUCTION = 0xC0000005, 0xC000001D  # exit codes on Windows
_REBUILD = (
    'pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "llama-cpp-python"'
)
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"

Fields: TypeAlias = dict[str, Any]


class Child:
    """The process, requests to it and answers from it; for one thread at a time.

    Args:
        program: the command that starts it.
        patience: every limit on time is multiplied by it.

    Attributes:
        cpu_ns, switches: CPU time of the process and how often it was preempted, by its latest
            answer.
    """

    def __init__(self, program: Sequence[str] = PROGRAM, *, patience: float = 1.0) -> None:
        self.cpu_ns = 0
        self.switches = 0
        self._patience = patience
        self._number = 0
        self._failure: EngineError | None = None
        self._closed = False
        # A file holds whatever is printed; a pipe that nobody reads would block the child.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        try:
            self._process = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                # llama.cpp's threads wait busily otherwise: several times slower on shared cores.
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
                # Ctrl-C goes to every process of a session; the child's end is decided here.
                start_new_session=True,
            )
        except OSError as error:
            self._printed.close()
            raise EngineError(
                f"The process that runs llama.cpp could not be started: {error}. Close other "
                "programs, or run with fewer workers."
            ) from error
        self._guard = _Guard(self._process)
        self._guard.start()
        self._ended = weakref.finalize(
            self, _end, self._process, self._guard, self._printed, os.getpid()
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(
        self, what: str, request: Fields, payload: bytes = b"", *, seconds: float = 0
    ) -> Fields:
        """Send a request and return its answer, which comes without data.

        Args:
            what: the work in words, for errors: "it opened model.gguf".
            seconds: how long the work takes on a very slow machine; added to a general allowance.
        """
        self.send(what, request, payload, seconds=seconds)
        return self.receive(what, seconds=seconds)[0]

    def send(self, what: str, request: Fields, payload: bytes = b"", *, seconds: float = 0) -> None:
        """Send a request; see `ask`."""
        self._number += 1
        header = {**request, "number": self._number, "bytes": len(payload)}
        with self._watched(what, seconds):
            stdin = self._process.stdin
            assert stdin is not None
            try:
                stdin.write(json.dumps(header).encode() + b"\n" + payload)
                stdin.flush()
            except OSError as error:
                raise self._death(what) from error

    def receive(self, what: str, *, seconds: float = 0) -> tuple[Fields, bytearray]:
        """The next answer to the latest request, and the data that came with it."""
        with self._watched(what, seconds):
            stdout = self._process.stdout
            assert stdout is not None
            line = stdout.readline(_HEADER_BYTES)
            if not line.endswith(b"\n") and len(line) < _HEADER_BYTES:
                raise self._death(what)
            header = self._header(line, what)
            data = bytearray(header["bytes"])
            if stdout.readinto(data) < len(data):  # type: ignore[attr-defined]
                raise self._death(what)
        self.cpu_ns, self.switches = header["cpu_ns"], header["switches"]
        if "error" in header:
            raise self._refusal(header, what)
        return header, data

    def close(self) -> None:
        """End the process, which has nothing to do; a second call does nothing."""
        if not self._closed and self._failure is None:
            self._closed = True
            with suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"do": "close", "bytes": 0}\n')
                self._process.stdin.flush()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._ended()

    @contextmanager
    def _watched(self, what: str, seconds: float) -> Iterator[None]:
        """Work with the pipes, within the time limit; whatever goes wrong there ends the child."""
        if self._failure is not None:
            raise EngineError(str(self._failure))
        if self._closed:
            raise EngineError(f"llama.cpp was closed before {what}. Open it again.")
        limit = (BASE_SECONDS + seconds) * self._patience
        self._guard.arm(limit)
        try:
            yield
        except BaseException as error:  # Ctrl-C, too: half an answer may be in the pipe
            late = self._guard.fired
            self._process.kill()
            if isinstance(error, EngineError):
                self._failure = error
                if late:
                    self._failure = self._timeout(what, limit)
            else:
                self._failure = EngineError(f"llama.cpp was interrupted while {what}.")
            self._ended()
            if late:
                raise self._failure from error
            raise
        finally:
            self._guard.disarm()

    def _header(self, line: bytes, what: str) -> Fields:
        try:
            header = json.loads(line)
            sound = (
                header["number"] == self._number
                and 0 <= header["bytes"] <= _MOST_BYTES
                and header["cpu_ns"] >= 0
                and header["switches"] >= 0
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            sound = False
        if not sound:
            start = line[:80].decode(errors="replace").strip()
            raise EngineError(
                f"While {what}, the process that runs llama.cpp answered with something else than "
                f"an answer: {start!r}. A library in it writes where it must not: install "
                f"llama-cpp-python anew with: {_REBUILD}"
            )
        answer: Fields = header
        return answer

    def _refusal(self, header: Fields, what: str) -> EngineError | MissingExtraError:
        """The error of an answer that says that something went wrong; the child lives on."""
        if header.get("missing"):
            return MissingExtraError("Running llama.cpp", "llamacpp")
        if header.get("loaded"):
            lines = [line for line in header.get("log", ()) if line]
            return EngineError(f"llama.cpp failed while {what}: {header['error']}.{_quoted(lines)}")
        return EngineError(
            f"llama-cpp-python is installed but cannot be loaded: {header['error']}. Its library "
            f"was built for another system, or by another version. Install it anew: {_REBUILD}"
        )

    def _death(self, what: str) -> EngineError:
        """What the end of the process means, with the last lines that it printed."""
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            how, remedy = "stopped answering", "Run it again."
        else:
            how, remedy = _fate(status)
        return EngineError(f"llama.cpp {how} while {what}. {remedy}{_quoted(self._tail())}")

    def _timeout(self, what: str, limit: float) -> EngineError:
        return EngineError(
            f"llama.cpp gave no answer within {limit:,.0f} s while {what}, many times what that "
            "takes, and was ended. It hangs, or the machine is overloaded: run with fewer workers "
            f"or smaller windows.{_quoted(self._tail())}"
        )

    def _tail(self) -> list[str]:
        self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(self._printed.tell() - _TAIL_BYTES, 0))
        text = self._printed.read().decode(errors="replace")
        return [line for line in map(str.strip, text.splitlines()) if line][-_TAIL_LINES:]


class _Guard(threading.Thread):
    """Kills a process that has not answered in time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(name="llama.cpp time limit", daemon=True)
        self._process = process
        self._lock = threading.Condition()
        self._deadline: float | None = None
        self._over = False
        self.fired = False

    def arm(self, seconds: float) -> None:
        # No notification: this lies within what is timed. The thread looks by itself.
        self._deadline = time.monotonic() + seconds
        self._look_within = min(1.0, seconds / 2)

    _look_within = 1.0

    def disarm(self) -> None:
        self._deadline = None

    def stop(self) -> None:
        with self._lock:
            self._over = True
            self._lock.notify()
        if threading.current_thread() is not self:  # which may be collecting garbage
            self.join()

    def run(self) -> None:
        with self._lock:
            while not self._over:
                deadline = self._deadline
                if deadline is not None and time.monotonic() > deadline:
                    self.fired = True
                    self._process.kill()
                    return
                self._lock.wait(self._look_within)


def _end(process: subprocess.Popen[bytes], guard: _Guard, printed: IO[bytes], owner: int) -> None:
    """Leave nothing behind: no process, thread or open file."""
    if os.getpid() != owner:
        return  # In a fork of this process, which exits.
    if process.poll() is None:
        process.kill()
    process.wait()
    guard.stop()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # Bytes that were not sent, to nobody.
                pipe.close()
    printed.close()


def _fate(status: int) -> tuple[str, str]:
    """How a process ended, by its exit status, and what to do about it."""
    killed = {_ACCESS_VIOLATION: "SIGSEGV", _ILLEGAL_INSTRUCTION: "SIGILL"}.get(status)
    if status < 0:
        with suppress(ValueError):
            killed = signal.Signals(-status).name
        killed = killed or f"signal {-status}"
    if killed is None:
        return f"exited with status {status}", "Run it again."
    remedy = {
        "SIGSEGV": (
            "On processors with AMX, builds that use it are known to crash with quantized weights. "
            f'Build without it: CFLAGS="{_NO_AMX}" CXXFLAGS="{_NO_AMX}" {_REBUILD}'
        ),
        "SIGILL": f"It was built for another processor. Build it on this one: {_REBUILD}",
        "SIGKILL": (
            "Nobody here did that: most likely the machine ran out of memory. Run with fewer "
            "workers (-n), or take a smaller model."
        ),
        "SIGABRT": "It gave up by itself; the last lines say why.",
    }.get(killed, "Run it again.")
    return f"was killed by {killed}", remedy


def _quoted(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return " Its last lines:\n" + "\n".join(f"  {line}" for line in lines)
