"""Measures of the fakes' candidates that are drawn look by look, for careful assertions."""

from __future__ import annotations

LOOKING = """
from math import sqrt
from types import SimpleNamespace

from pytest_qlab.decision import Look
from pytest_qlab.gate.deferred import deferred

# After all of 64 windows. The first look's, at 16, is twice as wide.
KL = {"alpha-w4": (0.010, 0.0002), "alpha-w2": (0.04, 0.0002), "beta-w4": (0.019, 0.001)}


def looks(candidate):
    value, error = KL.get(candidate.id, (0.0, 0.0))

    def at(windows):
        def compute():
            note(f"{candidate.id} on {windows} windows")
            half = 2 * error * sqrt(64 / windows)
            return candidate.measure(
                "kl.mean", value, lower=value - half, upper=value + half,
                standard_error=half / 2, n=100 * windows, clusters=windows, unit="nats",
                convention="spread512", detail="one line of detail",
            )

        return Look(windows, compute)

    return [at(16), at(32), at(64)]


def kl(candidate):
    mean = deferred("kl.mean", candidate.id, lambda: looks(candidate), lambda: "spread512")
    return SimpleNamespace(mean=mean)


def named(candidate, metric):
    note(f"{candidate.id} {metric} {sorted(candidate.lab.overrides)}")
    if metric == "kl.mean":
        return candidate.kl.mean
    if metric == "latency.p50":
        return candidate.latency
    return candidate.measure(metric, {"size": 1000.0, "top1_agreement": 0.9}[metric])


FakeCandidate.kl = property(kl)
FakeCandidate.__getitem__ = named
"""
"""`alpha-w4` is surely within 0.02, `alpha-w2` surely not, and `beta-w4` is in doubt."""
