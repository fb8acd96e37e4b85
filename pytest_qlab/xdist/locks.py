"""A readers/writer lock between processes, so that exclusive tests run alone on the machine.

Made of ordinary file locks, which the kernel releases when their holder dies and which work on
every platform: a reader holds any one of many slots, a writer holds all of them. Everybody passes
through a gate first, and a waiting writer keeps it, so that new readers do not starve it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SLOTS = 96
HELD = "QLAB_MACHINE_LOCK"


class MachineLock:
    """Shared for ordinary tests, exclusive for tests that measure time.

    Args:
        directory: where the lock files are; created when first used.
        on_wait: called with a line of text when the lock is not free at once.
    """

    def __init__(self, directory: Path, on_wait: Callable[[str], None] | None = None) -> None:
        self._directory = directory
        self._on_wait = on_wait or (lambda line: None)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold one slot. Does nothing inside a process whose parent test holds the lock."""
        if os.environ.get(HELD):
            yield
            return
        with ExitStack() as held:
            with self._gate():
                held.enter_context(self._any_slot())
            held.enter_context(_marked())
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold all slots, after every reader has let go of its own."""
        if os.environ.get(HELD):
            yield
            return
        with ExitStack() as held, self._gate():
            for number in range(SLOTS):
                held.enter_context(self._waiting(f"slot-{number}"))
            held.enter_context(_marked())
            yield

    def _gate(self) -> ExitStack:
        return self._waiting("gate")

    def _waiting(self, name: str) -> ExitStack:
        """Acquire the named lock, saying so if that takes long."""
        from filelock import FileLock, Timeout

        self._directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._directory / f"{name}.lock")
        try:
            lock.acquire(timeout=1.0, poll_interval=0.02)
        except Timeout:
            self._on_wait("waiting for tests of other processes on this machine")
            lock.acquire(poll_interval=0.1)
        stack = ExitStack()
        stack.callback(lock.release)
        return stack

    def _any_slot(self) -> ExitStack:
        from filelock import FileLock, Timeout

        first = os.getpid() % SLOTS
        while True:
            for offset in range(SLOTS):
                lock = FileLock(self._directory / f"slot-{(first + offset) % SLOTS}.lock")
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    continue
                stack = ExitStack()
                stack.callback(lock.release)
                return stack
            time.sleep(0.1)


@contextmanager
def _marked() -> Iterator[None]:
    """Tell child processes that the lock is held already, lest they wait for their parent."""
    os.environ[HELD] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(HELD, None)


def machine_lock_directory(cache: Path) -> Path:
    """Where this machine's locks are, under a cache directory that several machines may share."""
    return cache / "locks" / "".join(c if c.isalnum() else "-" for c in socket.gethostname())
