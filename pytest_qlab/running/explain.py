"""What a failed comparison of an estimate says beyond the two numbers."""

from __future__ import annotations

from pytest_qlab.estimate import Estimate

_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def explain_comparison(op: str, left: object, right: object) -> list[str] | None:
    """Lines for pytest's assertion message, or None if no estimate is compared with a number.

    The first line repeats the comparison; the others say what was measured, the budget, by how much
    it was missed, the interval, and on how large a sample.
    """
    if op not in _MIRRORED or not (_is_number(left) and _is_number(right)):
        return None
    if isinstance(left, Estimate) and isinstance(right, Estimate):
        return [
            f"{_number(left)} {op} {_number(right)}",
            f"{_name(left)} = {_with_unit(left)}, {_name(right)} = {_with_unit(right)}"
            f" ({_number(left - right, sign=True)})",
            *_about(left),
            *_about(right),
        ]
    held = held_to(op, left, right)
    if held is None:
        return None
    measured, relation, budget = held
    return [
        f"{_number(left)} {op} {_number(right)}",
        f"{_name(measured)} = {_with_unit(measured)}  budget {relation} {_number(budget)}"
        f"  ({_missed(measured, relation, budget)})",
        *_about(measured),
    ]


def held_to(op: str, left: object, right: object) -> tuple[Estimate, str, float] | None:
    """An estimate, the operator with it on the left, and the plain number it is compared with.

    None where that is not what is compared.
    """
    if op not in _MIRRORED or not (_is_number(left) and _is_number(right)):
        return None
    if isinstance(left, Estimate) and not isinstance(right, Estimate):
        return left, op, float(right)  # type: ignore[arg-type]
    if isinstance(right, Estimate) and not isinstance(left, Estimate):
        return right, _MIRRORED[op], float(left)  # type: ignore[arg-type]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object, *, sign: bool = False) -> str:
    assert isinstance(value, int | float)
    return f"{float(value):{'+' if sign else ''}.6g}"


def _with_unit(measured: Estimate) -> str:
    return f"{_number(measured)} {measured.unit}".rstrip()


def _name(measured: Estimate) -> str:
    return f"{measured.metric} of {measured.candidate}" if measured.candidate else measured.metric


def _missed(measured: Estimate, relation: str, budget: float) -> str:
    difference = float(measured) - budget
    share = f", {difference / abs(budget):+.0%}" if budget else ""
    if relation in ("==", "!="):
        return f"differs by {_number(difference, sign=True)}{share}"
    word = "over by" if relation in ("<", "<=") else "short by"
    return f"{word} {_number(abs(difference))}{share}"


def _about(measured: Estimate) -> list[str]:
    lines = []
    if measured.detail:
        lines.append(measured.detail)
    if measured.lower is not None or measured.upper is not None:
        lower = "-inf" if measured.lower is None else _number(measured.lower)
        upper = "inf" if measured.upper is None else _number(measured.upper)
        lines.append(f"{measured.confidence:.0%} interval [{lower}, {upper}]")
    sample = []
    if measured.n is not None:
        sample.append(f"{measured.n} samples")
    if measured.clusters is not None:
        sample.append(f"{measured.clusters} documents")
    if measured.convention:
        sample.append(f"convention {measured.convention}")
    if measured.floor:
        sample.append(f"noise floor {measured.floor:.2g}")
    if measured.simulated:
        sample.append("simulated: no kernel runs the packed bits")
    if sample:
        lines.append(", ".join(sample))
    return lines
