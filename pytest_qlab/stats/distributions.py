"""Quantiles of Student's t, the binomial and the beta distribution, in plain Python.

Source: the continued fraction of the regularised incomplete beta function (NIST DLMF 8.17.22),
evaluated by Lentz's algorithm; quantiles by bisection of it.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_BISECTIONS = 200


def regularized_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b) for a, b > 0 and 0 <= x <= 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"I_x(a, b) needs a, b > 0 and 0 <= x <= 1, not a={a}, b={b}, x={x}")
    if x in (0.0, 1.0):
        return x
    # The fraction converges fast on this side of the mean only.
    if x > (a + 1) / (a + b + 2):
        return 1.0 - regularized_beta(b, a, 1.0 - x)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    return math.exp(log_front) * _continued_fraction(a, b, x) / a


def _continued_fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    fraction = d
    # About sqrt(max(a, b)) terms are needed; the bound only stops a defect from looping.
    for k in range(1, 200 + 20 * int(math.sqrt(max(a, b)))):
        even = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        odd = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        change = 1.0
        for coefficient in (even, odd):
            d = 1.0 + coefficient * d
            d = 1.0 / (d if abs(d) > _TINY else _TINY)
            c = 1.0 + coefficient / c
            c = c if abs(c) > _TINY else _TINY
            change = c * d
            fraction *= change
        if abs(change - 1.0) < 1e-15:
            break
    return fraction


@lru_cache(maxsize=4096)
def beta_quantile(probability: float, a: float, b: float) -> float:
    """The x at which the beta distribution with parameters a, b has that cumulative probability."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if regularized_beta(a, b, middle) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@lru_cache(maxsize=4096)
def t_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's t with that many degrees of freedom.

    Raises:
        ValueError: the probability is not inside (0, 1), or degrees <= 0.
    """
    if not (0 < probability < 1 and degrees > 0):
        raise ValueError(f"t needs 0 < p < 1 and degrees > 0, not p={probability}, {degrees}")
    if probability == 0.5:
        return 0.0
    tail = min(probability, 1 - probability)
    # P(|T| > t) = I_x(df/2, 1/2) with x = df / (df + t^2).
    x = beta_quantile(2 * tail, degrees / 2, 0.5)
    return math.copysign(math.sqrt(degrees * (1 - x) / x), probability - 0.5)


def binomial_cdf(successes: int, trials: int, rate: float) -> float:
    """P(X <= successes) for X binomial."""
    if successes < 0:
        return 0.0
    if successes >= trials:
        return 1.0
    return regularized_beta(trials - successes, successes + 1, 1.0 - rate)
