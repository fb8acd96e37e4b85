"""Levels for looking at growing data several times, so that the error over all looks is kept.

Source: Lan and DeMets 1983 (alpha spending, with their approximation to the boundaries of O'Brien
and Fleming), computed by the recursive integration of Armitage, McPherson and Rowe 1969. Early
looks spend next to nothing, so that the last one costs hardly more data than a single look would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from pytest_qlab.stats.paired import FloatArray

_NORMAL = NormalDist()
_REACH = 9.0  # standard deviations below zero at which densities are cut off: 1e-19 of them
_NODES = 16  # of Gauss-Legendre, for each panel of at most one standard deviation of a step
_PANELS = 400
_BISECTIONS = 100


def spent(fraction: float, alpha: float) -> float:
    """How much of a one-sided error `alpha` may be used up at this fraction of the data.

    2 - 2 Phi(z / sqrt(fraction)) with z = Phi^-1(1 - alpha / 2): nothing at 0, alpha at 1.
    """
    return 2 * _tail(-_NORMAL.inv_cdf(alpha / 2) / math.sqrt(fraction))


def boundaries(fractions: Sequence[float], alpha: float) -> tuple[float, ...]:
    """The one-sided level of a test at each look, so that all looks together err by `alpha`.

    Deciding at look k wherever that look's p-value is at most the k-th level decides wrongly, at
    any look, with probability `alpha` at most.

    Args:
        fractions: of the most data there can be, at each look: increasing, the last at most 1.
            With a last fraction below 1, only what is spent until there is used.
        alpha: the one-sided error, above 0 and at most 0.5.

    Raises:
        ValueError: the fractions do not increase from above 0 to at most 1, or alpha is out of
            range.
    """
    looks = tuple(float(fraction) for fraction in fractions)
    steps = list(pairwise((0.0, *looks)))
    if not looks or looks[-1] > 1 or any(before >= after for before, after in steps):
        raise ValueError(f"looks are at increasing fractions of the data up to 1, not {looks}")
    if not 0 < alpha <= 0.5:
        raise ValueError(f"a one-sided error is above 0 and at most 0.5, not {alpha}")
    return _levels(looks, alpha)


@lru_cache(maxsize=256)
def _levels(looks: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    path = _Path()
    levels, before = [], 0.0
    for fraction in looks:
        now = spent(fraction, alpha)
        bound = path.bound(fraction, now - before)
        levels.append(_tail(bound / math.sqrt(fraction)))
        path.advance(fraction, bound)
        before = now
    return tuple(levels)


def crossing(fractions: Sequence[float], levels: Sequence[float]) -> tuple[float, ...]:
    """The probability, under the null, to decide at each look and not before: what levels err."""
    path, found = _Path(), []
    for fraction, level in zip(fractions, levels, strict=True):
        bound = -_NORMAL.inv_cdf(level) * math.sqrt(fraction)
        found.append(path.beyond(fraction, bound))
        path.advance(fraction, bound)
    return tuple(found)


class _Path:
    """Brownian motion that has not crossed any bound so far: its density, as weights of nodes."""

    def __init__(self) -> None:
        self._fraction = 0.0
        self._at = np.zeros(1)
        self._mass = np.ones(1)

    def beyond(self, fraction: float, bound: float) -> float:
        """The probability to be above `bound` at a later fraction."""
        scale = math.sqrt(2 * (fraction - self._fraction))
        tails = [math.erfc(x) / 2 for x in ((bound - self._at) / scale).tolist()]
        return float(self._mass @ np.array(tails))

    def bound(self, fraction: float, probability: float) -> float:
        """Above what it is at a later fraction with that probability."""
        low, high = 0.0, 40 * math.sqrt(fraction)
        # With half of all to spend at once, the bound is at zero or just below it.
        while self.beyond(fraction, low) < probability:
            low -= math.sqrt(fraction)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            if self.beyond(fraction, middle) > probability:
                low = middle
            else:
                high = middle
        return high

    def advance(self, fraction: float, bound: float) -> None:
        """Go on to a later fraction, keeping only what stays below `bound` there."""
        deviation = math.sqrt(fraction - self._fraction)
        bottom = -_REACH * math.sqrt(fraction)
        nodes, weights = _grid(bottom, max(bound, bottom), deviation)
        distance = (nodes[:, None] - self._at[None, :]) / deviation
        density = np.exp(-0.5 * distance**2) @ self._mass / (deviation * math.sqrt(2 * math.pi))
        self._fraction, self._at, self._mass = fraction, nodes, weights * density


def _grid(bottom: float, top: float, deviation: float) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights of Gauss-Legendre, in panels that resolve the density's features."""
    panels = min(_PANELS, max(1, math.ceil((top - bottom) / deviation)))
    edges = np.linspace(bottom, top, panels + 1)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = (edges[1:] - edges[:-1]) / 2
    at = (edges[:-1] + half)[:, None] + half[:, None] * nodes[None, :]
    return at.ravel(), (half[:, None] * weights[None, :]).ravel()


def _tail(z: float) -> float:
    """P(Z > z), exact far out as well."""
    return math.erfc(z / math.sqrt(2)) / 2
