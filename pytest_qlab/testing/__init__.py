"""For tests of methods and of plugins: a conformance suite, a tiny model, a toy method."""

from pytest_qlab.testing.conformance import MethodConformance
from pytest_qlab.testing.fakes import (
    ToyMethod,
    save_tiny_model,
    tiny_documents,
    tiny_lab,
    tiny_model,
    tiny_tokenizer,
)
from pytest_qlab.testing.problems import gaussian_weight, statistics_of, toy_problem

__all__ = [
    "MethodConformance",
    "ToyMethod",
    "gaussian_weight",
    "save_tiny_model",
    "statistics_of",
    "tiny_documents",
    "tiny_lab",
    "tiny_model",
    "tiny_tokenizer",
    "toy_problem",
]
