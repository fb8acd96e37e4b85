"""A project with two toy methods and a lab that measures nothing, for tests of the plugin."""

from __future__ import annotations

import json
from typing import Any

import pytest

CONFTEST = """
import os
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import pytest_qlab.fixtures as fixtures
from pytest_qlab.errors import ModelError
from pytest_qlab.estimate import Estimate
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.registry import register_method
from pytest_qlab.results import CandidateResult, Measure


@register_method
class Alpha(Method):
    name: ClassVar[str] = "alpha"
    summary: ClassVar[str] = "a toy"
    cost: ClassVar[float] = 1.0
    bits: Literal[2, 4] = 4


@register_method
class Beta(Method):
    name: ClassVar[str] = "beta"
    summary: ClassVar[str] = "a dearer toy"
    cost: ClassVar[float] = 5.0
    bits: Literal[2, 4] = 4


def note(line):
    with open(Path(__file__).parent / "notes.txt", "a") as stream:
        stream.write(line + "\\n")


class FakeStore:
    def __init__(self):
        self.built = {}
        self.reused = 0


class FakeCandidate:
    def __init__(self, lab, spec):
        self.lab = lab
        self.id = spec.id
        self.method = spec.method
        self.measures = {}
        if os.environ.get("FAKE_BREAKS") == self.id:
            raise ModelError("The weights of layer 3 are not finite. Check the checkpoint.")

    def measure(self, metric, value, **more):
        found = Estimate(value, metric=metric, candidate=self.id, **more)
        fields = found.to_dict()
        self.measures[metric] = Measure(**fields)
        self.lab.store.built["fidelity/" + self.id] = 1
        return found

    @property
    def perplexity_delta(self):
        value = {"alpha-w4": 0.05, "beta-w4": 0.2345}.get(self.id, 0.0)
        return self.measure(
            "perplexity_delta", value, lower=value - 0.01, upper=value + 0.01, n=4096,
            clusters=30, convention="spread512", detail="perplexity 12.31 -> 12.55",
        )

    @property
    def latency(self):
        note(f"latency {self.id}")
        return self.measure("latency.p50", 0.001, unit="s")

    def worst_layers(self):
        from pytest_qlab.measuring.layers import LayerError
        return [LayerError("layers.0.down", (4, 4), 4.1, 18.25, 0.99, 0.0123)]

    def fragment(self):
        return CandidateResult(
            id=self.id, method=self.method.name, options=self.method.model_dump(),
            measures=self.measures,
        )

    def release(self):
        note(f"release {self.id}")


class FakeLab:
    def __init__(self, overrides):
        self.overrides = overrides
        self.store = FakeStore()
        self.forwards = 0
        self.made = {}
        note("lab " + ",".join(sorted(overrides)))

    def candidate(self, spec):
        if spec not in self.made:
            self.made[spec] = FakeCandidate(self, spec)
        return self.made[spec]

    @property
    def candidates(self):
        return {spec.id: candidate for spec, candidate in self.made.items()}

    @property
    def baseline(self):
        from pytest_qlab.specs import MethodSpec
        return self.candidate(MethodSpec(Alpha(bits=2), "none"))

    @property
    def base_model(self):
        note("model loaded")
        return "default model"

    tokenizer = "default tokenizer"
    eval_data = "default windows"
    calibration = "default sequences"

    def describe(self):
        return {"model": {"id": "m", "name": "fake"}, "evaluation": {"id": "e", "name": "text"}}

    def close(self):
        note("closed")


def make_lab(run, **overrides):
    lab = FakeLab(overrides)
    run.labs.append(lab)
    return lab


fixtures.make_lab = make_lab
"""


QUALITY = """
def test_quality(quantized):
    assert quantized.perplexity_delta < 0.1
"""


def notes_of(pytester: pytest.Pytester) -> list[str]:
    """What the fake lab noted, over all processes."""
    path = pytester.path / "notes.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def add_to_conftest(pytester: pytest.Pytester, text: str) -> None:
    """Write more into the project's conftest.py."""
    path = pytester.path / "conftest.py"
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{text}", encoding="utf-8")


def results_of(pytester: pytest.Pytester, name: str = "results.json") -> dict[str, Any]:
    """The results document that a run has written."""
    found: dict[str, Any] = json.loads((pytester.path / name).read_text(encoding="utf-8"))
    return found
