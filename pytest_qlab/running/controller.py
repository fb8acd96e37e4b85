"""The hooks of the process that reports: xdist's controller, or the only process there is."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qlab.running.baselines import Baselines
from pytest_qlab.running.collector import Collector
from pytest_qlab.running.run import Run
from pytest_qlab.xdist.integrity import Integrity
from pytest_qlab.xdist.plan import read_plan

if TYPE_CHECKING:
    from pytest_qlab.xdist.scheduler import MethodScheduling

DURATIONS = "qlab/durations"


class Controller:
    """Gathers results, guards the exit status, schedules workers, shows the table."""

    def __init__(self, run: Run, baselines: Baselines) -> None:
        self._run = run
        self._baselines = baselines
        self._collector = Collector()
        self._integrity = Integrity()
        self._workers = 0
        self._ran = False

    # Integrity and results

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        # Not reached by --fixtures and the like, and passed through by --collect-only.
        self._ran = not self._run.config.getoption("collectonly")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expect([item.nodeid for item in session.items])

    def pytest_internalerror(self) -> None:
        self._integrity.internal_error()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._integrity.report(report)
        self._collector.add(report)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int
    ) -> Generator[None, Any, Any]:
        self._run.stop_following()
        self._integrity.require_all = self._has_results() and self._run.settings.require_all
        results = None
        if self._has_results():
            ids = [spec.id for spec in self._run.specs]
            results = self._collector.results(self._run.plan, ids)
            results.baseline = self._baselines.name
        if self._ran:
            self._integrity.complaints = self._baselines.complaints(results)
        status = self._integrity.judge(session, int(exitstatus), ran=self._ran)
        if self._ran and self._run.settings.save is not None:
            status = self._save(session, status)
        if status != exitstatus:
            session.exitstatus = status
        if results is not None:
            self._collector.notes += self._baselines.notes(results)
            self._collector.finish(self._run.settings, status, self._workers or 1)
            self._remember_durations()
        return (yield)

    def _save(self, session: pytest.Session, status: int) -> int:
        """Write the baseline of a green run; returns the exit status."""
        stopped = bool(session.shouldstop or session.shouldfail)
        green = status == pytest.ExitCode.OK and not stopped
        note, problem = self._baselines.save(self._collector.records, green=green)
        self._collector.notes += [note] if note else []
        self._integrity.problems += [problem] if problem else []
        return int(pytest.ExitCode.TESTS_FAILED) if problem else status

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._has_results():
            terminalreporter.section("qlab")
            for line in self._collector.table(self._run.config.get_terminal_writer().fullwidth - 1):
                terminalreporter.write_line(line)
        for line in self._collector.notes:
            terminalreporter.write_line(line)
        if self._integrity.problems:
            terminalreporter.section("qlab: this run is not complete", red=True, bold=True)
            for problem in self._integrity.problems:
                terminalreporter.write_line(problem, red=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        section = self._collector.section()
        if section is not None:
            prefix.append(section)

    def _has_results(self) -> bool:
        return self._ran and any(entry.group is not None for entry in self._run.plan.values())

    def _expect(self, names: Sequence[str]) -> None:
        plan = self._run.plan
        self._integrity.expect(names, [name for name in names if _group(plan.get(name))])

    def _remember_durations(self) -> None:
        cache = getattr(self._run.config, "cache", None)
        if cache is not None:
            plan, found = self._run.plan, self._collector.durations
            old = cache.get(DURATIONS, {})
            new = {name: round(found[name], 3) for name in plan if name in found}
            cache.set(DURATIONS, {**old, **new})

    # xdist

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        self._workers = len(specs)
        self._run.limit_threads(len(specs))
        self._run.follow_workers()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["qlab_dir"] = str(self._run.directory)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        if not self._run.plan:
            self._run.plan = read_plan(self._run.directory)
        self._expect(ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(
        self, config: pytest.Config, log: Any
    ) -> MethodScheduling | None:
        if self._run.user_dist != "no":
            return None
        from pytest_qlab.xdist.scheduler import MethodScheduling

        cache = getattr(config, "cache", None)
        remembered = {} if cache is None else cache.get(DURATIONS, {})
        return MethodScheduling(config, log, lambda: read_plan(self._run.directory), remembered)


def _group(entry: Any) -> str | None:
    return None if entry is None else entry.group
