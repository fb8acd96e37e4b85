"""Repeated measurements, their ratios, and Markdown tables of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One quantity, measured several times in the order of the repetitions."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("A sample needs at least one measurement.")

    @property
    def median(self) -> float:
        """The middle value, or the mean of the two in the middle."""
        return median(self.values)

    def over(self, other: Sample) -> Sample:
        """The ratio within each repetition, so that what slows down both cancels out."""
        if len(self.values) != len(other.values):
            raise ValueError(
                f"{len(self.values)} and {len(other.values)} repetitions cannot be paired."
            )
        pairs = zip(self.values, other.values, strict=True)
        return Sample(tuple(mine / theirs for mine, theirs in pairs))

    def plus(self, other: Sample) -> Sample:
        """The sum within each repetition."""
        return Sample(tuple(map(sum, zip(self.values, other.values, strict=True))))

    def times(self, factor: float) -> Sample:
        """Every value multiplied."""
        return Sample(tuple(value * factor for value in self.values))

    def show(self, unit: str) -> str:
        """The median with its unit, and min to max in brackets if there is more than one value."""
        text = number(self.median) + unit
        if len(self.values) > 1:
            text += f" ({number(min(self.values))} to {number(max(self.values))})"
        return text


def number(value: float) -> str:
    """Three significant digits, without an exponent where a person would write none."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 99.95 or not value else f"{value:#.3g}"


def seconds(sample: Sample) -> str:
    """A time with its unit."""
    return sample.show(" s")


def ratio(sample: Sample) -> str:
    """A ratio, marked as one."""
    return sample.show("x")


@dataclass
class Section:
    """One part of the benchmark: a table, what has to be known to read it, and the raw numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Heading, notes and table; ends with a newline."""
        lines = [f"### {self.title}", ""]
        lines += [line for note in self.notes for line in (note, "")]
        return "\n".join(lines + table(self.header, self.rows)) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, columns aligned; pipes in cells are escaped."""
    cells = [[text.replace("|", "\\|") for text in row] for row in (header, *rows)]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"A row of {len(row)} cells does not fit {len(header)} columns.")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
