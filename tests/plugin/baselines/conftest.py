"""The projects of the tests of saved baselines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qlab.gate.baselines import Baseline
from pytest_qlab.gate.record import record_of
from tests.lab.tiny import documents, saved_tiny_model
from tests.plugin.baselines.project import Project, small


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, another model, texts, and a store that all runs share."""
    root = tmp_path_factory.mktemp("inputs")
    saved_tiny_model(root / "model")
    for name, seed in (("evaluation", 1), ("calibration", 2), ("elsewhere", 3)):
        (root / name).mkdir()
        for number, document in enumerate(documents(6, seed)):
            (root / name / f"{number}.txt").write_text(document.text, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def release(inputs: Path) -> Baseline:
    """What a run with `small` at 4 bits saves."""
    return record_of(small(inputs, 4), evaluated=True)


@pytest.fixture
def project(pytester: pytest.Pytester, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("QLAB_STORE", str(inputs / "store"))
    return Project(pytester, inputs)


@pytest.fixture
def released(project: Project, release: Baseline) -> Project:
    """With the baseline `v1`, and `small` at 3 bits since."""
    release.write(project.file("v1"))
    project.configure(bits=3)
    return project
