"""What may be claimed of a candidate's speed: only what kernels do that really run its bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.methods.base import Method

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate


def has_engine(candidate: Candidate) -> bool:
    """Whether another runtime runs the candidate, in a process of its own."""
    return type(candidate.method).engine is not Method.engine


def refuse_engine(candidate: Candidate) -> None:
    """Raise where another runtime would have to serve the candidate.

    Raises:
        MetricError: so it is.
    """
    if has_engine(candidate):
        raise MetricError(
            f"Serving of {candidate.id} is not measured, because another runtime runs it, one "
            "request at a time. Its latency, throughput and load times are; for many at a time, "
            "start that runtime's server, and put load on it with qlab serve-bench."
        )


def refuse_simulated(candidate: Candidate, what: str) -> bool:
    """Whether the speed would be a simulation's; raise if so, and the policy is not to flag that.

    Args:
        what: the subject of messages, such as `The latency`.

    Raises:
        NotMeasuredError: the policy is to skip. MetricError: it is to fail.
    """
    kernels = candidate.kernels
    if kernels.simulated and candidate.lab.simulated_latency != "flag":
        message = (
            f"{what} of {candidate.id} is not a claim that can be made: of its layers, "
            f"{kernels.dequantizing} dequantize before they multiply ({kernels}). It would need "
            f"{' and '.join(kernels.wanted)}. Pass "
            "--qlab-simulated-latency=flag to measure it all the same, marked as simulated."
        )
        skip = candidate.lab.simulated_latency == "skip"
        raise (NotMeasuredError if skip else MetricError)(message)
    return kernels.simulated
