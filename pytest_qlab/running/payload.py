"""What a test's report carries from the process that ran it: plain JSON, nothing else.

pytest-xdist's transport breaks a worker over any other type, subclasses of float included, and a
broken worker may end as a green run. So everything is coerced here, once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qlab.errors import QlabError
from pytest_qlab.estimate import Comparison
from pytest_qlab.running.run import Run
from pytest_qlab.xdist.plan import PlanEntry

if TYPE_CHECKING:
    from pytest_qlab.results import Change

VERSION = 1
COMPARISONS = pytest.StashKey[list[Comparison]]()
# What differs from the saved baseline, by candidate, and what is to be saved of them.
CHANGES = pytest.StashKey[dict[str, list["Change"]]]()
RECORDS = pytest.StashKey[list[dict[str, Any]]]()
JUNIT_MEASURES = (
    "perplexity",
    "perplexity_delta",
    "kl.mean",
    "top1_agreement",
    "compression_ratio",
    "bits_per_weight",
)


def plain(value: Any) -> Any:
    """The value in exact built-in types; anything that has none becomes text."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return plain_scalar(value)
    return str(value)


def plain_scalar(value: Any) -> Any:
    """The Python number inside a scalar of numpy or torch; its text if there is none."""
    try:
        number = value.item()
    except Exception:  # Whatever a foreign type raises here, its text will do.
        return str(value)
    return number if type(number) in (bool, int, float, str) else str(value)


def through_json(value: Any) -> Any:
    """The value as JSON would return it."""
    return json.loads(json.dumps(plain(value), default=str))


def attach(run: Run, item: pytest.Item, report: pytest.TestReport, error: QlabError | None) -> None:
    """Put what is known about the test's candidates on its report, as `report.qlab`.

    Done once a test: after its body, or after a setup that failed.
    """
    entry = run.plan.get(item.nodeid)
    if entry is None or entry.group is None:
        return
    if report.when == "teardown" or (report.when == "setup" and report.passed):
        return
    comparisons, changes = item.stash.get(COMPARISONS, []), item.stash.get(CHANGES, {})
    labs = _labs(run, item)
    named = {comparison.candidate for comparison in comparisons} | set(changes)
    fragments = _fragments(item, labs, named)
    for name, found in changes.items():
        fragments[name]["changes"] = [change.model_dump() for change in found]
    if report.failed and error is not None and report.when == "setup":
        own = fragments.setdefault(entry.group, _blank(entry))
        own["error"] = str(error)
    payload = {
        "v": VERSION,
        "group": entry.group,
        "fragments": list(fragments.values()),
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "records": item.stash.get(RECORDS, []),
        "counters": {
            "process": run.worker or "main",
            "built": _summed(getattr(_store(lab), "built", {}) for lab in labs),
            "reused": sum(getattr(_store(lab), "reused", 0) for lab in labs),
            "forwards": sum(getattr(lab, "forwards", 0) for lab in labs),
        },
        "description": _description(labs),
    }
    report.qlab = through_json(payload)  # type: ignore[attr-defined]
    _record_properties(item, fragments.get(entry.group, {}))


def _blank(entry: PlanEntry) -> dict[str, Any]:
    return {"id": entry.group, "method": entry.method, "options": entry.options}


def _store(lab: Any) -> Any:
    return getattr(lab, "store", None)


def _labs(run: Run, item: pytest.Item) -> list[Any]:
    """All labs of this process, the test's own last."""
    own = getattr(item, "funcargs", {}).get("qlab")
    if own is None:
        return run.labs
    if not any(lab is own for lab in run.labs):
        run.labs.append(own)  # Made by an override of the fixture `qlab`.
    return [*(lab for lab in run.labs if lab is not own), own]


def _fragments(
    item: pytest.Item, labs: Sequence[Any], compared: set[str]
) -> dict[str, dict[str, Any]]:
    """What was measured on the test's candidates, by id."""
    candidates = [
        value
        for name, value in getattr(item, "funcargs", {}).items()
        if name in ("quantized", "baseline") or type(value).__name__ == "Candidate"
    ]
    for lab in reversed(labs):  # The test's own first: others may have candidates of the same id.
        known = lab.candidates
        candidates += [found for found in known.values() if getattr(found, "id", None) in compared]
    fragments: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        make = getattr(candidate, "fragment", None)
        if make is not None and getattr(candidate, "id", None) not in fragments:
            dumped = make().model_dump(mode="python")
            fragments[str(dumped["id"])] = dumped
    return fragments


def _description(labs: Sequence[Any]) -> dict[str, Any]:
    """What the test's own lab, the last one, measures on."""
    describe = getattr(labs[-1], "describe", None) if labs else None
    if describe is None:
        return {}
    try:
        return dict(describe())
    except (QlabError, OSError):
        return {}  # The test itself fails over it, with the message.


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for key, count in each.items():
            total[key] = total.get(key, 0) + count
    return total


def _record_properties(item: pytest.Item, fragment: Mapping[str, Any]) -> None:
    """Leave a few numbers where JUnit XML and other reporters look for them."""
    known = {name for name, _ in item.user_properties}
    for metric in JUNIT_MEASURES:
        measure = fragment.get("measures", {}).get(metric)
        name = f"qlab.{metric}"
        if measure is not None and name not in known and math.isfinite(measure["value"]):
            item.user_properties.append((name, float(measure["value"])))


def plain_properties(report: pytest.TestReport) -> None:
    """Make recorded properties safe to send: an estimate or a number of numpy is not."""
    report.user_properties = [(str(name), plain(value)) for name, value in report.user_properties]
