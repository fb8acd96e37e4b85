"""A candidate's measures of damage, each on as many windows as whoever looks at it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pytest_qlab.decision import Look
from pytest_qlab.gate.deferred import deferred
from pytest_qlab.metrics.fidelity import Fidelity

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.estimate import Estimate

MEASURES: Mapping[str, Callable[[Fidelity], Estimate]] = {
    "perplexity": lambda found: found.perplexity,
    "perplexity_delta": lambda found: found.perplexity_delta,
    "perplexity_ratio": lambda found: found.perplexity_ratio,
    "log_perplexity_delta": lambda found: found.log_perplexity_delta,
    "kl.mean": lambda found: found.kl.mean,
    "kl.median": lambda found: found.kl.median,
    "kl.p99": lambda found: found.kl.p99,
    "kl.max": lambda found: found.kl.max,
    "kl.tail": lambda found: found.kl.tail,
    "top1_agreement": lambda found: found.top1_agreement,
    "snr_db": lambda found: found.hidden_snr_db,
    "cosine": lambda found: found.hidden_cosine,
}
"""What draws windows as they are needed, by name. Measures of one domain are of all windows."""


class Damage:
    """The comparisons of one candidate with the base model, by look, and what they say."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._found: dict[int, Fidelity] = {}

    @property
    def seen(self) -> bool:
        """Whether any look was evaluated."""
        return bool(self._found)

    @property
    def complete(self) -> bool:
        """Whether all windows were evaluated; computes nothing."""
        return self.seen and max(self._found) == len(self._candidate.lab.looks) - 1

    def upto(self, look: int) -> Fidelity:
        """All measures on the windows of a look and all before it."""
        if look not in self._found:
            found = self._candidate.evaluation.upto(look)
            if look > max(self._found, default=-1):  # The table shows the most that is known.
                # The base model's perplexity is the same for all; its own row has it.
                known = found.estimates()
                self._candidate.note(
                    {k: e for k, e in known.items() if not k.startswith("base_perplexity")}
                )
            self._found[look] = found
        return self._found[look]

    def measure(self, metric: str) -> Estimate:
        """One of `MEASURES`, which is computed when it is looked at."""
        candidate = self._candidate

        def at(place: int) -> Callable[[], Estimate]:
            return lambda: MEASURES[metric](self.upto(place))

        def looks() -> list[Look]:
            counts = candidate.evaluation.windows()
            return [Look(windows, at(place)) for place, windows in enumerate(counts)]

        return deferred(
            metric, candidate.id, looks, lambda: candidate.lab.evaluation.requested_convention
        )
