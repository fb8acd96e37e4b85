"""The quantizers of 32-blocks and of IQ4_XS as loops over single numbers: slow, and plain to check.

Written from the description of the algorithms, one float32 operation after the other. Each takes a
row (n,) and the importance of its columns or None, and returns a list of blocks, each a dict of
fields as `pack_blocks` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

F = np.float32
Block = dict[str, Any]
Row = Sequence[np.float32]
LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
HALVES = [0, 1, 2, 3, 4, 6, 8, 12]
SMALLEST = F(1e-15)


def rounded(value: np.float32) -> int:
    """To the nearest whole number, halves to the even one."""
    return round(float(value))


def largest(row: Row) -> np.float32:
    """The first element of largest magnitude; +0 for zeros."""
    found = F(0)
    for x in row:
        if abs(x) > abs(found):
            found = x
    return found


def square_sum(row: Row) -> np.float32:
    total = F(0)
    for x in row:
        total += x * x
    return total


def blocks_of(row: Row, size: int = 32) -> list[Row]:
    return [row[start : start + size] for start in range(0, len(row), size)]


def symmetric(half: int) -> Callable[[Row, Row | None], list[Block]]:
    def quantize(row: Row, importance: Row | None) -> list[Block]:
        made = []
        for block, weights in zip(blocks_of(row), legacy_weights(row, importance), strict=True):
            if weights is not None:
                d, codes = search_symmetric(block, half, weights)
            else:
                d = largest(block) / F(-half)
                inverse = F(1) / d if d else F(0)
                codes = [min(2 * half - 1, int(x * inverse + F(half + 0.5))) for x in block]
            made.append({"d": np.float16(d), "codes": codes})
        return made

    return quantize


def asymmetric(top: int) -> Callable[[Row, Row | None], list[Block]]:
    def quantize(row: Row, importance: Row | None) -> list[Block]:
        made = []
        for block, weights in zip(blocks_of(row), legacy_weights(row, importance), strict=True):
            if weights is not None:
                d, below, codes = search_asymmetric(block, top, weights)
                low = -below
            else:
                low, high = min(block), max(block)  # the first of equal zeros, as in C
                d = (high - low) / F(top)
                inverse = F(1) / d if d else F(0)
                codes = [min(top, int((x - low) * inverse + F(0.5))) for x in block]
            made.append({"d": np.float16(d), "m": np.float16(low), "codes": codes})
        return made

    return quantize


def q8_0(row: Row, importance: Row | None) -> list[Block]:
    made = []
    for block in blocks_of(row):
        d = abs(largest(block)) / F(127)
        inverse = F(1) / d if d else F(0)
        scaled = [float(x * inverse) for x in block]
        # Exact in float64: halves go away from zero.
        codes = [int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in scaled]
        made.append({"d": np.float16(d), "codes": codes})
    return made


def legacy_weights(row: Row, importance: Row | None) -> list[list[np.float32] | None]:
    if importance is None:
        return [None] * (len(row) // 32)
    sigma2 = square_sum(row) / F(len(row))
    weights = [w * np.sqrt(sigma2 + x * x) for x, w in zip(row, importance, strict=True)]
    return [weights[start : start + 32] for start in range(0, len(row), 32)]


def search_symmetric(
    x: Row, half: int, weights: Sequence[np.float32]
) -> tuple[np.float32, list[int]]:
    top = largest(x)
    if abs(top) < SMALLEST:
        return F(0), [0] * len(x)

    def trial(inverse: np.float32) -> tuple[list[int], np.float32, np.float32]:
        codes = [max(-half, min(half - 1, rounded(inverse * v))) for v in x]
        along = energy = F(0)
        for v, w, code in zip(x, weights, codes, strict=True):
            along += w * v * F(code)
            energy += w * F(code) * F(code)
        return codes, along, energy

    codes, along, energy = trial(F(-half) / top)
    scale = along / energy if energy else F(0)
    best = scale * along
    for step in range(-9, 10):
        if step == 0:
            continue
        tried, along, energy = trial(-(F(half) + F(0.1) * F(step)) / top)
        if energy > 0 and along * along > best * energy:
            codes, scale = tried, along / energy
            best = scale * along
    return scale, [code + half for code in codes]


def search_asymmetric(
    x: Row, top: int, weights: Sequence[np.float32]
) -> tuple[np.float32, np.float32, list[int]]:
    low, high = min(x), max(x)
    sum_w, sum_x = weights[0], weights[0] * x[0]
    for v, w in zip(x[1:], weights[1:], strict=True):
        sum_w += w
        sum_x += w * v
    if low > 0:
        low = F(0)
    if high <= low:
        return F(0), -low, [0] * len(x)

    def levels(inverse: np.float32) -> list[int]:
        return [max(0, min(top, rounded(inverse * (v - low)))) for v in x]

    def loss(scale: np.float32, low: np.float32, codes: list[int]) -> np.float32:
        total = F(0)
        for v, w, code in zip(x, weights, codes, strict=True):
            difference = scale * F(code) + low - v
            total += w * (difference * difference)
        return total

    codes = levels(F(top) / (high - low))
    scale = F(1) / (F(top) / (high - low))
    best = loss(scale, low, codes)
    for step in range(37):
        tried = levels((F(-0.9) + F(0.05) * F(step) + F(top)) / (high - low))
        sum_l = sum_l2 = sum_xl = F(0)
        for v, w, code in zip(x, weights, tried, strict=True):
            sum_l += w * F(code)
            sum_l2 += w * F(code) * F(code)
            sum_xl += w * F(code) * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if determinant > 0:
            this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            if this_low > 0:
                this_low, this_scale = F(0), sum_xl / sum_l2
            lost = loss(this_scale, this_low, tried)
            if lost < best:
                codes, best, scale, low = tried, lost, this_scale, this_low
    return scale, -low, codes


def nearest_level(value: np.float32) -> int:
    """The upper one of two levels that are equally near."""
    return max(range(16), key=lambda code: (-abs(float(value) - LEVELS[code]), code))


def search_levels(x: Row, weights: Sequence[np.float32]) -> np.float32:
    top = largest(x)
    if abs(top) < SMALLEST:
        return F(0)

    def trial(inverse: np.float32) -> tuple[np.float32, np.float32]:
        along = energy = F(0)
        for v, w in zip(x, weights, strict=True):
            level = F(LEVELS[nearest_level(inverse * v)])
            along += w * level * v
            energy += w * level * level
        return along, energy

    along, energy = trial(F(1) / (-top / F(LEVELS[0])))
    scale = along / energy if energy > 0 else F(0)
    best = scale * along
    for step in range(-7, 8):
        along, energy = trial(F(step + LEVELS[0]) / top)
        if energy > 0 and along * along > best * energy:
            scale = along / energy
            best = scale * along
    return scale


def group_scales(block: Row, importance: Row | None) -> list[np.float32]:
    """Scales of the groups of 32 of a super-block."""
    if importance is None:
        weights = [x * x for x in block]
    else:
        sigma2 = square_sum(block) * F(2 / len(block))
        weights = [w * np.sqrt(sigma2 + x * x) for x, w in zip(block, importance, strict=True)]
    return [
        search_levels(group, some)
        for group, some in zip(blocks_of(block), blocks_of(weights), strict=True)
    ]


def level_codes(group: Row, scale: np.float32) -> list[int]:
    inverse = F(1) / scale if scale else F(0)
    return [nearest_level(inverse * x) for x in group]


def iq4_nl(row: Row, importance: Row | None) -> list[Block]:
    made = []
    for start, block in zip(range(0, len(row), 32), blocks_of(row), strict=True):
        weights = None if importance is None else importance[start : start + 32]
        (scale,) = group_scales(block, weights)
        made.append({"d": np.float16(scale), "codes": level_codes(block, scale)})
    return made


def iq4_xs(row: Row, importance: Row | None) -> list[Block]:
    made = []
    for start, block in zip(range(0, len(row), 256), blocks_of(row, 256), strict=True):
        found = group_scales(block, None if importance is None else importance[start : start + 256])
        d = -largest(found) / F(32)
        inverse = F(1) / d if d else F(0)
        steps = [max(-32, min(31, rounded(inverse * scale))) for scale in found]
        codes: list[int] = []
        for group, step in zip(blocks_of(block), steps, strict=True):
            codes += level_codes(group, d * F(step))
        scales = [step + 32 for step in steps]
        made.append({"d": np.float16(d), "scales": scales, "codes": codes})
    return made


def mxfp4(row: Row, importance: Row | None) -> list[Block]:
    made = []
    for block in blocks_of(row):
        top = float(abs(largest(block)))
        exponent = math.floor(F(math.log2(top))) - 2 + 127 if top else 0
        unit = 2.0 ** ((exponent & 0xFF) - 128)
        codes = []
        for x in block:
            distances = [abs(half * unit - abs(float(x))) for half in HALVES]
            code = distances.index(min(distances))
            codes.append(code + 8 if x < 0 and code else code)
        made.append({"e": exponent & 0xFF, "codes": codes})
    return made


LOOPS: dict[str, Callable[[Row, Row | None], list[Block]]] = {
    "Q4_0": symmetric(8),
    "Q4_1": asymmetric(15),
    "Q5_0": symmetric(16),
    "Q5_1": asymmetric(31),
    "Q8_0": q8_0,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
}
