"""The results document: one versioned JSON object that every table, page and file is made from.

Workers send fragments of it with their test reports, in plain JSON types; the controller merges
them. `qlab merge` joins the documents of several runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_qlab.errors import DataError

SCHEMA_VERSION = 1
Outcome = Literal["passed", "failed", "skipped", "error"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Measure(_Model):
    """One number with what is known about it; see `pytest_qlab.Estimate`."""

    value: float
    lower: float | None = None
    upper: float | None = None
    confidence: float = 0.95
    standard_error: float | None = None
    n: int | None = None
    clusters: int | None = None
    design_effect: float | None = None
    floor: float | None = None
    unit: str = ""
    convention: str = ""
    simulated: bool = False
    detail: str = ""
    candidate: str = ""


class Budget(_Model):
    """One comparison that a test made with a measure.

    A careful one has an `outcome` (`pass`, `fail` or `inconclusive`), one-sided bounds, and how
    many windows it took; `ok` then says what the run's policy made of it.
    """

    test: str
    metric: str
    value: float
    op: str
    budget: float
    ok: bool
    outcome: str = ""
    lower: float | None = None
    upper: float | None = None
    windows: int | None = None


class Change(_Model):
    """A measure against the saved baseline: `difference` is the new value minus the saved one.

    The bounds of the difference are one-sided, each at the `confidence`. One with a threshold has
    the `margin` by which it may be worse, and an `outcome`: `pass`, `fail` or `inconclusive`.
    """

    metric: str
    saved: float
    value: float
    difference: float
    confidence: float = 0.95
    lower: float | None = None
    upper: float | None = None
    margin: float | None = None
    outcome: str = ""


class LayerRow(_Model):
    """One quantized layer: how many bits it takes, how far its weights moved, what that does.

    `kl` is KL(base || base with only this layer quantized) per token, nats; None where no test
    asked for it.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    snr_db: float | None = None
    cosine: float | None = None
    output_error: float | None = None
    kl: float | None = None


class Additivity(_Model):
    """How far the KL of single quantized parts add up to that of all together, nats per token.

    `embeddings` are the parts that are no layers, `rest` all other changed parameters; `sum` is of
    all parts, `total` of the whole candidate on the same tokens.
    """

    sum: float
    total: float
    embeddings: dict[str, float] = Field(default_factory=dict)
    rest: float = 0.0
    windows: int = 0
    tokens: int = 0


class CandidateResult(_Model):
    """Everything known about one candidate: a row of the table."""

    id: str
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    kernel: str = ""
    simulated: bool = False
    measures: dict[str, Measure] = Field(default_factory=dict)
    layers: list[LayerRow] = Field(default_factory=list)
    additivity: Additivity | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    keys: dict[str, str] = Field(default_factory=dict)
    budgets: list[Budget] = Field(default_factory=list)
    changes: list[Change] = Field(default_factory=list)
    tests: dict[str, Outcome] = Field(default_factory=dict)
    error: str = ""

    def merge(self, other: CandidateResult) -> None:
        """Take over what `other`, a later fragment of the same candidate, knows."""
        for name, measure in other.measures.items():
            known = self.measures.get(name)
            # A test that drew fewer windows takes nothing back.
            if known is None or (measure.n or 0) >= (known.n or 0):
                self.measures[name] = measure
        self.seconds.update(other.seconds)
        self.keys.update(other.keys)
        self.tests.update(other.tests)
        if other.layers:
            known_layers = {layer.name: layer for layer in self.layers}
            self.layers = [_completed(each, known_layers.get(each.name)) for each in other.layers]
        self.additivity = other.additivity or self.additivity
        if other.kernel:  # What runs is known better once speed was measured.
            self.kernel, self.simulated = other.kernel, other.simulated
        self.error = other.error or self.error
        changed = {change.metric for change in other.changes}
        kept_changes = [change for change in self.changes if change.metric not in changed]
        self.changes = [*kept_changes, *other.changes]
        again = {(b.test, b.metric, b.op, b.budget) for b in other.budgets}
        kept = [b for b in self.budgets if (b.test, b.metric, b.op, b.budget) not in again]
        self.budgets = [*kept, *other.budgets]


def _completed(layer: LayerRow, known: LayerRow | None) -> LayerRow:
    """The layer, with what it leaves open as it was known before."""
    if known is None:
        return layer
    return layer.model_copy(update={k: v for k, v in known if getattr(layer, k) is None})


class Results(_Model):
    """A run: what was measured, on what, by whom, and how the tests ended."""

    schema_version: Literal[1] = 1
    generator: str = "pytest-qlab"
    version: str = ""
    created: str = ""
    model: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    baseline: str = ""
    candidates: list[CandidateResult] = Field(default_factory=list)
    built: dict[str, int] = Field(default_factory=dict)
    reused: int = 0
    forwards: int = 0
    summary: dict[str, int] = Field(default_factory=dict)
    exit_status: int = 0
    seconds: float = 0.0

    def candidate(self, identifier: str) -> CandidateResult | None:
        """The row with that id."""
        return next((row for row in self.candidates if row.id == identifier), None)

    def add(self, fragment: CandidateResult) -> None:
        """Merge a fragment into its row, which is created if it is new."""
        row = self.candidate(fragment.id)
        if row is None:
            self.candidates.append(fragment)
        else:
            row.merge(fragment)

    def write(self, path: Path) -> None:
        """Write the document atomically."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a document.

        Raises:
            DataError: no such file, not JSON, or not a results document of this schema.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"The results file {path} cannot be read: {error.strerror}.") from error
        except (ValueError, ValidationError) as error:
            raise DataError(
                f"{path} is not a results document of schema version {SCHEMA_VERSION}: "
                f"{str(error).splitlines()[0]}. Give a file written by pytest --qlab-json."
            ) from error


def _named(what: dict[str, Any]) -> str:
    return f"{what.get('name')!r} with id {str(what.get('id'))[:12]}"


def merge_results(documents: Iterable[Results]) -> Results:
    """Join the documents of several runs over the same model and text, such as CI shards.

    Raises:
        DataError: there is none, or they measured different models or evaluation sets.
    """
    merged: Results | None = None
    for document in documents:
        if merged is None:
            merged = document.model_copy(deep=True)
            continue
        for what in ("model", "evaluation"):
            ours, theirs = getattr(merged, what), getattr(document, what)
            if ours.get("id") != theirs.get("id"):
                raise DataError(
                    f"The results cannot be merged: they measured different {what}s "
                    f"({_named(ours)} and {_named(theirs)}). Merge only runs over the "
                    "same model and evaluation set."
                )
        if merged.baseline and document.baseline and merged.baseline != document.baseline:
            raise DataError(
                f"The results cannot be merged: they were compared with different baselines "
                f"({merged.baseline!r} and {document.baseline!r}). Compare all with one."
            )
        merged.baseline = merged.baseline or document.baseline
        for row in document.candidates:
            merged.add(row.model_copy(deep=True))
        floor = document.evaluation.get("noise_floor")
        if floor is not None:
            merged.evaluation.setdefault("noise_floor", floor)
        for key, count in document.built.items():
            merged.built[key] = merged.built.get(key, 0) + count
        for key, count in document.summary.items():
            merged.summary[key] = merged.summary.get(key, 0) + count
        merged.reused += document.reused
        merged.forwards += document.forwards
        merged.seconds += document.seconds
        merged.exit_status = max(merged.exit_status, document.exit_status)
    if merged is None:
        raise DataError("There is nothing to merge: no results file was given.")
    return merged
