"""Built-in tests that hold the run's methods to `[tool.qlab.budgets]`.

    pytest --pyargs pytest_qlab.gates

or, where fixtures are overridden in a directory's conftest.py, in a test module beside it:

    from pytest_qlab.gates import test_budget
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.gate.budgets import ConfiguredBudget


def test_budget(quantized: Candidate, qlab_budget: ConfiguredBudget) -> None:
    """One method is within one of its budgets, decided at the run's confidence."""
    measured = quantized[qlab_budget.metric]
    if qlab_budget.better == "lower":
        assert measured.within(qlab_budget.value)
    else:
        assert measured.at_least(qlab_budget.value)
