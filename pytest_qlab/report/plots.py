"""Inline SVG: size against quality, and the error of every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from pytest_qlab.report.columns import column_named, is_baseline
from pytest_qlab.results import CandidateResult, LayerRow, Results

SIZES = ("bits_per_weight", "compression_ratio", "size")
QUALITIES = ("kl.mean", "log_perplexity_delta", "perplexity_delta")
WIDTH, HEIGHT = 700, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 30, 18, 48
LARGEST = 1e15  # beyond it a broken candidate would flatten the plot
CHARACTER = 7.2  # average width of the labels' font in pixels, measured generously
MOST_STRIPS = 240  # beyond that many layers, one cell is a block
REACHES = (11.0, 18.0, 26.0, 36.0, 48.0, 62.0, 78.0, 96.0, 116.0)  # of labels, in pixels
SNR_STEPS = (8.0, 12.0, 16.0, 20.0, 24.0, 30.0, 40.0)


@dataclass(frozen=True)
class Point:
    """One candidate in the scatter, in the units of the measures."""

    id: str
    method: str
    x: float
    y: float
    lower: float | None
    upper: float | None
    failed: bool


Box = tuple[float, float, float, float]


def scatter(results: Results) -> str:
    """Size against distance from the baseline on a logarithmic axis; empty without two measures."""
    chosen = _axes(results)
    if chosen is None:
        return ""
    across, up, points = chosen
    x_column, y_column = column_named(across), column_named(up)
    x_column = x_column.fitted([p.x for p in points])
    xs = [p.x / x_column.factor for p in points]
    limits = sorted(
        {
            b.budget
            for row in results.candidates
            for b in row.budgets
            if b.metric == up and b.op.startswith("<") and drawable(b.budget)
        }
    )
    pad = max(0.1 * (max(xs) - min(xs)), 0.02 * max(map(abs, xs)))
    pad = pad if pad > 1 / LARGEST else 0.5
    low, high = min(xs) - pad, max(xs) + 1.6 * pad
    ys = [p.y for p in points] + limits
    bottom, top = math.log10(min(ys)) - 0.12, math.log10(max(ys)) + 0.12

    def place_x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        share = (math.log10(value) - bottom) / (top - bottom)
        return TOP + (1 - min(max(share, 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM)

    out: list[str] = []
    for tick in _linear_ticks(low, high):
        x = place_x(tick)
        out.append(_line(x, TOP, x, HEIGHT - BOTTOM, "grid"))
        out.append(_text(x, HEIGHT - BOTTOM + 17, f"{tick:g}", "soft", "middle"))
    for tick in _log_ticks(bottom, top):
        y = place_y(tick)
        out.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        out.append(_text(LEFT - 8, y + 4, f"{tick:g}", "soft", "end"))
    for limit in limits:
        y = place_y(limit)
        out.append(_line(LEFT, y, WIDTH - RIGHT, y, "limit"))
        out.append(_text(WIDTH - RIGHT, y - 4, f"budget {limit:g}", "bad halo", "end"))
    out += _front(points, xs, place_x, place_y, across)
    methods = list(dict.fromkeys(p.method for p in points))
    spots = [(place_x(x), place_y(p.y)) for x, p in zip(xs, points, strict=True)]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    taken += [
        (WIDTH - RIGHT - 80, place_y(limit) - 15, WIDTH - RIGHT, place_y(limit) + 2)
        for limit in limits
    ]
    taken += [(LEFT, place_y(v) - 3, WIDTH - RIGHT, place_y(v) + 3) for v in limits]
    labels: list[str] = []
    for point, (x, y) in zip(points, spots, strict=True):
        colour = f"c{methods.index(point.method) % 8}"
        low_end, high_end = point.lower or 0.0, point.upper or 0.0
        if 0 < low_end <= high_end:
            whisker = _line(x, place_y(low_end), x, place_y(high_end), colour)
            out.append(whisker.replace("/>", ' stroke-width="1.5" opacity=".55"/>'))
        shape = _mark(methods.index(point.method), x, y, colour)
        tip = f"{point.id}: {across} {point.x:.4g}, {up} {point.y:.4g}"
        out.append(f"<g>{shape}<title>{escape(tip)}</title></g>")
        labels += _label(point, x, y, taken)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    unit = f" ({x_column.unit})" if x_column.unit else ""
    out += labels
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_column.heading + unit, "", "middle"))
    y_unit = f" ({y_column.unit})" if y_column.unit else ""
    out.append(
        f'<text transform="translate(16 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_column.heading + y_unit)}, log scale</text>"
    )
    told = "; ".join(f"{p.id} {p.x:.3g}, {p.y:.3g}" for p in points)
    title = f"{x_column.heading} against {y_column.heading}"
    return _svg("scatter", WIDTH, HEIGHT, title, f"Candidate, {across}, {up}: {told}", out)


def drawable(value: float) -> bool:
    """Whether the logarithmic axis can show the value beside ordinary ones."""
    return 1 / LARGEST < value < LARGEST


def _axes(results: Results) -> tuple[str, str, list[Point]] | None:
    """The first pair of measures that at least two candidates have."""
    for up in QUALITIES:
        for across in SIZES:
            points = []
            for row in results.candidates:
                x, y = row.measures.get(across), row.measures.get(up)
                if is_baseline(row) or x is None or y is None or not drawable(y.value):
                    continue
                if abs(x.value) < LARGEST:
                    failed = any(b.metric == up and not b.ok for b in row.budgets)
                    points.append(
                        Point(row.id, row.method, x.value, y.value, y.lower, y.upper, failed)
                    )
            if len(points) >= 2:
                return across, up, points
    return None


def _front(
    points: Sequence[Point],
    xs: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    across: str,
) -> list[str]:
    """The line through the candidates that no other beats in both size and quality."""
    sign = -1 if across == "compression_ratio" else 1
    best, kept = math.inf, []
    for x, point in sorted(zip(xs, points, strict=True), key=lambda p: (sign * p[0], p[1].y)):
        if point.y < best:
            best = point.y
            kept.append((x, point.y))
    if len(kept) < 2:
        return []
    path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in kept)
    return [f'<polyline class="front" points="{path}"/>']


def _label(point: Point, x: float, y: float, taken: list[Box]) -> list[str]:
    """The name beside its point where nothing else is; farther away with a line to it."""
    text = point.id if len(point.id) <= 40 else point.id[:38] + "…"
    wide = CHARACTER * (len(text) + (2 if point.failed else 0)) + 2
    best: tuple[float, Box, float] | None = None
    for reach in REACHES:
        for angle in (0, 180, -30, 30, 210, 150, -60, 60, -90, 90, 240, 120):
            dx, dy = reach * math.cos(math.radians(angle)), reach * math.sin(math.radians(angle))
            left = x + dx if dx > 1 else x + dx - wide if dx < -1 else x - wide / 2
            box = (left, y + dy - 8, left + wide, y + dy + 7)
            outside = box[0] < LEFT or box[2] > WIDTH or box[1] < 2 or box[3] > HEIGHT - BOTTOM
            cost = sum(_overlap(box, other) for other in taken) + (1e6 if outside else 0)
            if best is None or cost < best[0]:
                best = (cost, box, reach)
        if best is not None and best[0] == 0:
            break
    assert best is not None
    _, box, reach = best
    taken.append(box)
    out = []
    if reach > REACHES[0]:
        end = min(max(x, box[0] - 2), box[2] + 2)
        out.append(_line(x, y, end, (box[1] + box[3]) / 2, "leader"))
    mark = "✗ " if point.failed else ""
    style = "bad halo" if point.failed else "halo"
    if box[2] < x:
        return [*out, _text(box[2], box[3] - 3, mark + text, style, "end")]
    return [*out, _text(box[0], box[3] - 3, mark + text, style)]


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _mark(index: int, x: float, y: float, colour: str) -> str:
    """A shape as well as a colour for each method."""
    kind = index % 4
    if kind == 0:
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'
    if kind == 1:
        return f'<rect class="{colour}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    turns = {2: ((0, -5.5), (5, 4), (-5, 4)), 3: ((0, -6), (6, 0), (0, 6), (-6, 0))}
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in turns[kind])
    return f'<polygon class="{colour}" points="{corners}"/>'


def layer_strip(results: Results) -> str:
    """Signal-to-noise ratio of every layer of every candidate; empty without one."""
    rows = [
        (row, dict(_strip_cells(row, is_aggregated(results))))
        for row in results.candidates
        if any(layer.snr_db is not None and math.isfinite(layer.snr_db) for layer in row.layers)
    ]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    label = min(210.0, 12 + CHARACTER * max(len(row.id) for row, _ in rows))
    cell = (WIDTH - label - 12) / len(names)
    tall, head = min(34, max(18, 290 // len(rows))), 22
    out: list[str] = []
    x = label
    for block, members in groupby(names, key=block_of):
        wide = cell * len(list(members))
        out.append(_line(x, head - 6, x, head + tall * len(rows), "grid"))
        if wide >= CHARACTER * len(block) + 2:
            out.append(_text(x + wide / 2, head - 8, block, "soft", "middle"))
        x += wide
    told = []
    for place, (row, cells) in enumerate(rows):
        y = head + place * tall
        shown = row.id if CHARACTER * len(row.id) <= label - 8 else row.id[:28] + "…"
        out.append(_text(label - 8, y + tall / 2 + 4, shown, "", "end"))
        for index, name in enumerate(names):
            value = cells.get(name)
            tip = f"{row.id}, {name}: " + ("not measured" if value is None else f"{value:.1f} dB")
            gap = 1.0 if cell > 4 else 0.0
            out.append(
                f'<rect class="{heat_class(value)}" x="{label + index * cell:.2f}" y="{y + 1}" '
                f'width="{max(cell - gap, 0.5):.2f}" height="{tall - 2}">'
                f"<title>{escape(tip)}</title></rect>"
            )
        worst = min(cells.items(), key=lambda item: item[1])
        told.append(f"{row.id}: lowest {worst[1]:.1f} dB in {worst[0]}")
    y = head + tall * len(rows) + 12
    out += _legend(label, y)
    title = "Signal-to-noise ratio of each quantized layer's weights"
    return _svg("layers", WIDTH, y + 32, title, "; ".join(told), out)


def _strip_cells(row: CandidateResult, aggregated: bool) -> Iterator[tuple[str, float]]:
    """Layer and decibels; the lowest of each block where there are very many layers."""
    known = [(layer, layer.snr_db) for layer in row.layers if layer.snr_db is not None]
    if not aggregated:
        yield from ((layer.name, value) for layer, value in known)
        return
    lowest: dict[str, float] = {}
    for layer, value in known:
        block = block_of(layer.name)
        lowest[block] = min(value, lowest.get(block, math.inf))
    yield from lowest.items()


def is_aggregated(results: Results) -> bool:
    """Whether the strip shows blocks instead of layers."""
    return any(len(row.layers) > MOST_STRIPS for row in results.candidates)


def block_of(name: str) -> str:
    """The first number in a dotted name, which is the decoder block's."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return found.group(1) if found else name.partition(".")[0]


def heat_class(value: float | None) -> str:
    """The colour class of a signal-to-noise ratio in decibels."""
    if value is None:
        return "hn"
    return f"h{sum(value >= step for step in SNR_STEPS)}"


def worst_layers(row: CandidateResult, count: int) -> list[LayerRow]:
    """The layers that cause most KL, or where that was not measured, whose weights moved most."""
    caused = [(layer.kl, layer) for layer in row.layers if layer.kl is not None]
    if caused:
        return [layer for _, layer in sorted(caused, key=lambda p: (-p[0], p[1].name))[:count]]
    known = [layer for layer in row.layers if layer.snr_db is not None]
    return sorted(known, key=lambda layer: (layer.snr_db or 0.0, layer.name))[:count]


def _legend(x: float, y: float) -> list[str]:
    texts = [
        f"< {SNR_STEPS[0]:g}",
        *(f"{low:g}-{high:g}" for low, high in pairwise(SNR_STEPS)),
        f"≥ {SNR_STEPS[-1]:g}",
    ]
    out = []
    for index, text in enumerate(texts):
        left = x + index * 46
        out.append(f'<rect class="h{index}" x="{left:.1f}" y="{y}" width="44" height="8"/>')
        out.append(_text(left + 22, y + 21, text, "soft", "middle"))
    return [*out, _text(x + len(texts) * 46 + 4, y + 21, "dB", "soft")]


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _log_ticks(bottom: float, top: float) -> list[float]:
    marks: tuple[float, ...] = (1, 2, 5) if top - bottom < 3 else (1,)
    powers = range(math.floor(bottom), math.ceil(top) + 1)
    ticks = [float(f"{m}e{p}") for p in powers for m in marks]
    return [tick for tick in ticks if bottom <= math.log10(tick) <= top]


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    where = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}"{where}>{escape(text)}</text>'


def _svg(name: str, width: float, height: float, title: str, desc: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-labelledby="qlab-{name}-title qlab-{name}-desc">'
        f'<title id="qlab-{name}-title">{escape(title)}</title>'
        f'<desc id="qlab-{name}-desc">{escape(desc)}</desc>{"".join(parts)}</svg>'
    )
