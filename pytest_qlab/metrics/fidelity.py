"""How far a candidate's predictions are from the base model's, with intervals.

All measures come from the same per-token arrays. Documents are the clusters: means weight windows
by their scored tokens and get cluster-robust intervals, quantiles a bootstrap over documents. What
compares candidate and baseline is paired, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.errors import MetricError, did_you_mean
from pytest_qlab.estimate import Estimate
from pytest_qlab.metrics.kl import KlEstimates
from pytest_qlab.metrics.spreads import MEANS, Spreads
from pytest_qlab.metrics.tokens import TAIL_NATS, TokenArrays
from pytest_qlab.stats.paired import Spread, log_ratio, mean_influence, spread

SNR_CAP_DB = 200.0
"""What the SNR of an exact copy is reported as; no SNR is more, nor less than its negative."""


class Fidelity:
    """Measures of one candidate on one evaluation set.

    Args:
        tokens: the comparisons.
        domains: of each document, by its number.
        candidate: id of the candidate. convention: how windows were cut, such as `spread512`.
        name: of the evaluation set.
        seed: of the bootstrap.
        domain: the domain that the tokens are restricted to; becomes part of metric names, such as
            `kl.mean[code]`.
        floor: finds the noise floor of each measure of KL, by name; called when KL is first looked
            at, unless the candidate is an exact copy, which has none.
    """

    def __init__(
        self,
        tokens: TokenArrays,
        *,
        domains: Sequence[str],
        candidate: str = "",
        convention: str = "",
        name: str = "",
        seed: int = 0,
        domain: str = "",
        floor: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        if int(tokens.document.max()) >= len(domains):
            raise ValueError(f"document {int(tokens.document.max())} has no domain")
        self.tokens, self.candidate, self.convention = tokens, candidate, convention
        self.name, self.seed, self.domain_name = name, seed, domain
        self._floor = floor
        self._domains = tuple(domains)
        self._spreads = Spreads(tokens, seed=seed)

    @property
    def windows(self) -> NDArray[np.void]:
        """Sums per window, of dtype `WINDOW_SUMS`: all that gates on means need."""
        return self.tokens.windows

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything measured, as plain tensors."""
        return self.tokens.to_tensors()

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        domains: Sequence[str],
        candidate: str = "",
        convention: str = "",
        name: str = "",
        seed: int = 0,
    ) -> Self:
        """The inverse of `to_tensors`; the other arguments as for the constructor."""
        return cls(
            TokenArrays.from_tensors(tensors),
            domains=domains,
            candidate=candidate,
            convention=convention,
            name=name,
            seed=seed,
        )

    # --- single measures -------------------------------------------------------------------

    @cached_property
    def perplexity(self) -> Estimate:
        """exp of the candidate's mean negative log-likelihood; the interval is not paired."""
        return self._exponential("perplexity", self._spreads.means["nll"])

    @cached_property
    def base_perplexity(self) -> Estimate:
        """exp of the baseline's mean negative log-likelihood; the interval is not paired."""
        return self._exponential("base_perplexity", self._spreads.means["base_nll"])

    @cached_property
    def log_perplexity_delta(self) -> Estimate:
        """ln(candidate's perplexity / baseline's), nats: the paired mean of the token losses."""
        return self._estimate("log_perplexity_delta", self._spreads.means["delta"], unit="nats")

    @cached_property
    def perplexity_ratio(self) -> Estimate:
        """Candidate's perplexity / baseline's, paired."""
        found = self._spreads.means["delta"]
        return self._exponential("perplexity_ratio", found)

    @cached_property
    def perplexity_delta(self) -> Estimate:
        """Candidate's perplexity - baseline's; the paired interval by the delta method."""
        base = self._exp(self._spreads.means["base_nll"].value)
        ours = self._exp(self._spreads.means["nll"].value)
        rows = self.windows
        influence = ours * mean_influence(rows["candidate_nll"], rows["tokens"])
        influence -= base * mean_influence(rows["base_nll"], rows["tokens"])
        value = base * math.expm1(self._spreads.means["delta"].value)
        return self._estimate("perplexity_delta", spread(value, influence, self._spreads.clusters))

    @cached_property
    def kl_mean(self) -> Estimate:
        """`kl.mean` by itself, for which no quantile is resampled."""
        mean = self._spreads.means["kl"]
        lower = None if mean.lower is None else max(0.0, mean.lower)
        return self._make("kl.mean", mean.value, lower, mean.upper, unit="nats", found=mean)

    @cached_property
    def kl(self) -> KlEstimates:
        """KL(base || candidate) per token."""
        median, p99 = self._spreads.kl_quantiles
        tail = int(self.windows["kl_tail"].sum())
        above = f"{tail:,} of {self._spreads.n:,} tokens above {TAIL_NATS:g} nat"
        return KlEstimates(
            self.kl_mean,
            self._make("kl.median", median.value, median.lower, median.upper, unit="nats"),
            self._make("kl.p99", p99.value, p99.lower, p99.upper, unit="nats"),
            self._make("kl.max", float(self.tokens.kl.max()), unit="nats", extra=above),
            self._rate("kl.tail", "tail", above),
        )

    @cached_property
    def top1_agreement(self) -> Estimate:
        """Share of tokens for which both models find the same token most likely.

        An exact copy agrees by construction, and its interval has no width.
        """
        agreeing = int(self.windows["agree"].sum())
        return self._rate("top1_agreement", "agree", f"{agreeing:,} tokens agree")

    @cached_property
    def hidden_snr_db(self) -> Estimate:
        """10 log10(sum h^2 / sum (h - h')^2) over final hidden states; 200 dB at most.

        200 dB is the documented value for an exact copy, whose SNR is infinite.
        """
        self._need_hidden("snr_db")
        rows = self.windows
        signal, error = rows["hidden_signal"], rows["hidden_error"]
        if error.sum() == 0 or signal.sum() == 0:
            limit = SNR_CAP_DB if error.sum() == 0 else -SNR_CAP_DB
            return self._make("snr_db", limit, limit, limit, unit="dB")
        found = log_ratio(signal, error, self._spreads.clusters)
        lower = None if found.lower is None else _decibels(found.lower)
        upper = None if found.upper is None else _decibels(found.upper)
        # In decibels too, so that the error is that of the value.
        scaled = replace(found, standard_error=_scaled(found.standard_error, 10 / math.log(10)))
        return self._make("snr_db", _decibels(found.value), lower, upper, unit="dB", found=scaled)

    @cached_property
    def hidden_cosine(self) -> Estimate:
        """Mean over tokens of the cosine between final hidden states."""
        self._need_hidden("cosine")
        found = self._spreads.means["cosine"]
        upper = None if found.upper is None else min(1.0, found.upper)
        return self._make("cosine", found.value, found.lower, upper, found=found)

    # --- all of them -----------------------------------------------------------------------

    def estimates(self, *, by_domain: bool = True) -> dict[str, Estimate]:
        """All measures by dotted name; those of a domain as `kl.mean[code]`.

        Domains are left out where there is only one. Hidden-state measures are left out where
        hidden states were not compared.
        """
        found = [
            self.perplexity,
            self.base_perplexity,
            self.perplexity_delta,
            self.log_perplexity_delta,
            self.perplexity_ratio,
            self.kl.mean,
            self.kl.median,
            self.kl.p99,
            self.kl.max,
            self.kl.tail,
            self.top1_agreement,
        ]
        if self.tokens.has_hidden:
            found += [self.hidden_snr_db, self.hidden_cosine]
        named = {estimate.metric: estimate for estimate in found}
        if by_domain and len(self.domains) > 1:
            for domain in self.domains:
                named.update(self.domain(domain).estimates(by_domain=False))
        return named

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The domains that have scored tokens, in the order of their documents."""
        present = np.unique(self.windows["document"])
        return tuple(dict.fromkeys(self._domains[number] for number in present))

    def domain(self, name: str) -> Fidelity:
        """The same measures on the documents of one domain.

        Raises:
            MetricError: no scored token belongs to it.
        """
        if name not in self._restricted:
            members = [number for number, domain in enumerate(self._domains) if domain == name]
            tokens = self.tokens.of_documents(members)
            if tokens is None:
                raise MetricError(
                    f"No scored token belongs to a domain {name!r}."
                    f"{did_you_mean(name, self.domains)}"
                )
            self._restricted[name] = Fidelity(
                tokens,
                domains=self._domains,
                candidate=self.candidate,
                convention=self.convention,
                name=self.name,
                seed=self.seed,
                domain=name,
                floor=self._floor,
            )
        return self._restricted[name]

    def design_effect(self, metric: str) -> float | None:
        """Squared standard error of a mean over that of independent tokens.

        None where an interval is not defined: with a single document of few windows.

        Args:
            metric: one of perplexity, log_perplexity_delta, kl.mean, kl.tail, top1_agreement,
                cosine.

        Raises:
            MetricError: the metric is not a mean over tokens.
        """
        name = MEANS.get(metric)
        if name is None:
            raise MetricError(
                f"There is no design effect of {metric!r}: it is defined for means over tokens."
                f"{did_you_mean(metric, MEANS)}"
            )
        if name == "cosine":
            self._need_hidden(metric)
        return self._spreads.means[name].design_effect

    # --- parts -----------------------------------------------------------------------------

    @cached_property
    def _restricted(self) -> dict[str, Fidelity]:
        return {}

    @cached_property
    def _floors(self) -> Mapping[str, float]:
        return {} if self.tokens.identical else self._floor()

    @cached_property
    def _detail(self) -> str:
        base, ours = self._spreads.means["base_nll"].value, self._spreads.means["nll"].value
        where = " ".join(part for part in (self.domain_name, self.name) if part)
        return (
            f"perplexity {self._exp(base):.4g} -> {self._exp(ours):.4g} on "
            f"{where or 'the evaluation set'} ({len(self.windows):,} windows, "
            f"{self._spreads.n:,} tokens)"
        )

    def _exponential(self, metric: str, found: Spread) -> Estimate:
        value = self._exp(found.value)
        lower, upper = _exp_or_none(found.lower), _exp_or_none(found.upper)
        scaled = replace(found, standard_error=_scaled(found.standard_error, value))
        return self._make(metric, value, lower, upper, found=scaled)

    def _exp(self, mean_nll: float) -> float:
        value = _exp_or_none(mean_nll)
        if value is None:
            raise MetricError(
                f"The perplexity of {self.candidate or 'the candidate'} overflows: its mean loss "
                f"is {mean_nll:.4g} nats per token. The model is broken; check the quantized "
                "layers or use more bits."
            )
        return value

    def _estimate(self, metric: str, found: Spread, *, unit: str = "") -> Estimate:
        return self._make(metric, found.value, found.lower, found.upper, unit=unit, found=found)

    def _make(
        self,
        metric: str,
        value: float,
        lower: float | None = None,
        upper: float | None = None,
        *,
        unit: str = "",
        extra: str = "",
        found: Spread | None = None,
    ) -> Estimate:
        if lower is None and metric in _DIFFERENCES and self.tokens.identical:
            lower = upper = value  # An exact copy has none on other text either.
        details: dict[str, Any] = {
            "candidate": self.candidate,
            "n": self._spreads.n,
            "clusters": int(self._spreads.clusters.max()) + 1,
            "convention": self.convention,
            "detail": f"{self._detail}; {extra}" if extra else self._detail,
            "standard_error": None if found is None else found.standard_error,
            "design_effect": None if found is None else found.design_effect,
            "floor": self._floors.get(metric) if metric.startswith("kl.") else None,
        }
        suffix = f"[{self.domain_name}]" if self.domain_name else ""
        return Estimate(
            value, metric=f"{metric}{suffix}", lower=lower, upper=upper, unit=unit, **details
        )

    def _rate(self, metric: str, name: str, extra: str) -> Estimate:
        found = self._spreads.rate(name)
        lower, upper = found.lower, found.upper
        if self.tokens.identical:
            lower = upper = found.value
        return self._make(metric, found.value, lower, upper, extra=extra, found=found)

    def _need_hidden(self, metric: str) -> None:
        if not self.tokens.has_hidden:
            raise MetricError(
                f"{metric} needs final hidden states, but this evaluation compared whole logits, "
                "because the model's head could not be run by hand. Use kl.mean instead."
            )


_DIFFERENCES = frozenset(
    {
        "perplexity_delta",
        "log_perplexity_delta",
        "perplexity_ratio",
        "kl.mean",
        "kl.median",
        "kl.p99",
    }
)


def _scaled(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor


def _decibels(log_ratio_of_powers: float) -> float:
    return min(SNR_CAP_DB, max(-SNR_CAP_DB, log_ratio_of_powers * 10 / math.log(10)))


def _exp_or_none(value: float | None) -> float | None:
    """exp, or None for an unbounded interval or a number that overflows."""
    return None if value is None or value > 700 else math.exp(value)
