"""The table of budgets: who is held to what, and slips of the pen that would hold nobody."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest

from pytest_qlab.errors import SpecError
from pytest_qlab.gate.budgets import (
    ConfiguredBudget,
    budgets_of,
    check_patterns,
    describe,
    gates_of,
    parse_budgets,
)
from pytest_qlab.specs import MethodSpec, parse_specs

SPECS = parse_specs(["none", "rtn:bits=3", "rtn:bits=4", "gptq", "awq"])
KNOWN = ("none", "rtn", "gptq", "awq", "nf4")


def table(text: str) -> tuple[ConfiguredBudget, ...]:
    return parse_budgets(tomllib.loads(text))


def spec(identifier: str) -> MethodSpec:
    (found,) = [each for each in SPECS if each.id == identifier]
    return found


def shown(identifier: str, budgets: tuple[ConfiguredBudget, ...]) -> list[str]:
    return [str(budget) for budget in budgets_of(spec(identifier), budgets)]


def test_a_dotted_name_means_the_same_with_and_without_quotes() -> None:
    quoted = table('rtn = { "kl.mean" = 0.02, top1_agreement = 0.95, "kl.mean[code]" = 1 }')
    bare = table('[rtn]\nkl.mean = 0.02\ntop1_agreement = 0.95\n"kl.mean[code]" = 1')
    assert quoted == bare
    assert [str(budget) for budget in quoted] == [
        "kl.mean <= 0.02",
        "top1_agreement >= 0.95",
        "kl.mean[code] <= 1",
    ]
    assert [budget.better for budget in quoted] == ["lower", "higher", "lower"]
    assert {budget.pattern for budget in quoted} == {"rtn"}
    assert isinstance(quoted[2].value, float)


def test_names_ids_and_globs_name_methods_and_the_last_budget_counts() -> None:
    budgets = table(
        """
        "*" = { "kl.mean" = 0.5, size = 1000000 }
        rtn = { "kl.mean" = 0.4 }
        "rtn-w3*" = { "kl.mean" = 0.3 }
        "gptq-w4g128" = { "kl.mean" = 0.2 }
        """
    )
    assert shown("rtn-w3g128", budgets) == ["kl.mean <= 0.3", "size <= 1e+06"]
    assert shown("rtn-w4g128", budgets) == ["kl.mean <= 0.4", "size <= 1e+06"]
    assert shown("gptq-w4g128", budgets) == ["kl.mean <= 0.2", "size <= 1e+06"]
    assert shown("awq-w4g128", budgets) == ["kl.mean <= 0.5", "size <= 1e+06"]


def test_the_model_itself_is_held_only_to_what_names_it() -> None:
    everybody = table('"*" = { "kl.mean" = 0.5 }\n"n*" = { size = 1 }')
    assert shown("none", everybody) == []
    assert shown("none", table("none = { size = 1 }")) == ["size <= 1"]


def test_there_is_one_gate_for_each_method_and_budget() -> None:
    budgets = table('rtn = { "kl.mean" = 0.4, size = 9 }\nawq = { size = 8 }')
    gates = [(method.id, str(budget)) for method, budget in gates_of(SPECS, budgets)]
    assert gates == [
        ("rtn-w3g128", "kl.mean <= 0.4"),
        ("rtn-w3g128", "size <= 9"),
        ("rtn-w4g128", "kl.mean <= 0.4"),
        ("rtn-w4g128", "size <= 9"),
        ("awq-w4g128", "size <= 8"),
    ]
    line = describe(SPECS, budgets)
    assert line == "rtn-w3g128 2, rtn-w4g128 2, awq-w4g128 1; none for none, gptq-w4g128"
    assert describe(SPECS[1:3], budgets) == "rtn-w3g128 2, rtn-w4g128 2"


def test_no_gate_at_all_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"there are no budgets.*\[tool.qlab.budgets\]"):
        gates_of(SPECS, ())
    with pytest.raises(SpecError, match=r"it compares awq-w4g128, and .* names rtn, gptq"):
        gates_of([spec("awq-w4g128")], table("rtn = { size = 9 }\ngptq = { size = 9 }"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["rtn"], "must be a table such as"),
        ("rtn", "must be a table such as"),
        ({"rtn": 0.02}, "'rtn' has 0.02.$"),
        ({"size": 1000}, r'To hold every method to it, write "\*" = { "size" = 1000 }'),
        ({"rtn": {}}, "'rtn' has no budgets"),
        ({"rtn": {"kl.maen": 0.02}}, "Did you mean 'kl.mean'"),
        ({"rtn": {"kl": 0.02}}, '"rtn": .*Did you mean'),
        ({"rtn": {"size[code]": 1}}, "one number for the whole model"),
        ({"rtn": {"kl.max": 1}}, "Use kl.p99.within"),
        ({"rtn": {"kl.mean": "0.02"}}, "finite number"),
        ({"rtn": {"kl.mean": True}}, "finite number"),
        ({"rtn": {"kl.mean": math.nan}}, "finite number"),
        ({"rtn": {"kl.mean": math.inf}}, "finite number"),
        ({"rtn": {"kl.mean": [0.02]}}, "finite number"),
    ],
)
def test_what_is_no_budget_is_refused(given: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_budgets(given)
    assert "[tool.qlab.budgets]" in str(caught.value)


def test_an_empty_table_is_no_budget_and_no_error_of_its_own() -> None:
    assert parse_budgets({}) == ()


@pytest.mark.parametrize(
    ("pattern", "narrowed", "message"),
    [
        ("rtn", False, None),
        ("rtn-w3g128", False, None),
        ("rtn*", False, None),
        ("*", False, None),
        ("none", False, None),
        ("rnt", False, "Did you mean 'rtn'"),
        ("rtn-w5g128", False, "Did you mean 'rtn-w4g128' or 'rtn-w3g128'"),
        ("nf4", False, "matches no method of this run"),
        ("nf4", True, None),
        ("nf4-w4g64", True, None),
        ("nf*", True, None),
        ("nf4-*", True, None),
        ("rnt", True, "Did you mean 'rtn'"),
        ("zz*", True, "matches no method of this run"),
    ],
)
def test_a_pattern_that_holds_nobody_to_anything_is_an_error(
    pattern: str, narrowed: bool, message: str | None
) -> None:
    budgets = parse_budgets({pattern: {"size": 1}})
    if message is None:
        check_patterns(budgets, SPECS, narrowed=narrowed, known=KNOWN)
        return
    with pytest.raises(SpecError, match=message):
        check_patterns(budgets, SPECS, narrowed=narrowed, known=KNOWN)


def test_a_wildcard_does_not_hold_when_only_the_model_itself_is_compared() -> None:
    budgets = table('"*" = { size = 1 }')
    with pytest.raises(SpecError, match="matches no method of this run"):
        check_patterns(budgets, [spec("none")], narrowed=False, known=KNOWN)
