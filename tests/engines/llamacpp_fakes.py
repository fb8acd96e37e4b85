"""What the tests of llama.cpp's process share: prompts, and what the fake library says of them."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def journal(path: Path) -> list[dict[str, Any]]:
    """What was asked of the fake library for the models beside `path`."""
    lines = (path.parent / "journal.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tokens(count: int, vocabulary: int = 6) -> list[int]:
    """A window of that many tokens."""
    return [(7 * n + 3) % vocabulary for n in range(count)]


def expected_sums(ids: list[int], first: int) -> list[float]:
    """The fake's first logit: all tokens up to each position."""
    return [float(total) for total in itertools.accumulate(ids)][first : len(ids) - 1]


def expected_tokens(ids: list[int], count: int, vocabulary: int = 6) -> list[int]:
    """What the fake generates: each token is the sum of all before it, modulo the vocabulary."""
    found = list(ids)
    for _ in range(count):
        found.append(sum(found) % vocabulary)
    return found[len(ids) :]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has, too."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except FileNotFoundError:
        return Path("/proc/self").exists()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
