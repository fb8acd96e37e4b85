"""Errors written for the person who reads them: what was given, what was expected, what to do.

Every error that a wrong input or a broken environment can cause derives from `QlabError`. The
plugin prints its message as one paragraph, without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class QlabError(Exception):
    """Base of all errors that pytest-qlab raises on purpose."""


class SpecError(QlabError):
    """A method specification or an option that cannot be understood."""


class ModelError(QlabError):
    """A model that cannot be loaded, or cannot be quantized as asked."""


class DataError(QlabError):
    """Text or a file that cannot be read, or text that is too small."""


class MethodError(QlabError):
    """A method that cannot quantize what it was given."""


class EngineError(MethodError):
    """Another project's runtime that failed, died or did not answer."""


class MetricError(QlabError):
    """A measurement that did not yield a number that may be compared."""


class NotMeasuredError(MetricError):
    """A measurement that could not be made now: neither a pass nor a failure."""


class BaselineError(DataError):
    """A saved baseline that is missing, damaged, or of something else than what is measured."""


class RegressionError(QlabError):
    """A candidate that is worse than the saved one by more than was allowed."""


class StoreError(QlabError):
    """The store of artefacts cannot be read or written."""


class CorruptEntryError(StoreError):
    """An entry of the store is not what was written."""


class StoreFullError(StoreError):
    """No space was left while an artefact was being written."""


class MissingExtraError(QlabError):
    """Something was asked for that needs an optional dependency."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs an optional dependency that is not installed. "
            f'Install it with: pip install "pytest-qlab[{extra}]"'
        )
        self.extra = extra


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """Return ' Did you mean ...? Valid: ...' for an error message about the name `given`."""
    names = sorted(valid)
    close = get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    return f"{hint} Valid: {', '.join(names) or '(none)'}."
