"""The state of one pytest process: settings, methods, the run's directory, labs, progress."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qlab.errors import QlabError
from pytest_qlab.options import on_command_line
from pytest_qlab.settings import Settings, available_cores, explicitly_set, read_settings
from pytest_qlab.xdist.locks import MachineLock, machine_lock_directory
from pytest_qlab.xdist.plan import PlanEntry
from pytest_qlab.xdist.progress import (
    LOG_SECONDS,
    TERMINAL_SECONDS,
    DirectProgress,
    FileProgress,
    ProgressTail,
)

if TYPE_CHECKING:
    from pytest_qlab.specs import MethodSpec

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Run:
    """What the plugin's hooks and fixtures share in one process.

    Attributes:
        worker: the worker's id, or empty in the controller and without xdist.
        user_dist: what the user said with `--dist`; `no` if nothing.
        plan: the tests of this process, or on the controller those of all workers.
        labs: the labs made in this process, for their counters.
        usage_errors: messages about wrong markers, found while tests were collected.
        parametrized, emptied: tests that were given methods, and messages about those that a
            marker left without any.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        workerinput: dict[str, Any] = getattr(config, "workerinput", {})
        self.is_worker = bool(workerinput)
        self.worker = str(workerinput.get("workerid", ""))
        self.workers = int(workerinput.get("workercount", 1))
        self.user_dist = "no"
        self.plan: dict[str, PlanEntry] = {}
        self.labs: list[Any] = []
        self.usage_errors: list[str] = []
        self.parametrized = 0
        self.emptied: list[str] = []
        self._given_dir = workerinput.get("qlab_dir")
        self._own_dir: Path | None = None
        self._settings: Settings | None = None
        self._specs: list[MethodSpec] | None = None
        self._tail: ProgressTail | None = None
        self._lock: MachineLock | None = None
        self._environment: dict[str, str | None] = {}
        self._file: FileProgress | None = None
        self._direct = DirectProgress(self._write_uncaptured, self._interval())

    @property
    def settings(self) -> Settings:
        """Options added up.

        Raises:
            pytest.UsageError: an option has a wrong value.
        """
        if self._settings is None:
            self._settings = read_settings(self.config, workers=self.workers)
        return self._settings

    @property
    def specs(self) -> list[MethodSpec]:
        """The methods to compare, in the order in which they were named.

        Raises:
            pytest.UsageError: a method or one of its options is unknown, or none is left.
        """
        if self._specs is None:
            from pytest_qlab.specs import DEFAULT_SPECS, parse_specs

            try:
                self._specs = parse_specs(
                    self.settings.methods or DEFAULT_SPECS, self.settings.configurations
                )
            except QlabError as error:
                raise pytest.UsageError(str(error)) from error
        return self._specs

    @property
    def directory(self) -> Path:
        """The run's directory, shared by its workers; removed when the run ends."""
        if self._given_dir and Path(self._given_dir).is_dir():
            return Path(self._given_dir)
        if self._own_dir is None:
            self._own_dir = Path(tempfile.mkdtemp(prefix="pytest-qlab-"))
        return self._own_dir

    def validate(self) -> None:
        """Check options early if any was given, so that a mistake ends the run at once.

        Raises:
            pytest.UsageError: an option has a wrong value.
        """
        if explicitly_set(self.config):
            _ = self.settings
            if self.settings.methods or self.settings.configurations:
                _ = self.specs
            self._check_budgets()
        self._check_text_names()

    def _check_budgets(self) -> None:
        """A budget for a method that is none must not pass for one that is kept."""
        if not self.settings.budgets:
            return
        from pytest_qlab.gate.budgets import check_patterns
        from pytest_qlab.methods.registry import method_names

        named = any(on_command_line(self.config, key) for key in ("methods", "candidate"))
        known = [*method_names(), *self.settings.configurations]
        try:
            check_patterns(self.settings.budgets, self.specs, narrowed=named, known=known)
        except QlabError as error:
            raise pytest.UsageError(str(error)) from error

    def _check_text_names(self) -> None:
        """One error for a mistyped name on the command line, not one for each candidate."""
        given = {
            "eval": self.settings.evaluation if on_command_line(self.config, "eval") else (),
            "calibration": self.settings.calibration
            if on_command_line(self.config, "calibration")
            else (),
        }
        if not any(given.values()):
            return
        from pytest_qlab.data.text import check_name

        for option, names in given.items():
            for name in names:
                try:
                    check_name(name)
                except QlabError as error:
                    raise pytest.UsageError(f"--qlab-{option}: {error}") from error

    def progress(self, line: str) -> None:
        """Show a line about long work, in whichever way this process can."""
        if self.is_worker:
            if self._file is None:
                self._file = FileProgress(self.directory, self.worker)
            self._file(line)
        else:
            self._direct(line)

    def follow_workers(self) -> None:
        """Begin to print what workers say about long work."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or self.config.get_verbosity() < 0 or self._tail is not None:
            return
        self._tail = ProgressTail(self.directory, reporter.write_line, self._interval())
        self._tail.start()

    def stop_following(self) -> None:
        """Stop printing what workers say."""
        if self._tail is not None:
            self._tail.stop()
            self._tail = None

    def limit_threads(self, workers: int) -> None:
        """Set thread counts of numeric libraries for workers, unless the user has set them."""
        share = str(max(1, available_cores() // max(1, workers)))
        for name in THREAD_VARIABLES:
            if name not in os.environ:
                self._environment.setdefault(name, None)
                os.environ[name] = share

    @contextmanager
    def alone_or_shared(self, entry: PlanEntry | None) -> Iterator[None]:
        """Hold the machine's lock while a test runs: exclusively if its entry says so.

        Runs without any test of a candidate take no lock.
        """
        with nullcontext() if entry is None else self._locked(entry.exclusive):
            yield

    def close(self) -> None:
        """End the process's part of the run."""
        self.stop_following()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
        if self._own_dir is not None:
            shutil.rmtree(self._own_dir, ignore_errors=True)
            self._own_dir = None

    def _locked(self, exclusive: bool) -> Any:
        if self._lock is None:
            self._lock = MachineLock(self._lock_directory(), self.progress)
        return self._lock.exclusive() if exclusive else self._lock.shared()

    def _lock_directory(self) -> Path:
        from pytest_qlab.store import default_store

        directory = machine_lock_directory(default_store())
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if os.access(directory, os.W_OK):
                return directory
        except OSError:
            pass
        # Without a place that other runs know, at least this run's workers exclude each other.
        return self.directory / "locks"

    def _interval(self) -> float:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        return TERMINAL_SECONDS if getattr(reporter, "isatty", False) else LOG_SECONDS

    def _write_uncaptured(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or self.config.get_verbosity() < 0:
            return
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        disabled: Callable[[], Any] = (
            nullcontext if capture is None else capture.global_and_fixture_disabled
        )
        with disabled():
            reporter.write_line(line)


RUN = pytest.StashKey[Run]()


def run_of(config: pytest.Config) -> Run:
    """The run that the configuration belongs to."""
    return config.stash[RUN]
