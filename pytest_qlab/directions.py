"""Which measures there are by name, and in which direction each of them is better.

The one source of it: tables mark the best value by it, budgets are checked against it, careful
assertions refuse the wrong side by it.
"""

from __future__ import annotations

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
    }
)
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
    return (_DAMAGE if domain else DIRECTIONS).get(base)


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
    if base in DIRECTIONS:
        raise MetricError(
            f"{metric!r}: {base} is one number for the whole model and has no domain {domain!r}. "
            f"Write {base}. Measures of a domain are: {', '.join(_DAMAGE)}."
        )
    raise MetricError(f"There is no measure {metric!r}.{did_you_mean(metric, DIRECTIONS)}")
