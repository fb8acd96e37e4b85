from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_qlab.xdist.locks import HELD, MachineLock, machine_lock_directory
from pytest_qlab.xdist.progress import DirectProgress, FileProgress, ProgressTail, Throttle

HOLDER = """
import sys
from pathlib import Path
from pytest_qlab.xdist.locks import MachineLock

lock = MachineLock(Path(sys.argv[1]), lambda line: print("waiting", flush=True))
with getattr(lock, sys.argv[2])():
    print("held", flush=True)
    sys.stdin.readline()
print("free", flush=True)
"""


class Holder:
    """A process that holds the lock until it is told to let go."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(directory), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def let_go(self) -> None:
        self.process.communicate("\n", timeout=30)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Holder]]:
    """Start processes that hold the lock in `tmp_path`."""
    monkeypatch.delenv(HELD, raising=False)
    holders: list[Holder] = []

    def start(kind: str) -> Holder:
        holders.append(Holder(tmp_path, kind))
        return holders[-1]

    yield start
    for holder in holders:
        if holder.process.returncode is None:
            holder.end()


def test_readers_share_and_a_writer_waits_for_them(hold: Callable[[str], Holder]) -> None:
    readers = [hold("shared"), hold("shared")]
    assert [reader.says() for reader in readers] == ["held", "held"]
    writer = hold("exclusive")
    assert writer.says() == "waiting"
    readers[0].let_go()
    late = hold("shared")
    assert late.says() == "waiting", "a waiting writer must keep new readers out"
    readers[1].end()  # A reader that dies lets go as well.
    assert writer.says() == "held"
    writer.let_go()
    assert late.says() == "held"
    late.let_go()


def test_a_process_started_by_a_test_does_not_wait_for_it(
    tmp_path: Path, hold: Callable[[str], Holder]
) -> None:
    with MachineLock(tmp_path).exclusive():
        child = hold("shared")
        assert child.says() == "held"
        child.let_go()
    assert HELD not in os.environ


def test_locks_are_kept_for_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node/1")
    assert machine_lock_directory(tmp_path) == tmp_path / "locks" / "node-1"


def test_a_new_phase_is_shown_at_once_and_then_at_intervals() -> None:
    now = [0.0]
    throttle = Throttle(30, clock=lambda: now[0])
    assert throttle.wants("gw0", "gptq: layer 1/24")
    now[0] = 29.0
    assert not throttle.wants("gw0", "gptq: layer 2/24")
    assert throttle.wants("gw1", "gptq: layer 2/24")
    assert throttle.wants("gw0", "evaluating 1/64")
    now[0] = 58.0
    assert not throttle.wants("gw0", "evaluating 40/64")
    now[0] = 59.0
    assert throttle.wants("gw0", "evaluating 41/64")


def test_lines_of_workers_reach_the_controller_once(tmp_path: Path) -> None:
    shown: list[str] = []
    tail = ProgressTail(tmp_path, shown.append, 0.0)
    FileProgress(tmp_path, "gw1")("layer 1/2")
    FileProgress(tmp_path, "gw0")("statistics")
    tail.poll()
    tail.poll()
    assert shown == ["[gw0] statistics", "[gw1] layer 1/2"]


def test_the_tail_follows_in_the_background_and_stops(tmp_path: Path) -> None:
    seen = threading.Event()
    tail = ProgressTail(tmp_path, lambda line: seen.set(), 0.0)
    tail.start()
    FileProgress(tmp_path, "gw0")("layer 1/2")
    assert seen.wait(20)
    tail.stop()
    seen.clear()
    FileProgress(tmp_path, "gw0")("other")
    time.sleep(0.5)
    assert not seen.is_set()


def test_a_run_directory_that_is_gone_stops_no_work(tmp_path: Path) -> None:
    FileProgress(tmp_path / "gone", "gw0")("layer 1/2")


def test_only_the_main_thread_prints() -> None:
    shown: list[str] = []
    progress = DirectProgress(shown.append, 0.0)
    thread = threading.Thread(target=progress, args=("from elsewhere",))
    thread.start()
    thread.join()
    progress("from here")
    assert shown == ["qlab: from here"]
