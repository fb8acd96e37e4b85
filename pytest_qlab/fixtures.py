"""The fixtures. Importing this module imports no torch; a model is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qlab.errors import SpecError
from pytest_qlab.running.overrides import Override, overrides_for
from pytest_qlab.running.run import Run, run_of

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.data.windows import WindowSet
    from pytest_qlab.inputs import CalibrationSet
    from pytest_qlab.lab import Lab

# Which argument of the Lab each overridable fixture stands for.
ARGUMENTS = {
    "base_model": "model",
    "tokenizer": "tokenizer",
    "eval_data": "evaluation",
    "calibration": "calibration",
}


def make_lab(run: Run, **overrides: Any) -> Lab:
    """The lab that the settings describe; `overrides` replace arguments of it."""
    from pytest_qlab.lab import Lab

    lab = Lab.from_settings(run.settings, run_dir=run.directory, progress=run.progress, **overrides)
    run.labs.append(lab)
    return lab


@pytest.fixture(scope="session")
def _qlab_default(pytestconfig: pytest.Config) -> Iterator[Lab]:
    """The lab without any override; making it loads nothing."""
    lab = make_lab(run_of(pytestconfig))
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def base_model(_qlab_default: Lab) -> Any:
    """The model before quantization: a transformers causal LM in evaluation mode.
    Chosen with --qlab-model (default: the small model that ships with pytest-qlab).

    Override it in your conftest.py to bring a model of your own, which every candidate is then
    made from; give the override scope="session".
    """
    return _qlab_default.base_model


@pytest.fixture(scope="session")
def tokenizer(_qlab_default: Lab) -> Any:
    """The base model's tokenizer. Override it (scope="session") together with base_model."""
    return _qlab_default.tokenizer


@pytest.fixture(scope="session")
def eval_data(_qlab_default: Lab) -> WindowSet:
    """The token windows that quality is measured on, chosen with --qlab-eval=NAME_OR_PATH[,...].
    An override (scope="session") may return names, paths, documents or finished windows.
    """
    return _qlab_default.eval_data


@pytest.fixture(scope="session")
def calibration(_qlab_default: Lab) -> CalibrationSet:
    """The token sequences that methods calibrate on: --qlab-calibration=NAME_OR_PATH[,...].
    An override (scope="session") may return names, paths, documents or finished sequences.
    """
    return _qlab_default.calibration


@pytest.fixture(scope="session")
def qlab(request: pytest.FixtureRequest, _qlab_default: Lab) -> Iterator[Lab]:
    """The Lab: base model, evaluation and calibration set, and any candidate made of them.
    Everything is computed when it is first asked for, and kept in the store.
        def test_three_bits(qlab):
            assert qlab.candidate("gptq:bits=3").kl.mean < qlab.candidate("rtn:bits=3").kl.mean
    """
    chosen: tuple[Override, ...] | None = getattr(request, "param", None)
    if chosen is None:
        chosen = overrides_for(request)
    if not chosen:
        yield _qlab_default
        return
    overrides = {
        ARGUMENTS[override.name]: request.getfixturevalue(override.name) for override in chosen
    }
    lab = make_lab(run_of(request.config), **overrides)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def baseline(qlab: Lab) -> Candidate:
    """The base model as a candidate: measured like every other, quantized by `none`."""
    return qlab.baseline


@pytest.fixture(scope="session")
def quantized(request: pytest.FixtureRequest, qlab: Lab) -> Iterator[Candidate]:
    """The base model quantized by each method of --qlab-methods in turn, one test for each.
    @pytest.mark.qlab(methods=["gptq", "awq"]) restricts a test to some of them.
        def test_quality(quantized):
            assert quantized.perplexity_delta < 0.1
    Measures (perplexity, perplexity_delta, kl, top1_agreement, compression_ratio, latency, ...)
    are computed when they are read, once for all tests, workers and later runs.
    """
    if not hasattr(request, "param"):
        raise SpecError(
            "The fixture `quantized` was requested by request.getfixturevalue(), so it has no "
            "method to use. Name it as an argument of the test or of a fixture that the test "
            'names, or use qlab.candidate("gptq") for one method.'
        )
    candidate = qlab.candidate(request.param)
    yield candidate
    candidate.release()
