"""Whether a series grows: a slope test that does not take neighbours for independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from pytest_qlab.stats.distributions import t_quantile

BLOCKS = 8
LEVEL = 0.001
"""How often a series without a trend is called growing, where its blocks are independent."""
RISE = 1.0
"""A growing series rises, from its first to its last block, by at least this share of its mean."""


def is_growing(
    times: Sequence[float],
    values: Sequence[float],
    *,
    blocks: int = BLOCKS,
    level: float = LEVEL,
    rise: float = RISE,
) -> bool:
    """Whether values rise with time, by more than chance and by an amount that matters.

    Neighbouring samples of a queue depend on each other, so that a test over samples would find
    trends everywhere. The samples are averaged in blocks of equal count, a line is fitted through
    the blocks, and Student's t of its slope is tested on one side with blocks - 2 degrees of
    freedom.

    Args:
        times, values: of equal length, in the order of time.

    Raises:
        ValueError: fewer than 3 blocks, or series of different length.
    """
    if blocks < 3 or len(times) != len(values):
        raise ValueError("a slope test needs 3 blocks or more and equally many times and values")
    if len(times) < blocks:
        return False
    edges = [number * len(times) // blocks for number in range(blocks + 1)]
    x = [_mean(times[a:b]) for a, b in pairwise(edges)]
    y = [_mean(values[a:b]) for a, b in pairwise(edges)]
    middle, level_of_y = _mean(x), _mean(y)
    spread = sum((each - middle) ** 2 for each in x)
    if spread == 0:
        return False
    slope = sum((a - middle) * (b - level_of_y) for a, b in zip(x, y, strict=True)) / spread
    if slope <= 0 or slope * (x[-1] - x[0]) < rise * abs(level_of_y):
        return False
    left = sum((b - level_of_y - slope * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(left / (blocks - 2) / spread)
    return slope > t_quantile(1 - level, blocks - 2) * error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
