"""Which inputs of the lab a test's conftest, module or class overrides.

The lab asks for the fixtures `base_model`, `tokenizer`, `eval_data` and `calibration` only where
somebody overrides them, because asking loads a model that a cached run does not need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pytest_qlab.errors import SpecError

OVERRIDABLE = ("base_model", "tokenizer", "eval_data", "calibration")
HOME = "pytest_qlab.fixtures"


class Override(NamedTuple):
    """A fixture that replaces one of ours: its name, where it is visible, its function."""

    name: str
    node: str
    function: str


def definitions(node: pytest.Item | Any, name: str) -> list[Any]:
    """Fixture definitions of that name visible to the node, the nearest last."""
    # pytest has no public way to ask which definition a test would get.
    manager = node.session._fixturemanager
    return list(manager.getfixturedefs(name, node) or ())


def is_ours(definition: Any) -> bool:
    """Whether the fixture definition is one of this plugin."""
    return getattr(definition.func, "__module__", "") == HOME


def find_overrides(node: pytest.Item | Any) -> tuple[Override, ...]:
    """The overrides that a test, given by its node, would see.

    Raises:
        SpecError: an override has a narrower scope than the lab, which lives for the session.
    """
    found = []
    for name in OVERRIDABLE:
        visible = definitions(node, name)
        if not visible or is_ours(visible[-1]):
            continue
        definition = visible[-1]
        where = f"{definition.func.__module__}.{definition.func.__qualname__}"
        if definition.scope != "session":
            raise SpecError(
                f"The fixture {name!r} is overridden by {where} with scope "
                f"{definition.scope!r}, but quantized models are made once a session. Declare the "
                'override with @pytest.fixture(scope="session").'
            )
        found.append(Override(name, definition.baseid, where))
    return tuple(found)


def refuse_hidden(node: pytest.Item | Any) -> None:
    """Refuse to gate another model than the project's tests do.

    Raises:
        SpecError: a conftest that was read overrides an input, but not for this test, which does
            not lie below it.
    """
    for name in OVERRIDABLE:
        if not all(map(is_ours, definitions(node, name))):
            continue
        for plugin in node.config.pluginmanager.get_plugins():
            file = Path(getattr(plugin, "__file__", None) or "")
            if file.name == "conftest.py" and hasattr(plugin, name):
                raise SpecError(
                    f"{file} overrides {name!r}, which built-in gates do not see from there, so "
                    "that they would judge something else than your tests do. Move the override "
                    "to the conftest.py of pytest's root directory, or add a test module beside "
                    "it with the line: from pytest_qlab.gates import test_budget"
                )


def overrides_for(request: pytest.FixtureRequest) -> tuple[Override, ...]:
    """The overrides for the test that a session fixture is being set up for."""
    item = getattr(request, "_pyfuncitem", None)
    return () if item is None else find_overrides(item)


def wants_parameter(node: pytest.Item | Any) -> bool:
    """Whether the fixture `quantized` that a test sees takes a method as its parameter.

    Ours does, and so does an override that asks for `quantized` itself or for `request`; one with
    `params` of its own, or that makes a candidate by other means, does not.
    """
    for definition in reversed(definitions(node, "quantized")):
        if is_ours(definition):
            return True
        if definition.params is not None:
            return False
        if "request" in definition.argnames:
            return True
        if "quantized" not in definition.argnames:
            return False
    return False
