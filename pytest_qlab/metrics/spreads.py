"""Means, rates and quantiles of the per-token arrays, with the spread between documents.

What `Fidelity` makes named estimates of. Documents are the clusters; see `stats/paired.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.metrics.tokens import TokenArrays
from pytest_qlab.stats.bootstrap import BootstrapQuantile, clustered_quantiles
from pytest_qlab.stats.paired import Spread, cluster_index, token_mean
from pytest_qlab.stats.rates import rate_interval

MEANS: Mapping[str, str] = {
    "perplexity": "nll",
    "base_perplexity": "base_nll",
    "log_perplexity_delta": "delta",
    "perplexity_ratio": "delta",
    "kl.mean": "kl",
    "kl.tail": "tail",
    "top1_agreement": "agree",
    "cosine": "cosine",
}
"""Measures that are means over tokens, or follow from one, and the mean in `Spreads.means`."""

# Design effects of rates below it are those of a few documents that happen to agree.
_LEAST_EFFECT = 0.01


class Spreads:
    """Statistics of one set of tokens.

    Args:
        tokens: the comparisons.
        seed: of the bootstrap.

    Attributes:
        clusters: int64 (W,), the cluster of each window that has scored tokens.
        n: how many tokens were scored.
    """

    def __init__(self, tokens: TokenArrays, *, seed: int = 0) -> None:
        self._tokens, self._seed = tokens, seed
        self.clusters = cluster_index(tokens.windows["document"])
        self.n = int(tokens.windows["tokens"].sum())

    @cached_property
    def means(self) -> dict[str, Spread]:
        """Means over tokens: `nll` and `base_nll`, `delta`, `kl`, nats; `tail`, `agree`, `cosine`.

        `cosine` is left out where hidden states were not compared.
        """
        rows = self._tokens.windows
        columns = {
            "nll": ("candidate_nll", "candidate_nll_squared"),
            "base_nll": ("base_nll", "base_nll_squared"),
            "delta": ("delta", "delta_squared"),
            "kl": ("kl", "kl_squared"),
            # 0 and 1 are their own squares.
            "tail": ("kl_tail", "kl_tail"),
            "agree": ("agree", "agree"),
        }
        if self._tokens.has_hidden:
            columns["cosine"] = ("hidden_cosine", "hidden_cosine_squared")
        return {
            name: token_mean(rows[sums], rows["tokens"], self.clusters, squares=rows[squares])
            for name, (sums, squares) in columns.items()
        }

    @cached_property
    def kl_quantiles(self) -> list[BootstrapQuantile]:
        """Median and 99th percentile of KL, nats."""
        of_window = np.zeros(len(self._tokens.document), dtype=np.int64)
        of_window[self._tokens.windows["window"]] = self.clusters
        clusters: NDArray[np.int64] = of_window[self._tokens.window]
        return clustered_quantiles(self._tokens.kl, clusters, (0.5, 0.99), seed=self._seed)

    def rate(self, name: str) -> Spread:
        """A mean that is a share of the tokens, with the interval of Korn and Graubard.

        Where documents do not differ, as where no token is of the kind, there is no design effect
        to see; that of the tokens with the most divergence stands in for it.
        """
        found = self.means[name]
        seen = found.design_effect
        if found.standard_error == 0 or (seen is not None and seen < _LEAST_EFFECT):
            found = replace(found, design_effect=max(1.0, self._worst_effect or 1.0))
        lower, upper = rate_interval(found.value, self.n, found.clusters, found.design_effect)
        return replace(found, lower=lower, upper=upper)

    @cached_property
    def _worst_effect(self) -> float | None:
        """Design effect of the share of tokens that are beyond the 99th percentile of KL."""
        tokens, rows = self._tokens, self._tokens.windows
        worst = tokens.kl > float(self.kl_quantiles[1].value)
        sums = np.bincount(tokens.window, weights=worst, minlength=len(tokens.document))
        sums = sums[rows["window"]]
        return token_mean(sums, rows["tokens"], self.clusters, squares=sums).design_effect
