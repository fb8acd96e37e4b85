"""A candidate's measures by their dotted names, as options and saved baselines say them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_qlab.directions import END_TO_END, split_domain
from pytest_qlab.errors import MetricError, did_you_mean
from pytest_qlab.measuring.damage import MEASURES
from pytest_qlab.metrics.serving import Load

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.estimate import Estimate
    from pytest_qlab.measuring.bylayer import ByLayer
    from pytest_qlab.measuring.damage import Damage


def named_measure(
    candidate: Candidate, metric: str, *, damage: Damage, layers: ByLayer
) -> Estimate:
    """A measure by its name, such as `kl.mean` or `perplexity_delta[code]`.

    Raises:
        MetricError: there is none of that name, or it is not defined for the model.
    """
    measured = candidate.measured
    if metric not in measured and metric.startswith("memory."):
        return candidate.memory.named(metric)
    if metric.startswith("latency."):
        return candidate.latency.named(metric)
    if metric not in measured and metric.startswith(END_TO_END):
        return _end_to_end(candidate, metric)
    if metric == "layer_error" or metric.startswith("weights."):
        return defined(layers.estimates(), metric, candidate.id)
    if metric in MEASURES:
        return damage.measure(metric)
    if split_domain(metric)[1] and not metric.startswith(END_TO_END):
        # Of all windows, however few an assertion has drawn so far.
        return defined(candidate.fidelity.estimates(), metric, candidate.id)
    _ = candidate.checkpoint  # which notes the sizes
    if metric not in measured:
        found = {**measured, **candidate.fidelity.estimates(), **layers.estimates()}
        return defined(found, metric, candidate.id)
    return measured[metric]


def _end_to_end(candidate: Candidate, metric: str) -> Estimate:
    """A measure of speed end to end, such as `serving.ttft.p50[4]`."""
    base, name = split_domain(metric)
    if base.startswith("serving."):
        load = Load.named(name)
        return candidate.serving(load.concurrency, rate=load.rate)[metric]
    if base.startswith("throughput."):
        return defined(candidate.throughput.estimates, metric, candidate.id)
    if base == "load.cold":
        return candidate.load.cold
    return defined(candidate.load.estimates, metric, candidate.id)


def defined(estimates: Mapping[str, Estimate], metric: str, candidate: str) -> Estimate:
    """One of the estimates.

    Raises:
        MetricError: it is not among them.
    """
    if metric not in estimates:
        raise MetricError(
            f"{metric} of {candidate} is not defined for this model."
            f"{did_you_mean(metric, estimates)}"
        )
    return estimates[metric]
