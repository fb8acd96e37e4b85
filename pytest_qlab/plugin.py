"""The hooks of pytest-qlab, and nothing else; no heavy import happens here."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

from pytest_qlab import hookspecs
from pytest_qlab.decision import decide_by
from pytest_qlab.errors import BaselineError, NotMeasuredError, QlabError, RegressionError
from pytest_qlab.estimate import Comparison, observe_comparisons
from pytest_qlab.fixtures import (  # noqa: F401  (pytest finds fixtures in the plugin's names)
    _qlab_default,
    base_model,
    baseline,
    calibration,
    eval_data,
    qlab,
    quantized,
    tokenizer,
)
from pytest_qlab.gate.budgets import describe as describe_budgets
from pytest_qlab.options import add_options, check_flags, on_command_line
from pytest_qlab.running.baselines import BASELINES, Baselines, baselines_of
from pytest_qlab.running.causes import causes_of_comparison, causes_of_decision
from pytest_qlab.running.controller import Controller
from pytest_qlab.running.decisions import REFUSED, add_explanation, policy_of
from pytest_qlab.running.explain import explain_comparison
from pytest_qlab.running.hooked import register_methods_of_hooks
from pytest_qlab.running.parametrize import parametrize, refuse_mistakes
from pytest_qlab.running.payload import (
    CHANGES,
    COMPARISONS,
    RECORDS,
    attach,
    plain_properties,
)
from pytest_qlab.running.planning import plan_text
from pytest_qlab.running.run import RUN, Run, run_of
from pytest_qlab.settings import available_cores, explicitly_set, read_settings
from pytest_qlab.xdist.plan import make_plan, write_plan

MARKERS = (
    "qlab(methods=[...], exclusive=False): run a test of `quantized` for some methods only; "
    "exclusive=True lets no other test run at the same time",
    "qlab_exclusive: no other test may run at the same time as this one",
)
_USER_DIST = pytest.StashKey[str]()


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspecs)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> None:
    check_flags(parser, args)
    # What the user said, before xdist fills in its own default.
    options = early_config.known_args_namespace
    given = "load" if getattr(options, "distload", False) else getattr(options, "dist", "no")
    early_config.stash[_USER_DIST] = given


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    register_methods_of_hooks(config)
    if config.getoption("--qlab-plan"):
        sys.stdout.write(plan_text(config))
        return 0
    if not config.getoption("--qlab-list-methods"):
        return None
    from pytest_qlab.report.methods import describe_methods

    text = describe_methods()
    for name, table in read_settings(config).configurations.items():
        options = ", ".join(f"{key}={value}" for key, value in table.items())
        text += f"\n{name}\n  [tool.qlab.methods.{name}] {options}\n"
    sys.stdout.write(text)
    return 0


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int | None, int | None]:
    found = yield
    if found is None or os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return found
    # Only if this run is plainly about methods: other tests may well use more workers.
    if not on_command_line(config, "methods"):
        return found
    run = Run(config)
    bounds = {"cores": found, "methods": len(run.specs)}
    if on_command_line(config, "threads"):
        bounds["threads"] = max(1, available_cores() // run.settings.threads)
    return min(bounds.values())


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    run = Run(config)
    config.stash[RUN] = run
    config.stash[BASELINES] = Baselines(run)
    if not run.is_worker:
        run.validate()
        if explicitly_set(config):  # Otherwise settings are not even read.
            baselines_of(config).validate()
        run.user_dist = config.stash.get(_USER_DIST, "no")
        controller = Controller(run, baselines_of(config))
        config.pluginmanager.register(controller, "qlab-controller")


def pytest_unconfigure(config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is not None:
        run.close()


def pytest_report_header(config: pytest.Config) -> str | None:
    if not (explicitly_set(config) or config.get_verbosity() > 0):
        return None
    settings = run_of(config).settings
    methods = ",".join(settings.methods) or "default"
    header = f"qlab: model={settings.model} methods={methods} store={settings.store}"
    if settings.budgets:
        header += f"\nqlab budgets: {describe_budgets(run_of(config).specs, settings.budgets)}"
    name = baselines_of(config).name
    if name:
        held = ", ".join(map(str, settings.compare_fail)) or "nothing is held to it"
        header += f"\nqlab baseline: {name} ({held})"
    return header


# Collection


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if not run_of(config).is_worker:
        refuse_mistakes(run_of(config))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    run = run_of(session.config)
    plan = make_plan(session.items)
    if any(entry.group is not None or entry.exclusive for entry in plan.values()):
        run.plan = plan
        if run.is_worker:
            # Before xdist reports the collection, upon which the controller reads the plan.
            write_plan(plan, run.directory, run.worker)


# Running


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    run = run_of(item.config)
    comparisons: list[Comparison] = []
    item.stash[COMPARISONS] = comparisons
    item.stash[REFUSED] = []
    policy = decide_by(lambda: policy_of(run.settings, item.stash[REFUSED]))
    alone = run.alone_or_shared(run.plan.get(item.nodeid))
    with alone, observe_comparisons(comparisons.append), policy:
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash.get(COMPARISONS, []).clear()  # A plugin may run the test again.
    item.stash.get(REFUSED, []).clear()
    item.stash[CHANGES], item.stash[RECORDS] = {}, []
    if item.nodeid in run_of(item.config).plan:
        # They keep the frames of the last failure alive, and with them its quantized model.
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            if hasattr(sys, name):
                delattr(sys, name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    __tracebackhide__ = True
    baselines = baselines_of(item.config)
    try:
        yield
    except (Exception, pytest.fail.Exception, pytest.skip.Exception):
        baselines.after(item, passed=False)
        raise
    baselines.after(item, passed=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    raised = call.excinfo.value if call.excinfo is not None else None
    if raised is not None:
        labs = run_of(item.config).labs
        add_explanation(
            raised, item.stash.get(REFUSED, []), lambda decision: causes_of_decision(labs, decision)
        )
    report = yield
    if isinstance(raised, RegressionError | BaselineError) and hasattr(report, "wasxfail"):
        # What the test expects to fail is its own, not what it is compared with.
        report.outcome = "failed"
        del report.wasxfail
    error = raised if isinstance(raised, QlabError) else None
    shown_in_full = item.config.getoption("fulltrace", False)
    if error is not None and call.excinfo is not None and report.failed and not shown_in_full:
        report.longrepr = call.excinfo.getrepr(style="value", chain=False)
        if isinstance(error, NotMeasuredError):
            # Neither a pass nor a failure; --qlab-require-all makes it one.
            report.outcome = "skipped"
            path, line, _ = item.location
            report.longrepr = (path, (line or 0) + 1, f"Skipped: {error}")
            error = None
    try:
        attach(run_of(item.config), item, report, error)
    except Exception as problem:  # Results that are lost in silence would look like a pass.
        report.outcome = "failed"
        report.longrepr = (
            "pytest-qlab could not collect what this test measured: "
            f"{type(problem).__name__}: {problem}"
        )
    if run_of(item.config).is_worker:
        plain_properties(report)
    return report


def pytest_assertrepr_compare(
    config: pytest.Config, op: str, left: object, right: object
) -> list[str] | None:
    lines = explain_comparison(op, left, right)
    if lines is not None:
        lines += causes_of_comparison(run_of(config).labs, op, left, right)
    return lines
