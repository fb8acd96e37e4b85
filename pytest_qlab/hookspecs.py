"""Hooks that other plugins and conftest.py files may implement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_qlab.methods.base import Method
    from pytest_qlab.methods.preprocessing import Preprocessing


@pytest.hookspec
def pytest_qlab_methods(
    config: pytest.Config,
) -> Iterable[type[Method] | type[Preprocessing]] | None:
    """Methods and preprocessings for this run, besides those that are registered otherwise.

    Called once in every process, before specifications are read. Classes are registered under their
    `name`, as by the decorators `register_method` and `register_preprocessing`.
    """
