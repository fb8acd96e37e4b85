"""What the GGML quantizers share: float32 arithmetic in the order of llama.cpp's C code.

Arrays are element-major where work is done: (elements of a group, groups), so that one call of
numpy does the same element of many groups, and sums over elements run from first to last.

Quantizers divide by zero and overflow where C does, so they are called with numpy's warnings off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Fields: TypeAlias = dict[str, NDArray[Any]]
Quantizer: TypeAlias = Callable[[Floats, Floats | None], Fields]

BLOCK = 32


def steps(count: int, size: int) -> Iterator[slice]:
    """Neighbouring slices of up to `size` that cover `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def column_sums(values: Floats) -> Floats:
    """Sums (groups,) of C-contiguous (elements, groups), each added strictly from first to last."""
    if values.shape[1] == 1:
        # numpy adds a lone column in pairs, which rounds differently.
        total: Floats = np.add.accumulate(values, axis=0)[-1]
    else:
        total = np.add.reduce(values, axis=0)
    return total


def signed_extremes(high: Floats, low: Floats, values: Floats) -> Floats:
    """The element of largest magnitude of each column, the first of several; zero is +0.

    Args:
        high, low: largest and smallest elements, (groups,).
        values: (elements, groups), contiguous or not.
    """
    extremes: Floats = np.where(high > -low, high, low)
    extremes += np.float32(0)
    tied = np.flatnonzero((high == -low) & (high != 0))
    if len(tied):
        columns = values[:, tied]
        extremes[tied] = columns[np.absolute(columns).argmax(0), np.arange(len(tied))]
    return extremes


def sign_zeros(low: Floats, values: Floats) -> None:
    """Where the smallest element of a column is zero, give `low` the sign of the first zero.

    A scan keeps the first of equal numbers, and the sign of a minimum is stored.
    """
    (zero,) = (low == 0).nonzero()
    if len(zero):
        columns = values[:, zero]
        low[zero] = columns[(columns == 0).argmax(0), np.arange(len(zero))]


def element_weights(values: Floats, importance: Floats, sigma2: Floats) -> Floats:
    """`importance * sqrt(sigma2 + values * values)`, broadcast."""
    weights: Floats = values * values
    weights += sigma2
    np.sqrt(weights, out=weights)
    weights *= importance
    return weights
