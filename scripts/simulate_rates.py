"""How often intervals of clustered rates miss: Student's t, and those of Korn and Graubard.

    python -m scripts.simulate_rates

prints the table of docs/explanation/statistics.md, in about three minutes. Documents of 700 tokens
have rates of their own, beta-distributed so that tokens have the design effect; each side of a 95 %
interval should miss in 2.5 % of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pytest_qlab.stats.distributions import t_quantile
from pytest_qlab.stats.rates import rate_interval

TOKENS = 700
CASES = [
    (documents, rate, effect)
    for documents in (12, 24, 60)
    for rate in (0.1, 0.01, 0.001)
    for effect in (1.0, 4.0)
]


@dataclass(frozen=True)
class Misses:
    """Shares of samples in which an interval lies below or above the true rate."""

    t_below: float
    t_above: float
    below: float
    above: float


def simulate(
    documents: int, rate: float, effect: float, *, samples: int = 4000, seed: int = 0
) -> Misses:
    """Draw samples of that many documents, and count the intervals that miss the rate."""
    generator = np.random.default_rng(seed)
    shares = np.full((samples, documents), rate)
    if effect > 1:
        scale = (TOKENS - 1) / (effect - 1) - 1
        shares = generator.beta(rate * scale, (1 - rate) * scale, size=shares.shape)
    events = generator.binomial(TOKENS, shares)
    trials = documents * TOKENS
    found = [np.zeros(2, dtype=np.int64) for _ in range(2)]
    for sample in events:
        value = float(sample.sum()) / trials
        error = float(sample.std(ddof=1)) * math.sqrt(documents) / trials
        arm = t_quantile(0.975, documents - 1) * error
        independent = value * (1 - value) / (trials - 1)
        seen = error**2 / independent if independent else 1.0
        lower, upper = rate_interval(value, trials, documents, seen or 1.0)
        assert lower is not None
        assert upper is not None
        found[0] += (value + arm < rate, value - arm > rate)
        found[1] += (upper < rate, lower > rate)
    (t_below, t_above), (below, above) = ((each / samples).tolist() for each in found)
    return Misses(t_below, t_above, below, above)


def main() -> None:
    """Print the table."""
    print("| documents | rate | events | design effect | t below | above | K-G below | above |")
    print("|---|---|---|---|---|---|---|---|")
    for documents, rate, effect in CASES:
        found = simulate(documents, rate, effect)
        shares = (found.t_below, found.t_above, found.below, found.above)
        cells = [documents, f"{rate:g}", f"{rate * documents * TOKENS:.0f}", f"{effect:g}"]
        cells += [f"{100 * share:.1f} %" for share in shares]
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
