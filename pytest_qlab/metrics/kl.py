"""The estimates of KL that belong together.

This module imports no torch, so that deferred measures can be made while tests are collected.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_qlab.estimate import Estimate


@dataclass(frozen=True)
class KlEstimates:
    """KL(base || candidate) over scored tokens, nats; `max` has no interval.

    `tail` is the share of tokens above 1 nat.
    """

    mean: Estimate
    median: Estimate
    p99: Estimate
    max: Estimate
    tail: Estimate
