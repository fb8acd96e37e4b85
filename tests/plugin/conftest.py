"""Fixtures of the plugin's tests."""

from __future__ import annotations

import pytest

from tests.plugin.fakes import CONFTEST

LEAKING = (
    "CI",
    "GITHUB_STEP_SUMMARY",
    "PYTEST_ADDOPTS",
    "PYTEST_XDIST_AUTO_NUM_WORKERS",
    "PYTEST_XDIST_WORKER",
    "QLAB_MACHINE_LOCK",
    "QLAB_STORE",
    "XDG_CACHE_HOME",
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LEAKING:
        monkeypatch.delenv(name, raising=False)
    # What else happens to be installed would triple the time that each inner run takes to start.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_qlab.plugin,xdist.plugin")


@pytest.fixture
def autoload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let inner runs load every plugin that is installed, ours by its entry point."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.delenv("PYTEST_PLUGINS")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A directory with the fakes' conftest.py; run it in a subprocess, for it replaces the Lab."""
    pytester.makeconftest(CONFTEST)
    return pytester
