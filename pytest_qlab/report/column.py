"""One measure as a column: how its numbers are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from pytest_qlab.directions import known_direction

Better = Literal["lower", "higher", ""]
Kind = Literal["number", "signed", "percent", "bytes", "seconds", "times"]
Group = Literal["Quality", "Size", "Memory and speed", "Other"]

BINARY_UNITS = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))
TIMES = "\N{MULTIPLICATION SIGN}"
TIME_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


@dataclass(frozen=True)
class Column:
    """How one measure is shown.

    Attributes:
        name: the measure's name in the document.
        heading, short: long and terminal heading. `unit`: shown beside the heading.
        digits: significant digits of the smallest shown value; `most`: the most decimals.
        primary: in the main table of the page; the others follow in a second one.
        rank: importance; the terminal drops the highest ranks first.
        factor: a shown number is the value divided by it; set by `fitted`.
        decimals: of every shown number; set by `fitted`.
    """

    name: str
    heading: str
    short: str
    meaning: str = ""
    unit: str = ""
    kind: Kind = "number"
    group: Group = "Other"
    digits: int = 3
    most: int = 4
    primary: bool = True
    rank: int = 50
    factor: float = 1.0
    decimals: int = 3

    def fitted(self, values: Iterable[float]) -> Column:
        """Choose the unit and the decimals that suit all values of the column."""
        sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
        largest, smallest = max(sizes, default=1.0), min(sizes, default=1.0)
        unit, factor = self.unit, self.factor
        if self.kind == "percent":
            return replace(self, unit="%", factor=0.01, decimals=2)
        if self.kind == "bytes":
            unit, factor = next((pair for pair in BINARY_UNITS if largest >= pair[1]), ("B", 1.0))
        elif self.kind == "seconds":
            unit, factor = next((pair for pair in TIME_UNITS if largest >= pair[1]), TIME_UNITS[-1])
        decimals = self.digits - 1 - math.floor(math.log10(max(smallest / factor, 1e-300)))
        if unit == "B":
            decimals = 0
        return replace(self, unit=unit, factor=factor, decimals=min(max(decimals, 0), self.most))

    def number(self, value: float) -> str:
        """The value as shown in the column, without its unit."""
        shown = value / self.factor
        sign = "+" if self.kind == "signed" else ""
        if math.isinf(shown):
            return ("+" if sign and shown > 0 else "-" if shown < 0 else "") + "∞"
        if shown == 0 or math.isnan(shown):
            return "0" if shown == 0 else "nan"
        if abs(shown) >= 1e6 or abs(shown) < 0.5 * 10**-self.decimals:
            return f"{shown:{sign}.1e}"
        return f"{shown:{sign}.{self.decimals}f}"

    def plain(self, value: float) -> str:
        """A budget or a margin in the column's unit: up to four digits, no padding."""
        shown = value / self.factor
        return "∞" if math.isinf(shown) else f"{shown:.4g}"

    def amount(self, value: float) -> str:
        """A difference between two values: three digits; of percentages it is in points."""
        shown = value / self.factor
        unit = " points" if self.unit == "%" else self.suffix
        return f"{'∞' if math.isinf(shown) else f'{shown:.3g}'}{unit}"

    @property
    def better(self) -> Better:
        """Which direction is better, or empty where that is not known."""
        return known_direction(self.name) or ""

    @property
    def suffix(self) -> str:
        """The unit as it follows a number in running text."""
        return "%" if self.unit == "%" else f" {self.unit}" if self.unit else ""

    @property
    def title(self) -> str:
        """The heading's tooltip: the measure's name, what it means, and what is better."""
        better = f"{self.better} is better" if self.better else ""
        return "; ".join(part for part in (self.name, self.meaning, better) if part)
