"""Hooks that other plugins and conftest.py files may implement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_qlab.methods.base import Method


@pytest.hookspec
def pytest_qlab_methods(config: pytest.Config) -> Iterable[type[Method]] | None:
    """Methods that can be chosen in this run, besides those that are registered otherwise.

    Called once in every process, before specifications are read. Classes are registered under their
    `name`, as by the decorator `register_method`.
    """
