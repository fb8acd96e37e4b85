"""Up to how many rows a kernel is faster than dequantizing, if at all: found at load, by trying."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import CrossedLinear, KernelLinear

MOST_ROWS = 256
"""Larger crossovers are not looked for."""
REPEATS = 3

_known: dict[tuple[object, ...], int] = {}
_slowdowns: dict[tuple[object, ...], float] = {}


def crossover(module: CrossedLinear) -> int:
    """The most rows that the kernel takes no longer for; tried once in a process for each shape."""
    device = next(module.buffers()).device
    key = (*module.crossover_key, str(device), torch.get_num_threads())
    if key not in _known:
        rows = torch.ones(MOST_ROWS, module.in_features, dtype=module.dtype, device=device)
        with torch.inference_mode():
            _known[key] = most_rows(
                lambda count: module.packed_multiply(rows[:count]),
                lambda count: module.dense_multiply(rows[:count]),
                _clock(device),
            )
    return _known[key]


def slowdown(module: KernelLinear, source: PackedLinear, rows: Tensor) -> float:
    """The kernel's time over that of dequantizing and multiplying; once in a process for a shape.

    A library may have no fast code for an operator on this processor, and still give right results.
    """
    shape = (module.out_features, module.in_features)
    key = (module.kernel, *shape, module.dtype, str(rows.device), torch.get_num_threads())
    if key not in _slowdowns:
        with torch.inference_mode():
            _slowdowns[key] = time_ratio(
                lambda count: module.multiply(rows[:count]),
                lambda count: source(rows[:count]),
                len(rows),
                _clock(rows.device),
            )
    return _slowdowns[key]


def time_ratio(
    first: Callable[[int], Tensor],
    second: Callable[[int], Tensor],
    count: int,
    clock: Callable[[], int],
) -> float:
    """The least time of some repetitions of `first` with that many rows, over that of `second`."""
    return _least(first, count, clock) / max(_least(second, count, clock), 1)


def most_rows(
    packed: Callable[[int], Tensor], dense: Callable[[int], Tensor], clock: Callable[[], int]
) -> int:
    """The last power of 2 up to which `packed` is no slower than `dense`; 0 if it never is.

    Args:
        packed, dense: run that many rows.
        clock: time in any unit; the least of some repetitions counts.
    """
    found, count = 0, 1
    while count <= MOST_ROWS:
        if _least(packed, count, clock) > _least(dense, count, clock):
            break
        found, count = count, 2 * count
    return found


def _least(run: Callable[[int], Tensor], count: int, clock: Callable[[], int]) -> int:
    times = []
    for _ in range(REPEATS):
        started = clock()
        run(count)
        times.append(clock() - started)
    return min(times)


def _clock(device: torch.device) -> Callable[[], int]:
    """Processor time, which other processes do not lengthen; on a GPU the time until it is done."""
    if device.type != "cuda":
        return time.process_time_ns

    def done() -> int:
        torch.cuda.synchronize(device)
        return time.perf_counter_ns()

    return done
