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
        self._has_said = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold one slot. Does nothing inside a process whose parent test holds the lock."""
        with ExitStack() as held:
            if self._begin():
                with ExitStack() as passing:
                    self._acquire("gate", passing)
                    self._acquire_any_slot(held)
                held.enter_context(_marked())
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold all slots, after every reader has let go of its own."""
        with ExitStack() as held:
            if self._begin():
                self._acquire("gate", held)
                for number in range(SLOTS):
                    self._acquire(f"slot-{number}", held)
                held.enter_context(_marked())
            yield

    def _begin(self) -> bool:
        self._has_said = False
        if os.environ.get(HELD):
            return False
        self._directory.mkdir(parents=True, exist_ok=True)
        return True

    def _acquire(self, name: str, held: ExitStack) -> None:
        """Acquire the named lock until `held` is left, saying so once if it takes long."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._directory / f"{name}.lock")
        try:
            lock.acquire(timeout=1.0, poll_interval=0.02)
        except Timeout:
            if not self._has_said:
                self._has_said = True
                self._on_wait("waiting for tests of other processes on this machine")
            lock.acquire(poll_interval=0.1)
        held.callback(lock.release)

    def _acquire_any_slot(self, held: ExitStack) -> None:
        from filelock import FileLock, Timeout

        first = os.getpid() % SLOTS
        while True:
            for offset in range(SLOTS):
                lock = FileLock(self._directory / f"slot-{(first + offset) % SLOTS}.lock")
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    continue
                held.callback(lock.release)
                return
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
