"""Which measures there are by name, and in which direction each of them is better.

The one source of it: tables mark the best value by it, budgets are checked against it, careful
assertions refuse the wrong side by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from pytest_qlab.errors import MetricError, did_you_mean

Direction = Literal["lower", "higher"]

# Damage to predictions, which is also measured on each domain of the evaluation text by itself.
_DAMAGE: Mapping[str, Direction] = {
    "perplexity": "lower",
    "base_perplexity": "lower",
    "perplexity_delta": "lower",
    "log_perplexity_delta": "lower",
    "perplexity_ratio": "lower",
    "kl.mean": "lower",
    "kl.median": "lower",
    "kl.p99": "lower",
    "kl.max": "lower",
    "kl.tail": "lower",
    "top1_agreement": "higher",
    "snr_db": "higher",
    "cosine": "higher",
}
LATENCY_PHASES = ("", "prefill512.", "decode.", "decode512.")
"""What comes between `latency.` and `p50` in the name of a measure; empty for prefill of 128."""
LATENCY_RATIOS = frozenset(f"latency.{phase}ratio" for phase in LATENCY_PHASES)
"""Of these, 1 says that the candidate is as the base model is."""
# Under a load, whose name stands where a domain's would: `serving.ttft.p50[4]`, `[rate=2.5]`.
_UNDER_LOAD: Mapping[str, Direction] = {
    "serving.ttft.p50": "lower",
    "serving.ttft.p90": "lower",
    "serving.ttft.p99": "lower",
    "serving.tpot.p50": "lower",
    "serving.tpot.p90": "lower",
    "serving.tpot.p99": "lower",
    "serving.tokens_per_second": "higher",
}
_LOAD = re.compile(r"[1-9]\d*|rate=\d[\d.e+-]*")
DIRECTIONS: Mapping[str, Direction] = MappingProxyType(
    {
        **_DAMAGE,
        "weights.snr_db": "higher",
        "weights.cosine": "higher",
        "layer_error": "lower",
        "size": "lower",
        "compression_ratio": "higher",
        "bits_per_weight": "lower",
        "model_bits_per_weight": "lower",
        "memory.resident": "lower",
        "memory.peak": "lower",
        "memory.decode_peak": "lower",
        "memory.rss_peak": "lower",
        "memory.kv_per_token": "lower",
        **{
            f"latency.{phase}{name}": "lower"
            for phase in LATENCY_PHASES
            for name in ("p50", "p90", "p99", "ratio")
        },
        "throughput.prefill": "higher",
        "throughput.decode": "higher",
        "throughput.prefill_ratio": "higher",
        "throughput.decode_ratio": "higher",
        "load.cold": "lower",
        "load.warm": "lower",
        "first_generation": "lower",
        **_UNDER_LOAD,
    }
)
END_TO_END = ("throughput.", "load.", "first_generation", "serving.")
"""How the names of measures of speed end to end begin."""
RATES = frozenset(("kl.tail", "top1_agreement"))
"""Shares of the scored tokens; also by domain."""


def split_domain(metric: str) -> tuple[str, str]:
    """A measure's own name and its domain: `kl.mean[code]` is `kl.mean` and `code`.

    The domain is empty where the measure is one of the whole text.
    """
    base, bracket, domain = metric.partition("[")
    return (base, domain[:-1]) if bracket and domain.endswith("]") else (metric, "")


def known_direction(metric: str) -> Direction | None:
    """As `direction_of`, but None for a measure that is not known, such as somebody's own."""
    base, domain = split_domain(metric)
    if _LOAD.fullmatch(domain):
        return _UNDER_LOAD.get(base)
    return (_DAMAGE if domain else DIRECTIONS).get(base)


def is_timed(metric: str) -> bool:
    """Whether the measure is one of speed, which has to be measured alone on the machine."""
    return metric.startswith(("latency.", *END_TO_END))


def is_damage(metric: str) -> bool:
    """Whether the measure compares a candidate's predictions with the base model's."""
    base = split_domain(metric)[0]
    return base in _DAMAGE and base != "base_perplexity"


def direction_of(metric: str) -> Direction:
    """Whether less or more of a measure is better; measures of a domain go with the whole's.

    Args:
        metric: a dotted name as in `quantized[...]`, such as `kl.mean` or `top1_agreement[code]`.

    Raises:
        MetricError: there is no such measure, or it has no domains.
    """
    found = known_direction(metric)
    if found is not None:
        return found
    base, domain = split_domain(metric)
    if base in _UNDER_LOAD:
        raise MetricError(
            f"{metric!r}: {base} is measured under a load. Write a number of clients, as in "
            f"{base}[4], or requests a second, as in {base}[rate=2.5]."
        )
    if base in DIRECTIONS:
        raise MetricError(
            f"{metric!r}: {base} is one number for the whole model and has no domain {domain!r}. "
            f"Write {base}. Measures of a domain are: {', '.join(_DAMAGE)}."
        )
    raise MetricError(f"There is no measure {metric!r}.{did_you_mean(metric, DIRECTIONS)}")
