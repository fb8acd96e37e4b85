"""How many windows a gate needs, before anything is measured.

Source: the sample size of a non-inferiority test, n = ((z_a + z_b) sigma / (budget - truth))^2
times the design effect; with the bounds that gates go by in the place of z_a, of as many documents
as the windows come from and at the level of the last of several looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pytest_qlab.stats.decisions import reach
from pytest_qlab.stats.distributions import t_quantile
from pytest_qlab.stats.sequential import boundaries

MOST = 2**20
"""Windows beyond which nothing is planned."""


def windows_needed(
    gap: float,
    deviation: float,
    *,
    confidence: float,
    power: float,
    documents: Callable[[int], int],
    shares: Callable[[int], Sequence[float]],
    correlation: float = 0.0,
    at_budget: float = 0.0,
) -> int | None:
    """The least number of windows with which a gate decides rightly with probability `power`.

    Args:
        gap: between the truth and the budget, in the measure's unit.
        deviation: standard deviation of the means of windows, if the truth is what it is.
        confidence: of the gate, such as 0.95.
        documents: from how many documents so many windows come.
        shares: of so many windows, after which the gate looks before it looks at all.
        correlation: of the means of two windows of one document, from 0 to 1.
        at_budget: of a rate, the deviation if the truth is at the budget: bounds of few events go
            by it.

    Returns:
        None where not even `MOST` windows would be enough.
    """

    def enough(windows: int) -> bool:
        count = documents(windows)
        if count < 2:
            return False
        level = boundaries((*shares(windows), 1.0), 1 - confidence)[-1]
        held = reach(count, level) * max(deviation, at_budget)
        error = math.sqrt((1 + (windows / count - 1) * correlation) / windows)
        return (held + t_quantile(power, count - 1) * deviation) * error <= abs(gap)

    high = 2
    while not enough(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2  # not enough, or too few to begin with
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
