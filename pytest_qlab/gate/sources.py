"""Where a plan knows from how much windows differ: the store, a saved baseline, or an assumption.

Nothing is computed that is not there, and no model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.directions import RATES, split_domain
from pytest_qlab.errors import MetricError
from pytest_qlab.gate.spreads import Measured, Spread
from pytest_qlab.measuring.stored import CODE_VERSION, FACTS, TOKENS
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.metrics.tokens import TokenArrays
from pytest_qlab.stats.distributions import t_quantile
from pytest_qlab.stats.paired import cluster_index, mean_influence, standard_error

if TYPE_CHECKING:
    from pytest_qlab.estimate import Estimate
    from pytest_qlab.gate.baselines import Baseline
    from pytest_qlab.lab import Lab
    from pytest_qlab.specs import MethodSpec


class StoredSpreads:
    """What the store has of candidates on the same text; reading it loads no model."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._read: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}

    def spread(self, spec: MethodSpec, metric: str) -> Spread | None:
        """From what is most like the candidate; None where nothing was evaluated on this text."""
        ours = self._lab.quantized_identity(spec.method)
        evaluation = self._lab.evaluation.identity

        def rank(group: _Group) -> tuple[bool, bool, bool, int]:
            itself = group.quantized == ours
            alike = group.quantized.get("method") == spec.method.name
            return itself, group.evaluation == evaluation, alike, len(group.entries)

        for group in sorted(self._groups, key=rank, reverse=True):
            itself = group.quantized == ours
            source = "itself" if itself else f"another {group.quantized.get('method')}"
            measured = group.measured(metric)
            if measured is None:
                continue
            source += f", {measured.documents.size} windows"
            spread = measured.spread(metric, source, own=itself)
            if spread is not None:
                return spread
        return None

    @cached_property
    def _groups(self) -> list[_Group]:
        """The stored evaluations of one candidate on one sample of windows, together."""
        base = {**self._lab.reference.identity()}
        text = _text(base.pop("evaluation"))
        groups: dict[str, _Group] = {}
        for parts in self._lab.store.entries("fidelity"):
            reference = dict(parts.get("reference") or {})
            evaluation = reference.pop("evaluation", {})
            reference.pop("look", None)
            same = reference == base and _text(evaluation) == text
            if not same or parts.get("code") != CODE_VERSION:
                continue
            key = json.dumps([parts["quantized"], evaluation], sort_keys=True)
            group = groups.setdefault(key, _Group(self._lab, parts["quantized"], evaluation))
            group.entries.append(parts)
        return list(groups.values())


def _text(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What of an evaluation set says which text it is, and not which of its windows."""
    return {key: part for key, part in evaluation.items() if key not in ("maximum", "seed")}


class _Group:
    """One candidate on some windows of the text."""

    def __init__(self, lab: Lab, quantized: dict[str, Any], evaluation: dict[str, Any]) -> None:
        self._lab = lab
        self.quantized = quantized
        self.evaluation = evaluation
        self.entries: list[Mapping[str, Any]] = []

    @cached_property
    def _fidelities(self) -> tuple[Fidelity, Fidelity]:
        """With documents as clusters, and with every window by itself."""
        parts, facts = [], {}
        for entry in self.entries:
            directory = self._lab.store.path("fidelity", entry)
            facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
            parts.append(_tokens(directory))
        ends = np.cumsum([0, *(len(part.document) for part in parts)]).tolist()
        places = [range(*pair) for pair in pairwise(ends)]
        tokens = TokenArrays.joined(parts, places)
        domains: Sequence[str] = facts["domains"]
        alone = replace(tokens, document=np.arange(len(tokens.document), dtype=np.int32))
        of_window = [domains[number] for number in tokens.document]
        return Fidelity(tokens, domains=domains), Fidelity(alone, domains=of_window)

    @cached_property
    def _estimates(self) -> dict[str, list[dict[str, Estimate]]]:
        return {}

    def measured(self, metric: str) -> Measured | None:
        """The measure with its errors; None where it was not measured, or has none."""
        base, domain = split_domain(metric)
        try:
            by_document, alone = (
                each.domain(domain) if domain else each for each in self._fidelities
            )
        except MetricError:
            return None
        if domain not in self._estimates:
            self._estimates[domain] = [
                each.estimates(by_domain=False) for each in (by_document, alone)
            ]
        suffix = f"[{domain}]" if domain else ""
        found, single = (each.get(f"{base}{suffix}") for each in self._estimates[domain])
        if found is None or single is None:
            return None
        rows = by_document.windows
        return Measured(
            float(found),
            _error(found),
            _error(single),
            rows["document"],
            float(by_document.kl.mean),
            float(by_document.base_perplexity),
            single.design_effect,
        )


def _tokens(directory: Path) -> TokenArrays:
    from safetensors.torch import load_file

    return TokenArrays.from_tensors(load_file(directory / TOKENS))


def _error(estimate: Estimate) -> float:
    """Standard error of an estimate; from its interval where it has none. 0 where unknown."""
    if estimate.standard_error is not None:
        return estimate.standard_error
    if estimate.lower is None or estimate.upper is None or (estimate.clusters or 0) < 2:
        return 0.0
    t = t_quantile((1 + estimate.confidence) / 2, (estimate.clusters or 2) - 1)
    return (estimate.upper - estimate.lower) / (2 * t)


def saved_spread(baseline: Baseline, name: str, candidate: str, metric: str) -> Spread | None:
    """From the sums per window of a saved baseline: of the candidate, else of any of its others."""
    windows = baseline.windows
    base, domain = split_domain(metric)
    if windows is None or (domain and domain not in windows.domains):
        return None
    kept = np.ones(len(windows.tokens), dtype=bool)
    if domain:
        kept = np.asarray(windows.domain) == windows.domains.index(domain)
    tokens, documents = np.asarray(windows.tokens)[kept], np.asarray(windows.document)[kept]
    for key in sorted(baseline.candidates, key=lambda each: each != candidate):
        sums = baseline.candidates[key].sums
        if sums is None:
            continue
        columns = {
            part: np.asarray(values, dtype=np.float64)[kept]
            for part, values in (
                ("base_nll", windows.base_nll),
                ("delta", sums.delta),
                ("kl", sums.kl),
                ("tail", sums.tail),
                ("agree", sums.agree),
            )
        }
        measured = _from_sums(base, tokens, documents, columns)
        if measured is None:
            continue
        source = f"{'itself' if key == candidate else key} in {name}, {tokens.size} windows"
        spread = measured.spread(metric, source, own=key == candidate)
        if spread is not None:
            return spread
    return None


def _from_sums(
    base: str, tokens: NDArray[Any], documents: NDArray[Any], sums: Mapping[str, NDArray[Any]]
) -> Measured | None:
    total = float(tokens.sum())
    means = {name: float(each.sum()) / total for name, each in sums.items()}
    start = math.exp(means["base_nll"])
    ours = start * math.exp(means["delta"])

    def influence(column: NDArray[Any]) -> NDArray[Any]:
        return mean_influence(column, tokens)

    found: tuple[float, NDArray[Any]] | None = {
        "kl.mean": (means["kl"], influence(sums["kl"])),
        "kl.tail": (means["tail"], influence(sums["tail"])),
        "top1_agreement": (means["agree"], influence(sums["agree"])),
        "log_perplexity_delta": (means["delta"], influence(sums["delta"])),
        "perplexity_ratio": (ours / start, ours / start * influence(sums["delta"])),
        "perplexity": (ours, ours * influence(sums["base_nll"] + sums["delta"])),
        "perplexity_delta": (
            ours - start,
            ours * influence(sums["base_nll"] + sums["delta"])
            - start * influence(sums["base_nll"]),
        ),
    }.get(base)
    if found is None:
        return None
    value, parts = found
    error = standard_error(parts, cluster_index(documents)) or 0.0
    by_window = standard_error(parts, np.arange(tokens.size)) or 0.0
    effect = None
    if base in RATES and 0 < value < 1:
        effect = by_window**2 / (value * (1 - value) / total)
    return Measured(value, error, by_window, documents, means["kl"], start, effect)
