"""Methods that plugins and conftest.py files hand in through the hook `pytest_qlab_methods`."""

from __future__ import annotations

import pytest

from pytest_qlab.errors import SpecError
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.registry import register_method


def register_methods_of_hooks(config: pytest.Config) -> None:
    """Call the hook, and register what it returns.

    Raises:
        pytest.UsageError: something is no method, or has a name that is taken.
    """
    for found in config.hook.pytest_qlab_methods(config=config):
        try:
            classes = list(found)
        except TypeError:
            classes = [found]
        for each in classes:
            if not (isinstance(each, type) and issubclass(each, Method)):
                raise pytest.UsageError(
                    f"An implementation of the hook pytest_qlab_methods returned {each!r}; "
                    "expected subclasses of pytest_qlab.Method in a list."
                )
            try:
                register_method(each)
            except SpecError as error:
                raise pytest.UsageError(str(error)) from error
