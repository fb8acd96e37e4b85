"""Guards against runs that look green because something was lost; they live on the controller."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

NOT_SELECTED = "not-selected"
INTERNAL_ERROR = int(pytest.ExitCode.INTERNAL_ERROR)


class Integrity:
    """Counts tests scheduled and reported, and remembers internal errors of any process.

    Attributes:
        require_all: whether a skipped test of a candidate fails the run.
        complaints: what fails a run in which every test passed.
        problems: what was found wrong, for the terminal.
    """

    def __init__(self) -> None:
        self.require_all = False
        self.complaints: list[str] = []
        self.problems: list[str] = []
        self._broken = False
        self._expected: set[str] = set()
        self._candidates: set[str] = set()
        self._reported: set[str] = set()
        self._skipped: set[str] = set()

    def expect(self, names: Iterable[str], candidates: Iterable[str]) -> None:
        """Note the node ids that were scheduled, and which of them test candidates."""
        self._expected.update(names)
        self._candidates.update(candidates)

    def internal_error(self) -> None:
        """Note that a process of this run broke down inside pytest or a plugin."""
        self._broken = True

    def report(self, report: pytest.TestReport) -> None:
        """Note that a test was heard of: it has ended, or its worker died."""
        if report.when not in ("setup", "call"):
            self._reported.add(report.nodeid)
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skipped.add(report.nodeid)

    def judge(self, session: pytest.Session, status: int, *, ran: bool) -> int:
        """The exit status, which is never 0 where something was lost; fills `problems`.

        `status` is what pytest has found; `ran` says whether it got as far as running tests.
        """
        stopped = bool(session.shouldstop or session.shouldfail) or status in (
            int(pytest.ExitCode.INTERRUPTED),
            int(pytest.ExitCode.USAGE_ERROR),
        )
        quiet = status in (int(pytest.ExitCode.OK), int(pytest.ExitCode.NO_TESTS_COLLECTED))
        if self._broken:
            self.problems.append(
                "a process of this run ended with an internal error (see above), so results are "
                "missing: the run counts as failed."
            )
            status = INTERNAL_ERROR
        lost = sorted(self._expected - self._reported) if self._candidates and ran else []
        if lost and not stopped:
            shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
            self.problems.append(
                f"{len(lost)} of {len(self._expected)} tests were scheduled but never reported, so "
                f"the run counts as failed: {shown}"
            )
            if quiet:
                status = INTERNAL_ERROR
        emptied = {name for name in self._candidates if NOT_SELECTED in name.rpartition("[")[2]}
        if emptied and emptied == self._candidates and ran:
            self.problems.append(
                "no test is left for the methods of this run: "
                f"{', '.join(sorted(emptied)[:3])}{', ...' if len(emptied) > 3 else ''} "
                "run for other methods only. Choose one of theirs with --qlab-methods."
            )
            if quiet:
                status = int(pytest.ExitCode.USAGE_ERROR)
        skipped = sorted(self._skipped & self._candidates)
        if skipped and self.require_all:
            self.problems.append(
                f"--qlab-require-all: {len(skipped)} tests of quantized models were skipped: "
                f"{', '.join(skipped[:5])}{', ...' if len(skipped) > 5 else ''}"
            )
            if quiet:
                status = int(pytest.ExitCode.TESTS_FAILED)
        if status == pytest.ExitCode.OK and self.complaints:
            self.problems += self.complaints
            status = int(pytest.ExitCode.TESTS_FAILED)
        return status
