"""One run of a test for each method: parametrization, and restriction by marker."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_qlab.directions import is_timed
from pytest_qlab.errors import QlabError, SpecError, did_you_mean
from pytest_qlab.running.overrides import find_overrides, refuse_hidden, wants_parameter
from pytest_qlab.running.run import Run, run_of
from pytest_qlab.xdist.integrity import NOT_SELECTED

GATES = "pytest_qlab.gates"
BUDGET = "qlab_budget"
"""Argument that the built-in gates take a configured budget by, beside `quantized`."""


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give `quantized` its methods and `qlab` its overrides, where the test asks for them.

    A mistake is noted for `pytest_collection_modifyitems`, which turns it into a usage error; a
    worker has to report a collection error instead, because the controller learns only of those.
    """
    names = metafunc.fixturenames
    if "qlab" not in names and "quantized" not in names:
        return
    run = run_of(metafunc.config)
    try:
        if "qlab" in names:
            _pass_overrides(metafunc)
        if BUDGET in names:
            _pass_budgets(metafunc, run)
        elif "quantized" in names and _is_ours_to_parametrize(metafunc):
            _pass_methods(metafunc, run)
    except (QlabError, pytest.UsageError) as error:
        message = f"{metafunc.definition.nodeid}: {error}"
        if run.is_worker:
            raise pytest.Collector.CollectError(message) from error
        run.usage_errors.append(message)


def _pass_overrides(metafunc: pytest.Metafunc) -> None:
    # As a hidden parameter, overrides are part of the fixture's cache key: tests that see others
    # get a lab of their own.
    overrides = find_overrides(metafunc.definition)
    if overrides:
        metafunc.parametrize(
            "qlab", [overrides], indirect=True, ids=[pytest.HIDDEN_PARAM], scope="session"
        )


def _pass_budgets(metafunc: pytest.Metafunc, run: Run) -> None:
    from pytest_qlab.gate.budgets import gates_of

    if metafunc.module.__name__ == GATES:
        refuse_hidden(metafunc.definition)
    if not wants_parameter(metafunc.definition):
        raise SpecError(
            "'quantized' is overridden here by a fixture that takes no method, so that gates would "
            "judge another model than their names say. Let it ask for 'quantized' itself, or "
            "keep the gates out of its reach."
        )
    run.parametrized += 1
    metafunc.parametrize(
        ("quantized", BUDGET),
        [
            pytest.param(
                spec,
                budget,
                id=f"{spec.id}-{budget.metric}",
                marks=pytest.mark.qlab_exclusive if is_timed(budget.metric) else (),
            )
            for spec, budget in gates_of(run.specs, run.settings.budgets)
        ],
        indirect=["quantized"],
        scope="session",
    )


def _is_ours_to_parametrize(metafunc: pytest.Metafunc) -> bool:
    for marker in metafunc.definition.iter_markers("parametrize"):
        given = marker.args[0] if marker.args else marker.kwargs.get("argnames", "")
        listed = given.split(",") if isinstance(given, str) else given
        if "quantized" in [name.strip() for name in listed]:
            return False
    return wants_parameter(metafunc.definition)


def _pass_methods(metafunc: pytest.Metafunc, run: Run) -> None:
    patterns = _patterns(metafunc.definition)
    specs = run.specs if patterns is None else _restricted(run, patterns)
    if specs:
        run.parametrized += 1
        metafunc.parametrize(
            "quantized", specs, indirect=True, ids=[spec.id for spec in specs], scope="session"
        )
        return
    assert patterns is not None
    chosen = ", ".join(spec.id for spec in run.specs)
    reason = f"needs one of {', '.join(patterns)}; this run compares {chosen}"
    run.emptied.append(f"{metafunc.definition.nodeid}: {reason}")
    metafunc.parametrize(
        "quantized",
        [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=NOT_SELECTED)],
        indirect=True,
        scope="session",
    )


def _patterns(definition: Any) -> list[str] | None:
    """What `@pytest.mark.qlab(methods=...)` says; the marker nearest to the test wins."""
    for marker in definition.iter_markers("qlab"):
        unknown = set(marker.kwargs) - {"methods", "exclusive"}
        if unknown or marker.args:
            given = ", ".join([*map(repr, marker.args), *sorted(unknown)])
            raise SpecError(
                f"@pytest.mark.qlab takes methods=[...] and exclusive=True or False by name; "
                f"given {given}."
            )
        if "methods" in marker.kwargs:
            methods = marker.kwargs["methods"]
            methods = [methods] if isinstance(methods, str) else list(methods)
            if not methods or not all(isinstance(method, str) for method in methods):
                raise SpecError(
                    f"@pytest.mark.qlab(methods={methods!r}) names no method. Give a list such as "
                    'methods=["gptq", "awq"].'
                )
            return [piece.strip() for method in methods for piece in method.split(",")]
    return None


def _restricted(run: Run, patterns: list[str]) -> list[Any]:
    """The run's methods that a pattern names; a pattern is a name, an id, a glob, or a spec.

    Raises:
        SpecError: a pattern that names no method there is.
    """
    from pytest_qlab.methods.registry import method_names
    from pytest_qlab.specs import known_name, parse_specs

    kept: set[str] = set()
    for pattern in patterns:
        hits = {spec.id for spec in run.specs if spec.matches(pattern)}
        if not hits:
            # Known, though not chosen for this run? Otherwise it is a slip of the pen.
            known = [*method_names(), *run.settings.configurations]
            try:
                named = {spec.id for spec in parse_specs([pattern], run.settings.configurations)}
            except SpecError as error:
                if ":" in pattern or any(character in pattern for character in "*?["):
                    raise
                if known_name(pattern, known):
                    continue
                raise SpecError(
                    f"@pytest.mark.qlab: unknown method {pattern!r}.{did_you_mean(pattern, known)}"
                ) from error
            hits = {spec.id for spec in run.specs if spec.id in named}
        kept |= hits
    return [spec for spec in run.specs if spec.id in kept]


def refuse_mistakes(run: Run) -> None:
    """Raise what was noted while tests were collected.

    Raises:
        pytest.UsageError: a marker is wrong, or no test is left for any method of the run.
    """
    if run.usage_errors:
        raise pytest.UsageError("\n".join(dict.fromkeys(run.usage_errors)))
    if run.emptied and not run.parametrized:
        raise pytest.UsageError(
            "no test is left for the methods of this run. " + "; ".join(run.emptied[:3])
        )
