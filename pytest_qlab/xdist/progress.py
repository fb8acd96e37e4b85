"""Lines about long work: from workers through files, printed by the controller."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

TERMINAL_SECONDS = 2.0
LOG_SECONDS = 30.0
POLL_SECONDS = 0.25


class Throttle:
    """Decides which lines are shown: a new phase at once, then one line per interval.

    Two lines belong to the same phase if they differ in numbers only: `layer 3/24`, `layer 4/24`.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._shown: dict[str, tuple[str, float]] = {}

    def wants(self, worker: str, line: str) -> bool:
        """Whether to show the worker's line now."""
        phase = re.sub(r"\d+", "#", line)
        now = self._clock()
        last = self._shown.get(worker)
        if last is not None and last[0] == phase and now - last[1] < self._interval:
            return False
        self._shown[worker] = (phase, now)
        return True


class FileProgress:
    """Called in a worker with a line of text; leaves it in the run's directory."""

    def __init__(self, directory: Path, worker: str) -> None:
        self._path = directory / f"{worker}.progress"
        self._partial = directory / f".{worker}.progress.{os.getpid()}"
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        with self._lock:
            try:
                self._partial.write_text(line, encoding="utf-8")
                os.replace(self._partial, self._path)
            except OSError:
                return  # A line that is lost costs nothing; the work goes on.


class DirectProgress:
    """Called without workers; prints through `write`, from the main thread only."""

    def __init__(self, write: Callable[[str], None], interval: float) -> None:
        self._write = write
        self._throttle = Throttle(interval)

    def __call__(self, line: str) -> None:
        # Output capture can be lifted from the main thread only.
        if threading.current_thread() is threading.main_thread() and self._throttle.wants("", line):
            self._write(f"qlab: {line}")


class ProgressTail:
    """Follows the workers' files from a daemon thread of the controller."""

    def __init__(self, directory: Path, write: Callable[[str], None], interval: float) -> None:
        self._directory = directory
        self._write = write
        self._throttle = Throttle(interval)
        self._seen: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="qlab-progress", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """End, having looked once more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def poll(self) -> None:
        """Show what is new."""
        for path in sorted(self._directory.glob("*.progress")):
            if path.name.startswith("."):
                continue
            try:
                stamp = path.stat().st_mtime_ns
                if self._seen.get(path.name) == stamp:
                    continue
                line = path.read_text(encoding="utf-8")
            except OSError:
                continue
            self._seen[path.name] = stamp
            if self._throttle.wants(path.stem, line):
                self._write(f"[{path.stem}] {line}")

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.poll()
