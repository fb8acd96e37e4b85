"""A `llama_cpp` that is not llama.cpp, for the process that imports one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package `llama_cpp` that a new process finds: `fake_library`, unless overwritten."""
    package = tmp_path / "library" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.0.fake"\n')
    (package / "llama_cpp.py").write_text("from tests.engines.fake_library import *\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(ROOT)]))
    return package


@pytest.fixture
def fake_model(fake_llama_cpp: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a model of the fake library; see there for its fields."""

    def write(name: str = "model.gguf", **fields: Any) -> Path:
        path = tmp_path / "models" / name
        path.parent.mkdir(exist_ok=True)
        written = {"vocabulary": 6, "context": 4096, **fields}
        path.write_text(json.dumps(written), encoding="utf-8")
        return path

    return write
