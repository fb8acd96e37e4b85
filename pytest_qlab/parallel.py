"""Parallel work whose results do not depend on how many threads do it.

Torch's own threads change the order of additions, and with it the last bits, when their number
changes. Here every tensor operation runs on one thread, and whole windows or sequences are spread
over Python threads instead: the same bits under `-n 0` and `-n auto`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def one_thread_per_operation() -> None:
    """Make torch run each operation on the thread that calls it."""
    torch.set_num_threads(1)


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield `function(item)` in the order of the items, computed on up to `threads` threads.

    At most a few results wait at a time, so memory stays bounded. Gradients are off in `function`.
    """

    def without_gradients(item: T) -> R:
        with torch.inference_mode():
            return function(item)

    if threads <= 1:
        for item in items:
            yield without_gradients(item)
        return
    with ThreadPoolExecutor(threads, initializer=one_thread_per_operation) as pool:
        pending = []
        for item in items:
            pending.append(pool.submit(without_gradients, item))
            if len(pending) > 2 * threads:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()
