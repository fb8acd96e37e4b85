"""Methods that plugins and conftest.py files hand in through the hook `pytest_qlab_methods`."""

from __future__ import annotations

import pytest

from pytest_qlab.errors import SpecError


def register_methods_of_hooks(config: pytest.Config) -> None:
    """Call the hook, and register what it returns: methods, and preprocessings.

    Raises:
        pytest.UsageError: something is neither, or has a name that is taken.
    """
    if not config.hook.pytest_qlab_methods.get_hookimpls():
        return  # Other tests should not even import pydantic.
    from pytest_qlab.methods.base import Method
    from pytest_qlab.methods.preprocessing import Preprocessing
    from pytest_qlab.methods.registry import register_method, register_preprocessing

    for found in config.hook.pytest_qlab_methods(config=config):
        try:
            classes = list(found)
        except TypeError:
            classes = [found]
        for each in classes:
            kind = each if isinstance(each, type) else object
            try:
                if issubclass(kind, Method):
                    register_method(kind)
                elif issubclass(kind, Preprocessing):
                    register_preprocessing(kind)
                else:
                    raise pytest.UsageError(
                        f"An implementation of the hook pytest_qlab_methods returned {each!r}; "
                        "expected subclasses of pytest_qlab.Method or Preprocessing in a list."
                    )
            except SpecError as error:
                raise pytest.UsageError(str(error)) from error
