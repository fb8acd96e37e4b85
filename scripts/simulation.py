"""Simulated runs of the gates, on texts drawn from windows that a candidate was run on once.

A text is drawn in one of three ways. Other text: documents with replacement, whatever their domain;
the truth is the value over all of them. This is what intervals are about. Same mix: with as many
documents of each domain as there are; an interval that does not know of the domains is too wide for
that. Same text: the documents as they are, of which each run sees other windows (`--qlab-seed`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.data.windows import looks_of, systematic_sample
from pytest_qlab.decision import Decision, Look, decide
from pytest_qlab.directions import direction_of
from pytest_qlab.estimate import Estimate
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.metrics.tokens import TokenArrays

Design = Literal["other text", "same mix", "same text"]
MEASURES: dict[str, Callable[[Fidelity], Estimate]] = {
    "perplexity": lambda found: found.perplexity,
    "perplexity_delta": lambda found: found.perplexity_delta,
    "log_perplexity_delta": lambda found: found.log_perplexity_delta,
    "kl.mean": lambda found: found.kl_mean,
    "kl.median": lambda found: found.kl.median,
    "kl.p99": lambda found: found.kl.p99,
    "top1_agreement": lambda found: found.top1_agreement,
    "snr_db": lambda found: found.hidden_snr_db,
    "cosine": lambda found: found.hidden_cosine,
}
GATED = tuple(name for name in MEASURES if name != "perplexity")
RESAMPLED = ("kl.median", "kl.p99")
"""Whose bootstrap takes most of the time."""
DOCUMENTS, WINDOWS = 45, 64
"""Of the embedded evaluation text, and of a run by default."""
FACTORS = (0.25, 1 / 1.5, 1.0, 1.5, 2.0, 4.0)
"""Budgets, in units of the damage."""


@dataclass(frozen=True)
class Population:
    """What a candidate does to every window of a corpus, and what runs draw from it.

    Attributes:
        tokens: of all windows, in the order of the documents.
        domains: of each document.
    """

    tokens: TokenArrays
    domains: tuple[str, ...]

    @cached_property
    def truth(self) -> Fidelity:
        """All measures on everything there is."""
        return Fidelity(self.tokens, domains=self.domains)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where the tokens of each window begin, and where the last ones end."""
        windows = np.arange(len(self.tokens.document) + 1)
        return np.searchsorted(self.tokens.window, windows).astype(np.int64)

    @cached_property
    def _of_domain(self) -> dict[str, list[int]]:
        names = dict.fromkeys(self.domains)
        return {name: [i for i, d in enumerate(self.domains) if d == name] for name in names}

    @cached_property
    def _windows(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.domains]
        for window, document in enumerate(self.tokens.document.tolist()):
            found[document].append(window)
        return found

    def balanced(self) -> Population:
        """The first documents of each domain, equally many of all."""
        least = min(len(members) for members in self._of_domain.values())
        return self.of(sorted(i for each in self._of_domain.values() for i in each[:least]))

    def of(self, documents: Sequence[int]) -> Population:
        """Only some documents."""
        text = [(window, place) for place, i in enumerate(documents) for window in self._windows[i]]
        return Population(self._taken(text), tuple(self.domains[i] for i in documents))

    def draw(
        self, generator: np.random.Generator, design: Design, documents: int = DOCUMENTS
    ) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
        """A text: (window of the population, document of the text) in order; each one's domain."""
        if design == "same text":
            drawn = list(range(len(self.domains)))
        elif design == "same mix":
            share = documents // len(self._of_domain)
            drawn = [
                i for own in self._of_domain.values() for i in generator.choice(own, share).tolist()
            ]
        else:
            rank = {name: place for place, name in enumerate(self._of_domain)}
            drawn = generator.integers(len(self.domains), size=documents).tolist()
            drawn.sort(key=lambda i: rank[self.domains[i]])
        text = [(window, place) for place, i in enumerate(drawn) for window in self._windows[i]]
        return text, tuple(self.domains[i] for i in drawn)

    def run(
        self,
        generator: np.random.Generator,
        design: Design,
        *,
        documents: int = DOCUMENTS,
        windows: int = WINDOWS,
    ) -> Run:
        """A run of the gates on a text of its own, with a window seed of its own."""
        text, domains = self.draw(generator, design, documents)
        seed = int(generator.integers(2**31))
        sample = systematic_sample(text, windows, seed)
        looks = looks_of(len(sample), seed)
        parts = [self._taken([sample[number] for number in numbers]) for numbers in looks]
        return Run(parts, looks, domains)

    def _taken(self, text: Sequence[tuple[int, int]]) -> TokenArrays:
        numbers = [window for window, _ in text]
        starts, ends = self._starts[numbers], self._starts[[n + 1 for n in numbers]]
        places = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        arrays: dict[str, Any] = {
            each.name: getattr(self.tokens, each.name)[places]
            for each in fields(TokenArrays)
            if each.name not in ("window", "document")
            and getattr(self.tokens, each.name) is not None
        }
        own = np.arange(len(numbers), dtype=np.int32)
        document = np.array([place for _, place in text], dtype=np.int32)
        return TokenArrays(**arrays, window=np.repeat(own, ends - starts), document=document)


@dataclass
class Run:
    """One simulated run of the gates: what `quantized` is to a test, look by look."""

    parts: list[TokenArrays]
    looks: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]
    _found: dict[int, Fidelity] = field(default_factory=dict)

    def upto(self, look: int) -> Fidelity:
        """All measures on the windows of a look and all before it."""
        if look not in self._found:
            tokens = TokenArrays.joined(self.parts[: look + 1], self.looks[: look + 1])
            self._found[look] = Fidelity(tokens, domains=self.domains)
        return self._found[look]

    @property
    def all(self) -> Fidelity:
        """All measures on all windows of the run."""
        return self.upto(len(self.looks) - 1)

    def decide(self, metric: str, budget: float) -> Decision:
        """What `quantized.METRIC.within(budget)` or `.at_least(budget)` says."""

        def at(look: int) -> Callable[[], Estimate]:
            return lambda: MEASURES[metric](self.upto(look))

        counts = accumulate(len(numbers) for numbers in self.looks)
        found = [Look(count, at(look)) for look, count in enumerate(counts)]
        op: Literal["<=", ">="] = "<=" if direction_of(metric) == "lower" else ">="
        return decide(lambda: found, op, budget, 0.95, metric=metric, candidate="")


def budget_at(metric: str, truth: float, factor: float) -> float:
    """A budget that allows `factor` times the damage there is.

    Damage is what the measure is from that of an exact copy; for `snr_db` the noise's power.
    """
    if metric == "snr_db":
        return truth - 10 * math.log10(factor)
    if direction_of(metric) == "higher":
        return 1 - factor * (1 - truth)
    return factor * truth


@dataclass
class Coverage:
    """How often intervals had the truth in them, were above it, and were below it."""

    within: int = 0
    above: int = 0
    below: int = 0

    @property
    def share(self) -> float:
        """Of all intervals, those with the truth in them."""
        return self.within / (self.within + self.above + self.below)

    def count(self, estimate: Estimate, truth: float) -> None:
        """Count one more."""
        assert estimate.lower is not None
        assert estimate.upper is not None
        self.within += estimate.lower <= truth <= estimate.upper
        self.above += estimate.lower > truth
        self.below += estimate.upper < truth


@dataclass
class Gate:
    """What runs made of one budget."""

    outcomes: Counter[str] = field(default_factory=Counter)
    windows: list[int] = field(default_factory=list)

    def count(self, decision: Decision) -> None:
        """Count one more."""
        assert decision.windows is not None
        self.outcomes[str(decision.outcome)] += 1
        self.windows.append(decision.windows)

    def share(self, outcome: str) -> float:
        """Of all runs, those with that outcome."""
        return self.outcomes[outcome] / self.outcomes.total()

    @property
    def agreement(self) -> float:
        """Share of the runs that have the most frequent outcome."""
        return max(self.outcomes.values()) / self.outcomes.total()

    @property
    def mean_windows(self) -> float:
        """How many windows were drawn until it was decided."""
        return sum(self.windows) / len(self.windows)


@dataclass
class Simulation:
    """All that was counted for one candidate in one design."""

    coverage: dict[str, Coverage] = field(default_factory=dict)
    gates: dict[tuple[str, float], Gate] = field(default_factory=dict)


def simulate(
    population: Population,
    design: Design,
    runs: int,
    *,
    measures: Sequence[str] = tuple(MEASURES),
    factors: Sequence[float] = FACTORS,
    resampled: int | None = None,
    documents: int = DOCUMENTS,
    windows: int = WINDOWS,
    seed: int = 1,
) -> Simulation:
    """Simulated runs of one candidate.

    Args:
        population: the candidate's.
        design: how a run comes by its text.
        runs: how many.
        measures: by name.
        factors: of the budgets that each run holds; where there is no damage there are none.
        resampled: how many runs hold budgets for `RESAMPLED`; by default all.
        documents: of a text, unless it is the same. windows: of a run, at most.
    """
    generator = np.random.default_rng(seed)
    truth = {name: float(MEASURES[name](population.truth)) for name in measures}
    found = Simulation({name: Coverage() for name in measures})
    held = {
        (name, factor): budget_at(name, truth[name], factor)
        for name in measures
        for factor in factors
        if name in GATED and truth[name] > 0
    }
    found.gates = {key: Gate() for key in held}
    for number in range(runs):
        run = population.run(generator, design, documents=documents, windows=windows)
        for name in measures:
            found.coverage[name].count(MEASURES[name](run.all), truth[name])
        if number == resampled:
            held = {key: budget for key, budget in held.items() if key[0] not in RESAMPLED}
        for key, budget in held.items():
            found.gates[key].count(run.decide(key[0], budget))
    return found
