"""What may change against a baseline: `--qlab-compare-fail=perplexity_delta:5%,kl.mean:0.002`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pytest_qlab.directions import END_TO_END, LATENCY_PHASES, direction_of, split_domain
from pytest_qlab.errors import SpecError, did_you_mean

PAIRED = (
    "perplexity",
    "perplexity_delta",
    "log_perplexity_delta",
    "perplexity_ratio",
    "kl.mean",
    "kl.tail",
    "top1_agreement",
    "snr_db",
    "cosine",
)
"""Compared window by window; each also by domain, as `kl.mean[code]`."""
COUNTED = (
    "size",
    "compression_ratio",
    "bits_per_weight",
    "model_bits_per_weight",
    "memory.resident",
    "memory.peak",
    "memory.decode_peak",
    "memory.kv_per_token",
    "weights.snr_db",
    "weights.cosine",
    "layer_error",
)
"""Compared as they are: they are counted, not sampled."""
SAMPLED = ("memory.rss_peak",)
"""Compared as they are, although they differ a little from run to run."""
TIMED = tuple(f"latency.{phase}{name}" for phase in LATENCY_PHASES for name in ("p50", "ratio"))
COMPARABLE = (*PAIRED, *COUNTED, *SAMPLED, *TIMED)
_OPTION = "--qlab-compare-fail"


@dataclass(frozen=True)
class Threshold:
    """How much worse a measure may get: `amount` in its unit, or as a share of the saved value."""

    metric: str
    amount: float
    relative: bool

    def margin(self, saved: float) -> float:
        """How much worse than the saved value is still accepted, in the measure's unit."""
        return self.amount * abs(saved) if self.relative else self.amount

    def __str__(self) -> str:
        shown = f"{100 * self.amount:g}%" if self.relative else f"{self.amount:g}"
        return f"{self.metric}:{shown}"


def parse_thresholds(texts: Iterable[str]) -> dict[str, Threshold]:
    """Thresholds by measure, from texts such as `kl.mean:0.002` and `latency.p50:10%`.

    Raises:
        SpecError: not of that form, an unknown measure, one that baselines do not have, or a
            measure that is named twice.
        MetricError: there is no such measure.
    """
    found: dict[str, Threshold] = {}
    for text in texts:
        metric, colon, amount = text.rpartition(":")
        metric, amount = metric.strip(), amount.strip()
        if not colon or not metric:
            raise SpecError(
                f"{_OPTION}: expected MEASURE:AMOUNT or MEASURE:PERCENT%, such as kl.mean:0.002 or "
                f"perplexity_delta:5%, got {text!r}."
            )
        direction_of(metric)
        base, domain = split_domain(metric)
        if base not in COMPARABLE or (domain and base not in PAIRED):
            raise SpecError(f"{_OPTION}: {metric} {_why_not(base)}")
        if metric in found:
            raise SpecError(f"{_OPTION}: {metric} is named twice. Give one threshold for it.")
        found[metric] = Threshold(metric, *_amount(amount, metric))
    return found


def _amount(text: str, metric: str) -> tuple[float, bool]:
    relative = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise SpecError(
            f"{_OPTION}: {metric}:{text} is not an amount. Give a number of at least 0 in the "
            "measure's unit, or a percentage of the saved value, such as 5%."
        )
    return (number / 100, True) if relative else (number, False)


def _why_not(base: str) -> str:
    if base in ("kl.median", "kl.p99", "kl.max"):
        return (
            "needs the values of all tokens, and a baseline keeps sums per window. Use kl.mean, "
            "or hold a budget on it in a test."
        )
    if base.startswith("latency."):
        median = f"{base.rpartition('.')[0]}.p50"
        return f"moves too much from run to run to tell a change. Use {median}."
    if base.startswith(END_TO_END):
        return (
            "moves with the machine, and baselines keep no base model's beside it. Use "
            "latency.ratio, or hold a budget on it in a test."
        )
    if base == "base_perplexity":
        return "is the base model's own and no candidate changes it. Use perplexity_delta."
    return f"is not kept in baselines.{did_you_mean(base, COMPARABLE)}"
