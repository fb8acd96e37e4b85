"""Budgets given once, in the table `[tool.qlab.budgets]`, for methods by name, id or glob."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pytest_qlab.directions import DIRECTIONS, Direction, direction_of
from pytest_qlab.errors import MetricError, SpecError, did_you_mean

if TYPE_CHECKING:
    from pytest_qlab.decision import Side
    from pytest_qlab.specs import MethodSpec

TABLE = "[tool.qlab.budgets]"
BASELINE = "none"
_EXAMPLE = '"gptq*" = { "kl.mean" = 0.02, top1_agreement = 0.95 }'


@dataclass(frozen=True)
class ConfiguredBudget:
    """What one measure may be at most, or has to be at least, for methods that a pattern names.

    Attributes:
        pattern: a name or an id of methods, or a glob over either.
        metric: the measure's dotted name. value: in the measure's unit.
    """

    pattern: str
    metric: str
    value: float

    @property
    def better(self) -> Direction:
        """Which direction is better."""
        return direction_of(self.metric)

    @property
    def op(self) -> Side:
        """How a measure is held against the value."""
        return "<=" if self.better == "lower" else ">="

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.value:g}"


def parse_budgets(given: object) -> tuple[ConfiguredBudget, ...]:
    """The budgets of the table, in its order.

    `kl.mean = 0.02` without quotes is a table in a table for TOML; it means the same here.

    Raises:
        SpecError: it is no table of tables, or a measure or a value cannot be understood.
    """
    if not isinstance(given, Mapping):
        raise SpecError(f"{TABLE} must be a table such as {_EXAMPLE}, not {given!r}.")
    found = []
    for pattern, table in given.items():
        if not isinstance(table, Mapping):
            hint = (
                f' To hold every method to it, write "*" = {{ "{pattern}" = {table!r} }}.'
                if pattern in DIRECTIONS
                else ""
            )
            raise SpecError(
                f"{TABLE} names methods, each with a table of its budgets, such as {_EXAMPLE}; "
                f"{pattern!r} has {table!r}.{hint}"
            )
        if not table:
            raise SpecError(f"{TABLE}: {pattern!r} has no budgets. Give some: {_EXAMPLE}.")
        found += [
            ConfiguredBudget(pattern, metric, _checked(pattern, metric, value))
            for metric, value in _flat(table)
        ]
    return tuple(found)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _checked(pattern: str, metric: str, value: Any) -> float:
    from pytest_qlab.decision import check_budget

    try:
        side: Side = "<=" if direction_of(metric) == "lower" else ">="
        check_budget(metric, side, value, 0.95)
    except MetricError as error:
        raise SpecError(f'{TABLE} "{pattern}": {error}') from error
    return float(value)


def budgets_of(spec: MethodSpec, budgets: Iterable[ConfiguredBudget]) -> list[ConfiguredBudget]:
    """What one method is held to; of several budgets for one measure, the last.

    The unquantized model, `none`, is held only to budgets that name it without a wildcard.
    """
    chosen: dict[str, ConfiguredBudget] = {}
    for budget in budgets:
        if _hits(budget.pattern, spec):
            chosen[budget.metric] = budget
    return list(chosen.values())


def gates_of(
    specs: Iterable[MethodSpec], budgets: Sequence[ConfiguredBudget]
) -> list[tuple[MethodSpec, ConfiguredBudget]]:
    """Every method of the run with each of its budgets: one test each.

    Raises:
        SpecError: there are no budgets, or none for any method.
    """
    if not budgets:
        raise SpecError(
            "there are no budgets to hold methods to. Write some in the pyproject.toml at pytest's "
            f"root directory, under {TABLE}: {_EXAMPLE}."
        )
    chosen = list(specs)
    gates = [(spec, budget) for spec in chosen for budget in budgets_of(spec, budgets)]
    if not gates:
        raise SpecError(
            f"no method of this run has a budget: it compares {_ids(chosen)}, and {TABLE} names "
            f"{', '.join(dict.fromkeys(budget.pattern for budget in budgets))}."
        )
    return gates


def check_patterns(
    budgets: Iterable[ConfiguredBudget],
    specs: Sequence[MethodSpec],
    *,
    narrowed: bool,
    known: Iterable[str],
) -> None:
    """Refuse a pattern that holds no method to anything, such as a slip of the pen.

    Args:
        specs: the run's methods.
        narrowed: whether they were named for this run alone, as for a shard; then a pattern may
            also be for a known method that is not among them.
        known: names of methods and configurations.

    Raises:
        SpecError: there is such a pattern.
    """
    names = set(known)
    for pattern in dict.fromkeys(budget.pattern for budget in budgets):
        if any(_hits(pattern, spec) for spec in specs) or (narrowed and _could_hit(pattern, names)):
            continue
        given = {spec.id for spec in specs} | {spec.method.name for spec in specs}
        raise SpecError(
            f"{TABLE}: {pattern!r} matches no method of this run, so its budgets would hold "
            f"nothing to account.{did_you_mean(pattern, given | (names if narrowed else set()))}"
        )


def _hits(pattern: str, spec: MethodSpec) -> bool:
    if spec.method.name == BASELINE:
        return pattern in (BASELINE, spec.id)
    return spec.matches(pattern)


def _could_hit(pattern: str, names: set[str]) -> bool:
    """Whether some method could have that name or id: ids are a name, a dash and options."""
    from pytest_qlab.specs import known_name

    head = pattern.split("-")[0]
    return known_name(pattern, names) or any(
        fnmatchcase(name, piece) for name in names for piece in (pattern, head)
    )


def _ids(specs: Iterable[MethodSpec]) -> str:
    return ", ".join(spec.id for spec in specs)


def describe(specs: Iterable[MethodSpec], budgets: Sequence[ConfiguredBudget]) -> str:
    """One line on who is held to how much, and who to nothing."""
    counts = {spec: len(budgets_of(spec, budgets)) for spec in specs}
    held = ", ".join(f"{spec.id} {count}" for spec, count in counts.items() if count)
    free = _ids(spec for spec, count in counts.items() if not count)
    return "; ".join(part for part in (held, f"none for {free}" if free else "") if part)
