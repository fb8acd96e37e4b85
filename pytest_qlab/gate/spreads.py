"""How much windows of text differ in a measure: what decides how many of them a gate needs.

It changes with the damage, by a law for each measure, so that what was measured on one candidate
tells it of another with more or less of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.directions import split_domain
from pytest_qlab.stats.paired import cluster_index

Kind = Literal["proportional", "root", "relative", "constant", "rate"]


@dataclass(frozen=True)
class Law:
    """How the standard deviation of windows depends on what is measured.

    Attributes:
        kind: `proportional` to the damage, to its `root`, `relative` to the value, `constant`, or
            that of a `rate` p, sqrt(p (1 - p)).
        factor: by which that is multiplied, where nothing was measured.
        correlation: of two windows of one document, likewise.
    """

    kind: Kind
    factor: float
    correlation: float


# What `python -m scripts.measure_spreads` prints for rtn, awq and gptq at 4 and 3 bits, rounded up:
# windows of KL differ by 0.16 to 0.27 of the mean, of its 99th percentile by 0.22 to 0.48, of the
# loss by 0.08 to 0.10 roots of the KL. For Llama-3-8B in llama.cpp, tokens of KL differ by 1.6 to
# 2.9 of the mean and losses by about 1.6 roots: 0.10 to 0.18 and 0.10 for windows of 255 tokens, if
# these were independent. The factor of a rate is the root of the design effect in a window.
LAWS: Mapping[str, Law] = {
    "perplexity": Law("relative", 0.75, 0.9),
    "base_perplexity": Law("relative", 0.75, 0.9),
    "perplexity_delta": Law("proportional", 1.1, 0.7),
    "log_perplexity_delta": Law("root", 0.10, 0.3),
    "perplexity_ratio": Law("root", 0.10, 0.3),
    "kl.mean": Law("proportional", 0.30, 0.9),
    "kl.median": Law("proportional", 0.30, 0.8),
    "kl.p99": Law("proportional", 0.50, 0.7),
    "kl.tail": Law("rate", 1.6, 0.2),
    "top1_agreement": Law("rate", 1.7, 0.6),
    "snr_db": Law("constant", 0.7, 0.7),
    "cosine": Law("proportional", 0.20, 0.7),
}


@dataclass(frozen=True)
class Spread:
    """How windows of one candidate differ in one measure.

    Attributes:
        metric: the measure. source: in words, where it is from.
        factor, correlation: as in `Law`, from there.
        value: of the measure, if it is this candidate's own.
        base_perplexity: of the base model, where it is known.
    """

    metric: str
    source: str
    factor: float
    correlation: float
    value: float | None = None
    base_perplexity: float | None = None

    def deviation(self, truth: float, tokens: float) -> float:
        """Standard deviation of the means of windows with so many tokens, if `truth` is true."""
        base, _ = split_domain(self.metric)
        kind = LAWS[base].kind
        if kind == "rate":
            share = min(max(truth, 0.0), 1.0)
            return self.factor * math.sqrt(share * (1 - share) / tokens)
        if kind == "relative":
            return self.factor * abs(truth)
        if kind == "constant":
            return self.factor
        damage = max(0.0, _damage(base, truth))
        return self.factor * (damage if kind == "proportional" else math.sqrt(damage))


def _damage(base: str, value: float) -> float:
    """The distance of a measure from that of an exact copy."""
    if base in ("cosine", "top1_agreement"):
        return 1 - value
    if base == "perplexity_ratio":
        return math.log(value) if value > 0 else 0.0
    return value


def at_share(
    metric: str, budget: float, share: float, base_perplexity: float | None
) -> float | None:
    """What the measure of a candidate is that has this share of the damage a budget allows.

    None where the budget allows none, or where that depends on the base model and is not known.
    """
    base, _ = split_domain(metric)
    if base == "snr_db":
        return budget - 10 * math.log10(share)
    if base == "base_perplexity":  # which no candidate changes
        return None
    if base == "perplexity":
        if base_perplexity is None or budget <= base_perplexity:
            return None
        return base_perplexity + share * (budget - base_perplexity)
    exact = {"perplexity_ratio": 1.0, "top1_agreement": 1.0, "cosine": 1.0}.get(base, 0.0)
    allowed = exact - budget if base in ("top1_agreement", "cosine") else budget - exact
    return exact + share * (budget - exact) if allowed > 0 else None


def assumed(metric: str) -> Spread:
    """The spread of a candidate of which nothing is known."""
    law = LAWS[split_domain(metric)[0]]
    return Spread(metric, "assumed", law.factor, law.correlation)


@dataclass(frozen=True)
class Measured:
    """A measure of one candidate with two errors of it.

    Attributes:
        value: of the measure.
        error: of it, as documents differ. by_window: as windows do, were they independent.
        documents: of each window.
        kl, base_perplexity: means over the same windows.
        effect: of a rate, the design effect of tokens in windows.
    """

    value: float
    error: float
    by_window: float
    documents: NDArray[np.int64]
    kl: float
    base_perplexity: float
    effect: float | None = None

    def spread(self, metric: str, source: str, *, own: bool) -> Spread | None:
        """The law fitted to it; None where it says nothing, as for an exact copy."""
        base, _ = split_domain(metric)
        law, windows = LAWS[base], self.documents.size
        deviation = self.by_window * math.sqrt(windows)
        if law.kind == "rate":
            factor = math.sqrt(self.effect or 0.0)
        elif law.kind == "relative":
            factor = deviation / self.value
        elif law.kind == "constant":
            factor = deviation
        else:
            # By the KL, where the measure itself can be zero or less for a damaged model.
            damage = {
                "perplexity_delta": self.base_perplexity * math.expm1(self.kl),
                "log_perplexity_delta": self.kl,
                "perplexity_ratio": self.kl,
            }.get(base, _damage(base, self.value))
            if damage <= 0:
                return None
            factor = deviation / (damage if law.kind == "proportional" else math.sqrt(damage))
        if factor <= 0:
            return None
        return Spread(
            metric,
            source,
            factor,
            self._correlation(law),
            self.value if own else None,
            self.base_perplexity,
        )

    def _correlation(self, law: Law) -> float:
        """Of windows of one document, from what documents add to the variance."""
        sizes = np.bincount(cluster_index(self.documents))
        each = float(np.square(sizes).sum() / sizes.sum())
        # With hardly two windows to a document, it is not seen.
        if each < 1.25 or self.by_window <= 0 or self.error <= 0:
            return law.correlation
        effect = (self.error / self.by_window) ** 2
        return min(1.0, max(0.0, (effect - 1) / (each - 1)))
