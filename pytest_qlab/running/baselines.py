"""Saved baselines in a run: tests are held to the one that is compared with, and make a new one.

Every process compares what its tests measured; the controller writes what all of them measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qlab.directions import is_damage
from pytest_qlab.errors import BaselineError, QlabError, RegressionError
from pytest_qlab.options import on_command_line
from pytest_qlab.running.payload import CHANGES, COMPARISONS, RECORDS
from pytest_qlab.running.run import Run
from pytest_qlab.running.subjects import SEPARATOR

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.gate.baselines import Baseline
    from pytest_qlab.results import Change, Results

DAMAGE = "damage"
"""Measures that one evaluation makes known together count as one."""


class Baselines:
    """What one process knows of saved baselines.

    Attributes:
        name: of the baseline that is compared with, or empty.
        path: its file; None where there is none.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        # Which test was the first to make a measure known, by lab, candidate and measure.
        self._owners: dict[tuple[int, str, str], str] = {}

    @property
    def comparing(self) -> bool:
        """Whether anything is compared."""
        return self._run.settings.compare is not None

    @cached_property
    def path(self) -> Path | None:
        """The file that is compared with."""
        if not self.comparing:
            return None
        from pytest_qlab.gate.baselines import find

        return find(self._run.settings.baselines, self._run.settings.compare or "")

    @property
    def name(self) -> str:
        """Of the baseline that is compared with."""
        return "" if self.path is None else self.path.stem

    @cached_property
    def saved(self) -> Baseline:
        """What is compared with.

        Raises:
            BaselineError: there is none, or it is damaged.
        """
        from pytest_qlab.gate.baselines import Baseline, missing

        if self.path is None:
            given = self._run.settings.compare or ""
            raise BaselineError(f"--qlab-compare: {missing(self._run.settings.baselines, given)}")
        return Baseline.read(self.path)

    @property
    def _thresholds(self) -> dict[str, Any]:
        return {threshold.metric: threshold for threshold in self._run.settings.compare_fail}

    # --- before tests ----------------------------------------------------------------------

    def validate(self) -> None:
        """Refuse, before anything runs, a comparison that could not fail.

        Raises:
            pytest.UsageError: there is no such baseline, it is damaged, none of its candidates is
                in this run, or it has nothing that a threshold is for.
        """
        if not self.comparing:
            return
        from pytest_qlab.gate.compare import check_saved

        try:
            shared = self._shared()
            for metric in self._thresholds:
                lacking = []
                for candidate in shared:
                    try:
                        check_saved(self.name, candidate, self.saved, metric)
                    except BaselineError as error:
                        lacking.append(error)
                if len(lacking) == len(shared):
                    raise lacking[0]
        except QlabError as error:
            raise pytest.UsageError(str(error)) from error

    def _shared(self) -> list[str]:
        """The candidates that the run and the baseline both have.

        Raises:
            BaselineError: there is none.
        """
        ours = [spec.id for spec in self._run.specs]
        shared = [name for name in ours if name in self.saved.candidates]
        if not shared:
            raise BaselineError(
                f"The baseline {self.name} has no candidate of this run, so nothing would be "
                f"compared: it has {', '.join(sorted(self.saved.candidates)) or 'none'}, and this "
                f"run has {', '.join(ours)}. Name one of them with --qlab-methods, or save the "
                "baseline again. A configuration [tool.qlab.methods.NAME] keeps its name when its "
                "options change."
            )
        return shared

    # --- in tests --------------------------------------------------------------------------

    def after(self, item: pytest.Item, *, passed: bool) -> None:
        """Compare and note what is known once a test's body has run.

        Args:
            item: the test.
            passed: whether it did; otherwise nothing is evaluated for it, noted to be saved, or
                raised.

        Raises:
            RegressionError: a measure that this test made known, or compared with a number, is
                worse than the saved one by more than its threshold.
            BaselineError: what was measured cannot be compared with the baseline.
        """
        entry = self._run.plan.get(item.nodeid)
        if entry is None or entry.group is None:
            return  # Before settings are read, which other projects' tests never need.
        saving = self._run.settings.save is not None
        if not (self.comparing or saving):
            return
        candidates = _candidates(item)
        if self.comparing:
            changes: dict[str, list[Change]] = {}
            item.stash[CHANGES] = changes
            for candidate in candidates:
                if not candidate.measured or candidate.id not in self.saved.candidates:
                    continue
                try:
                    changes[candidate.id] = self._compare(candidate, run_more=passed)
                except QlabError:
                    if passed:
                        raise
            if passed:
                self._judge(item, candidates, changes)
        if saving and passed:
            from pytest_qlab.gate.record import record_of

            item.stash[RECORDS] = [
                record_of(candidate, evaluated=True).model_dump(mode="json")
                for candidate in candidates
            ]

    def _compare(self, candidate: Candidate, *, run_more: bool) -> list[Change]:
        from pytest_qlab.gate.compare import changes
        from pytest_qlab.gate.record import measured_damage, record_of

        thresholds = self._thresholds
        wanted = run_more and measured_damage(thresholds) and measured_damage(candidate.measured)
        new = record_of(candidate, evaluated=wanted or candidate.evaluated)
        confidence = self._run.settings.confidence
        return changes(self.name, candidate.id, self.saved, new, thresholds, confidence=confidence)

    def _judge(
        self,
        item: pytest.Item,
        candidates: Sequence[Candidate],
        changes: dict[str, list[Change]],
    ) -> None:
        compared = {(each.candidate, each.metric) for each in item.stash.get(COMPARISONS, [])}
        worse: list[str] = []
        unsure: list[str] = []
        for candidate in candidates:
            for change in changes.get(candidate.id, []):
                owner = (id(candidate.lab), candidate.id, _known_as(change.metric))
                first = self._owners.setdefault(owner, item.nodeid) == item.nodeid
                if not (first or (candidate.id, change.metric) in compared):
                    continue
                if change.outcome == "fail":
                    worse.append(self._worse(candidate, change))
                elif change.outcome == "inconclusive":
                    unsure.append(self._unsure(candidate, change))
        policy = self._run.settings.inconclusive
        if worse or (unsure and policy == "fail"):
            raise RegressionError(" ".join([*worse, *unsure]))
        if unsure and policy == "warn":
            warnings.warn(pytest.PytestWarning(" ".join(unsure)), stacklevel=2)
        elif unsure:
            pytest.xfail(" ".join(unsure))

    def _worse(self, candidate: Candidate, change: Change) -> str:
        return (
            f"{self._moved(candidate, change)}. It may be worse by {change.margin:.4g} "
            f"(--qlab-compare-fail={self._thresholds[change.metric]}). If that is meant to be, "
            f"save the baseline again with --qlab-save={self.name}."
        )

    def _unsure(self, candidate: Candidate, change: Change) -> str:
        return (
            f"{self._moved(candidate, change)}. Whether that is worse by more than "
            f"{change.margin:.4g} (--qlab-compare-fail={self._thresholds[change.metric]}) is not "
            "decided: save and compare over more windows (--qlab-max-windows), or allow more."
        )

    def _moved(self, candidate: Candidate, change: Change) -> str:
        """What changed, by how much, how surely, on what."""
        from pytest_qlab.gate.thresholds import PAIRED

        known = candidate.measured.get(change.metric)
        unit = f" {known.unit}" if known is not None and known.unit else ""
        text = (
            f"{change.metric} of {candidate.id} was {change.saved:.6g}{unit} in the baseline "
            f"{self.name} and is {change.value:.6g}{unit} now: a difference of "
            f"{change.difference:+.4g}"
        )
        if change.lower is None or change.upper is None:
            text += ", with no bound, because the text is too short"
        elif change.lower < change.upper:
            text += (
                f", from {change.lower:+.4g} to {change.upper:+.4g} with {change.confidence:.4g} "
                "confidence each"
            )
        windows = self.saved.windows
        if windows is not None and change.metric.partition("[")[0] in PAIRED:
            text += f", paired over {len(windows.tokens)} windows"
        return text

    # --- after tests -----------------------------------------------------------------------

    def complaints(self, results: Results | None) -> list[str]:
        """What makes a run red in which every test passed: comparisons that were not made.

        Args:
            results: None in a run without any test of a candidate.
        """
        if not self.comparing:
            return []
        if results is None:
            asked = any(
                on_command_line(self._run.config, key) for key in ("compare", "compare_fail")
            )
            nothing = f"the baseline {self.name} was compared with nothing: no test of this run is "
            return [f"{nothing}of a candidate."] if asked else []
        changes = [(row.id, change) for row in results.candidates for change in row.changes]
        if not changes:
            return [
                f"the baseline {self.name} was compared with nothing: no test measured any of "
                f"{', '.join(self._shared())}."
            ]
        held = {change.metric for _, change in changes if change.outcome}
        unmet = [metric for metric in self._thresholds if metric not in held]
        found = [
            f"--qlab-compare-fail={self._thresholds[metric]} was held against nothing: no test "
            f"measured {metric} of {', '.join(self._shared())}. Write one that reads it, or leave "
            "the threshold out."
            for metric in unmet
        ]
        bad = ("fail", "inconclusive") if self._run.settings.inconclusive == "fail" else ("fail",)
        hidden = [f"{change.metric} of {row}" for row, change in changes if change.outcome in bad]
        if hidden:
            found.append(
                f"worse than the baseline {self.name}, but measured only by tests that were "
                f"skipped or expected to fail: {', '.join(hidden)}."
            )
        return found

    def notes(self, results: Results) -> list[str]:
        """Lines for the terminal: what was compared with what, and which candidates were not."""
        if self.path is None:
            return []
        text = f"qlab baseline: compared with {self._shown(self.path)}"
        here = {row.id.partition(SEPARATOR)[0] for row in results.candidates}
        there = set(self.saved.candidates)
        compared = {row.id for row in results.candidates if row.changes}
        for what, names in (
            ("only there", there - here),
            ("only here", here - there),
            ("not compared", (there & here) - compared),
        ):
            if names:
                text += f"; {what}: {', '.join(sorted(names))}"
        return [text]

    def save(self, records: Iterable[dict[str, Any]], *, green: bool) -> tuple[str, str]:
        """Write what all processes measured; to be called where a baseline is to be saved.

        Args:
            records: what tests of all processes noted.
            green: whether the run is; otherwise nothing is written.

        Returns:
            A line for the terminal, and what makes the run red; one of them is empty.
        """
        from pytest_qlab.gate.baselines import SUFFIX, Baseline

        settings = self._run.settings
        path = settings.baselines / f"{settings.save}{SUFFIX}"
        nothing = f"nothing was saved as {self._shown(path)}"
        if not green:
            return f"qlab baseline: {nothing}, because the run did not pass", ""
        merged: Baseline | None = None
        try:
            for record in records:
                each = Baseline.model_validate(record)
                if merged is None:
                    merged = each
                else:
                    merged.merge(each)
            if merged is None:
                return "", f"{nothing}: no test of a candidate passed."
            dropped = _names(path) - set(merged.candidates)
            done = merged.write(path)
        except BaselineError as error:
            return "", f"{nothing}. {error}"
        except OSError as error:
            return "", f"{nothing}: it cannot be written ({error.strerror or error})."
        count = len(merged.candidates)
        text = (
            f"qlab baseline: {done} {self._shown(path)} ({count} candidate"
            f"{'' if count == 1 else 's'}, {path.stat().st_size / 1000:.1f} kB)"
        )
        wanted = {spec.id for spec in self._run.specs} & {e.group for e in self._run.plan.values()}
        absent = wanted - set(merged.candidates) - dropped
        if absent:
            text += f"; not measured: {', '.join(sorted(absent))}"
        return f"{text}; no longer in it: {', '.join(sorted(dropped))}" if dropped else text, ""

    def _shown(self, path: Path) -> str:
        root = self._run.config.rootpath
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _known_as(metric: str) -> str:
    return DAMAGE if is_damage(metric) else metric


def _candidates(item: pytest.Item) -> list[Candidate]:
    """The candidates that a test asks for by a fixture, and those it has measured in its lab."""
    from pytest_qlab.candidate import Candidate

    values: dict[str, Any] = getattr(item, "funcargs", {})
    found = [value for value in values.values() if isinstance(value, Candidate)]
    labs = [candidate.lab for candidate in found]
    labs += [values["qlab"]] if "qlab" in values else []
    for lab in labs:
        found += [each for each in lab.candidates.values() if each.measured]
    return list({id(candidate): candidate for candidate in found}.values())


def _names(path: Path) -> set[str]:
    """The candidates of a file that is about to be replaced; none where it cannot be read."""
    from pytest_qlab.gate.baselines import Baseline

    with suppress(BaselineError):
        return set(Baseline.read(path).candidates)
    return set()


BASELINES = pytest.StashKey[Baselines]()


def baselines_of(config: pytest.Config) -> Baselines:
    """Those of the process."""
    return config.stash[BASELINES]
