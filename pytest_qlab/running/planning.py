"""`--qlab-plan`: what the budgets of a run need, shown instead of running it."""

from __future__ import annotations

import pytest

from pytest_qlab.errors import QlabError
from pytest_qlab.running.run import Run


def plan_text(config: pytest.Config) -> str:
    """The table of windows that each budget of `[tool.qlab.budgets]` needs; no model is loaded.

    It is of the model and the text that options name: fixtures are not asked for others.

    Raises:
        pytest.UsageError: an option has a wrong value, there are no budgets, or no such text.
    """
    from pytest_qlab.fixtures import make_lab
    from pytest_qlab.gate.baselines import Baseline, find, missing
    from pytest_qlab.gate.budgets import gates_of

    run = Run(config)
    run.validate()
    settings = run.settings
    try:
        gates = gates_of(run.specs, settings.budgets)
        baselines = []
        if settings.compare is not None:
            path = find(settings.baselines, settings.compare)
            if path is None:
                raise pytest.UsageError(
                    f"--qlab-compare: {missing(settings.baselines, settings.compare)}"
                )
            baselines.append((path.stem, Baseline.read(path)))
        # Here, since it brings torch along.
        from pytest_qlab.gate.plan import Planner

        lab = make_lab(run)
        return Planner(lab, settings.confidence, baselines).plan(gates).render()
    except QlabError as error:
        raise pytest.UsageError(str(error)) from error
    finally:
        run.close()
