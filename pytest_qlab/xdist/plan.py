"""The plan: which tests belong to one candidate, what they cost, which must run alone.

The controller of a distributed run collects nothing and sees node ids only, so every worker writes
the plan into the run's directory before it reports its collection, and the scheduler reads it.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

FIXTURES = frozenset({"quantized", "baseline", "qlab"})
# `load` alone would name too much else, such as `json.load`.
TIMED = frozenset({"latency", "throughput", "serving", "first_generation", "cold", "warm"})
BASELINE = "none"


@dataclass(frozen=True)
class PlanEntry:
    """What the controller must know about one test.

    Attributes:
        group: id of the candidate, or None for a test that has nothing to do with qlab.
        cost: the method's relative cost of quantizing.
        exclusive: whether no other test may run at the same time.
        method, options: the candidate's method, for its row if the worker dies.
    """

    group: str | None = None
    cost: float = 0.0
    exclusive: bool = False
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)


Plan = Mapping[str, PlanEntry]


def uses_qlab(item: pytest.Item) -> bool:
    """Whether the test asks for a candidate or for the lab."""
    return not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def is_exclusive(item: pytest.Item) -> bool:
    """Whether the test must run alone: it is marked so, or it takes time.

    `@pytest.mark.qlab_exclusive` and `@pytest.mark.qlab(exclusive=...)` decide. Without them, a
    test of a candidate counts as exclusive whose own code names `latency` or another measure of
    speed, or that asks for pytest-benchmark's `benchmark`, which times nothing under xdist.
    """
    for marker in item.iter_markers("qlab"):
        if "exclusive" in marker.kwargs:
            return bool(marker.kwargs["exclusive"])
    if item.get_closest_marker("qlab_exclusive") is not None:
        return True
    if not uses_qlab(item):
        return False
    if "benchmark" in getattr(item, "fixturenames", ()) and not hasattr(item.config, "workerinput"):
        return True
    function = inspect.unwrap(getattr(item, "obj", None) or (lambda: None))
    code = getattr(function, "__code__", None)
    return code is not None and not TIMED.isdisjoint(_names(code))


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def spec_of(item: pytest.Item) -> Any:
    """The method specification that the test is parametrized with, or None."""
    callspec = getattr(item, "callspec", None)
    spec = None if callspec is None else callspec.params.get("quantized")
    return spec if hasattr(spec, "method") else None


def entry_of(item: pytest.Item) -> PlanEntry:
    """The plan's entry of one collected test."""
    if not uses_qlab(item):
        return PlanEntry(exclusive=is_exclusive(item))
    spec = spec_of(item)
    if spec is None:
        return PlanEntry(group=BASELINE, exclusive=is_exclusive(item), method=BASELINE)
    return PlanEntry(
        group=str(spec.id),
        cost=float(spec.method.cost),
        exclusive=is_exclusive(item),
        method=str(spec.method.name),
        options=json.loads(json.dumps(spec.method.model_dump(mode="json"))),
    )


def make_plan(items: Iterable[pytest.Item]) -> dict[str, PlanEntry]:
    """The plan of collected tests by node id."""
    return {item.nodeid: entry_of(item) for item in items}


def write_plan(plan: Plan, directory: Path, worker: str) -> None:
    """Write the plan atomically; any worker's is as good as another's."""
    partial = directory / f".plan-{worker}.{os.getpid()}"
    partial.write_text(
        json.dumps({name: asdict(entry) for name, entry in plan.items()}), encoding="utf-8"
    )
    os.replace(partial, directory / f"plan-{worker}.json")


def read_plan(directory: Path | None) -> dict[str, PlanEntry]:
    """Read a plan; an empty one if no worker has written any that can be read."""
    for path in sorted(directory.glob("plan-*.json")) if directory is not None else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {name: PlanEntry(**entry) for name, entry in content.items()}
        except (OSError, ValueError, TypeError):
            continue
    return {}
