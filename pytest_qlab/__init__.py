"""pytest-qlab: quantization methods of language models, compared honestly under pytest.

The names below are imported when they are first used, so that `import pytest_qlab` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.data.text import Document
    from pytest_qlab.errors import QlabError
    from pytest_qlab.estimate import Estimate
    from pytest_qlab.inputs import CalibrationSet
    from pytest_qlab.lab import Lab
    from pytest_qlab.methods.base import Method, QuantizedLayer
    from pytest_qlab.methods.preprocessing import Preprocessing
    from pytest_qlab.methods.registry import register_method, register_preprocessing
    from pytest_qlab.specs import MethodSpec

__all__ = [
    "CalibrationSet",
    "Candidate",
    "Document",
    "Estimate",
    "Lab",
    "Method",
    "MethodSpec",
    "Preprocessing",
    "QlabError",
    "QuantizedLayer",
    "__version__",
    "register_method",
    "register_preprocessing",
]
__version__ = "0.1.0"

_HOMES = {
    "CalibrationSet": "inputs",
    "Candidate": "candidate",
    "Document": "data.text",
    "Estimate": "estimate",
    "Lab": "lab",
    "Method": "methods.base",
    "MethodSpec": "specs",
    "Preprocessing": "methods.preprocessing",
    "QlabError": "errors",
    "QuantizedLayer": "methods.base",
    "register_method": "methods.registry",
    "register_preprocessing": "methods.registry",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pytest_qlab.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pytest_qlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
