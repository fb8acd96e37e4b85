"""The controller's side of the results: gathers what reports carry, writes files and tables."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qlab.running.payload import VERSION, plain
from pytest_qlab.running.subjects import SEPARATOR, Subjects
from pytest_qlab.settings import Settings
from pytest_qlab.xdist.plan import PlanEntry

if TYPE_CHECKING:
    from pytest_qlab.results import CandidateResult, Results


class Collector:
    """Merges reports into one results document.

    Attributes:
        durations: seconds that each test took, by node id; remembered for the next run's order.
        notes: lines for the terminal summary, such as where files were written.
        records: what is to be saved of candidates, as tests have noted it.
    """

    def __init__(self) -> None:
        self.durations: dict[str, float] = {}
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self._outcomes: dict[str, str] = {}
        self._payloads: dict[str, dict[str, Any]] = {}
        self._counters: dict[str, dict[str, Any]] = {}
        self._crashed: dict[str, str] = {}
        self._started = time.monotonic()
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._results: Results | None = None

    def add(self, report: pytest.TestReport) -> None:
        """Take over what a report says and carries."""
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + float(
            getattr(report, "duration", 0.0)
        )
        self._note_outcome(report)
        payload = getattr(report, "qlab", None)
        if isinstance(payload, dict) and payload.get("v") == VERSION:
            self._payloads[report.nodeid] = payload  # The last attempt counts.
            self.records += payload.get("records", ())
            counters = payload["counters"]
            self._counters[counters["process"]] = counters

    def _note_outcome(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        if report.when not in ("setup", "call", "teardown"):
            self._outcomes[name] = "error"
            self._crashed[name] = str(report.longrepr)
        elif report.outcome not in ("passed", "failed", "skipped"):
            self._outcomes.pop(name, None)  # To be run once more.
        elif report.when == "call":
            self._outcomes[name] = report.outcome
        elif report.failed:
            self._outcomes[name] = "error"
        elif report.skipped:
            self._outcomes[name] = "skipped"

    def results(self, plan: Mapping[str, PlanEntry], order: Sequence[str]) -> Results:
        """The document, made once; rows are in the order of the run's methods.

        Args:
            plan: the run's tests.
            order: ids of the run's methods.
        """
        if self._results is None:
            self._results = self._merge(plan, order)
        return self._results

    def _merge(self, plan: Mapping[str, PlanEntry], order: Sequence[str]) -> Results:
        import pytest_qlab
        from pytest_qlab.results import Budget, CandidateResult, Results

        results = Results(version=pytest_qlab.__version__, created=self._created)
        subjects = Subjects(self._payloads)
        for name, payload in self._payloads.items():
            for fragment in payload["fragments"]:
                named = {**fragment, "id": subjects.named(name, fragment["id"])}
                results.add(CandidateResult.model_validate(named))
            for comparison in payload["comparisons"]:
                if not comparison["ok"] and self._outcomes.get(name) == "passed":
                    continue  # A branch that was not taken, not a budget that was missed.
                comparison = dict(comparison)
                candidate = comparison.pop("candidate") or payload["group"]
                row = _row(results, subjects.named(name, candidate), plan)
                row.merge(
                    CandidateResult(
                        id=row.id, method=row.method, budgets=[Budget(test=name, **comparison)]
                    )
                )
        for name, outcome in self._outcomes.items():
            entry = plan.get(name)
            if entry is not None and entry.group is not None:
                group = subjects.named(name, entry.group)
                quiet = outcome in ("passed", "skipped") and entry.group not in order
                if quiet and results.candidate(group) is None:
                    continue  # A test of no method of this run, which has measured nothing.
                row = _row(results, group, plan)
                row.tests[name] = outcome  # type: ignore[assignment]
                row.error = self._crashed.get(name, row.error)
        ours = [name for name, entry in plan.items() if entry.group is not None]
        for name in ours:
            if name in self._outcomes:
                outcome = self._outcomes[name]
                results.summary[outcome] = results.summary.get(outcome, 0) + 1
        for counters in self._counters.values():
            for key, count in counters["built"].items():
                results.built[key] = results.built.get(key, 0) + count
            results.reused += counters["reused"]
            results.forwards += counters["forwards"]
        for part in ("model", "evaluation", "calibration", "environment"):
            setattr(results, part, dict(subjects.main.get(part, {})))
        places = {name: place for place, name in enumerate(order)}
        results.candidates.sort(
            key=lambda row: places.get(row.id.partition(SEPARATOR)[0], len(places))
        )
        return results

    def finish(self, settings: Settings, exit_status: int, workers: int) -> None:
        """Complete the document and write the files that were asked for.

        A page that cannot be made is a warning; the JSON is written first.
        """
        results = self._results
        assert results is not None
        results.exit_status = exit_status
        results.seconds = time.monotonic() - self._started
        results.environment["workers"] = workers
        if settings.json is not None:
            self._attempt("JSON", settings.json, lambda path: results.write(path))
        from pytest_qlab.report.html import render_page
        from pytest_qlab.report.markdown import render_markdown

        if settings.html is not None:
            self._attempt("page", settings.html, lambda path: _write(path, render_page(results)))
        if settings.markdown is not None:
            self._attempt(
                "Markdown", settings.markdown, lambda path: _write(path, render_markdown(results))
            )
        step_summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if step_summary and results.candidates:
            self._attempt(
                None, Path(step_summary), lambda path: _append(path, render_markdown(results))
            )

    def _attempt(self, what: str | None, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write(path)
        except Exception as error:  # A report must never take the run's outcome with it.
            message = f"pytest-qlab could not write {path}: {type(error).__name__}: {error}"
            self.notes.append(message)
            warnings.warn(pytest.PytestWarning(message), stacklevel=2)
        else:
            if what is not None:
                self.notes.append(f"qlab {what}: {path}")

    def table(self, width: int) -> list[str]:
        """Lines for the terminal; a note if they cannot be made."""
        from pytest_qlab.report.terminal import render_terminal

        assert self._results is not None
        try:
            return render_terminal(self._results, width)
        except Exception as error:  # See `_attempt`.
            return [f"the table could not be made: {type(error).__name__}: {error}"]

    def section(self) -> str | None:
        """The table as a fragment of HTML for pytest-html, or None if there is none to show."""
        from pytest_qlab.report.html import render_section

        if self._results is None or not self._results.candidates:
            return None
        try:
            return render_section(self._results)
        except Exception as error:  # See `_attempt`.
            message = f"pytest-qlab could not make its table: {type(error).__name__}: {error}"
            warnings.warn(pytest.PytestWarning(message), stacklevel=2)
            return None


def _row(results: Results, identifier: str, plan: Mapping[str, PlanEntry]) -> CandidateResult:
    """The candidate's row; a blank one if nothing was measured on it."""
    from pytest_qlab.results import CandidateResult

    row = results.candidate(identifier)
    if row is None:
        group = identifier.partition(SEPARATOR)[0]
        entry = next((e for e in plan.values() if e.group == group), PlanEntry())
        row = CandidateResult(
            id=identifier, method=entry.method or group, options=plain(entry.options)
        )
        results.candidates.append(row)
    return row


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"{text}\n")
