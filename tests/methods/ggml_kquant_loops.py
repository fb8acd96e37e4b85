"""The K-quants as loops over single numbers: slow, and plain to check.

Written from the description of the algorithms, one float32 operation after the other. A type's
function takes a row (n,) and the importance of its columns or None, and returns a list of blocks,
each a dict of fields as `pack_blocks` names them. Call under `np.errstate(all="ignore")`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

F = np.float32
Numbers = Sequence[np.float32]
Block = dict[str, Any]
SMALLEST = F(1e-15)


def nearest_int(value: np.float32) -> int:
    """As in C: by the bits of `value + 12582912`, whatever they are."""
    (bits,) = struct.unpack("<i", struct.pack("<f", float(F(value) + F(12582912))))
    return int((bits & 0x007FFFFF) - 0x00400000)


def clipped(value: np.float32, low: int, high: int) -> int:
    return max(low, min(high, nearest_int(value)))


def largest(x: Numbers) -> np.float32:
    """The first element of largest magnitude."""
    found = F(0)
    for v in x:
        if abs(v) > abs(found):
            found = v
    return found


def total_of(x: Numbers) -> np.float32:
    total = F(0)
    for v in x:
        total += v
    return total


def qx(x: Numbers, half: int, weights: Numbers) -> tuple[np.float32, list[int]]:
    extreme = largest(x)
    if abs(extreme) < SMALLEST:
        return F(0), [0] * len(x)

    def trial(inverse: np.float32) -> tuple[list[int], np.float32, np.float32]:
        codes, along, energy = [], F(0), F(0)
        for v, w in zip(x, weights, strict=True):
            code = clipped(inverse * v, -half, half - 1)
            along += w * v * F(code)
            energy += w * F(code) * F(code)
            codes.append(code)
        return codes, along, energy

    codes, along, energy = trial(F(-half) / extreme)
    scale = along / energy if energy != 0 else F(0)
    best = scale * along
    for step in range(-9, 10):
        if step == 0:
            continue
        tried, along, energy = trial(-(F(half) + F(0.1) * F(step)) / extreme)
        if energy > 0 and along * along > best * energy:
            codes, scale = tried, along / energy
            best = scale * along
    return scale, [code + half for code in codes]


def q3(x: Numbers) -> tuple[np.float32, list[int]]:
    extreme = largest(x)
    if abs(extreme) < SMALLEST:
        return F(0), [0] * len(x)
    inverse, along, energy = F(-4) / extreme, F(0), F(0)
    codes = [clipped(inverse * v, -4, 3) for v in x]
    for v, code in zip(x, codes, strict=True):
        along += v * v * v * F(code)
        energy += v * v * F(code) * F(code)
    for _ in range(5):
        changed = False
        for i, v in enumerate(x):
            w = v * v
            new_along = along - w * v * F(codes[i])
            if not new_along > 0:
                continue
            new_energy = energy - w * F(codes[i]) * F(codes[i])
            code = clipped(v * new_energy / new_along, -4, 3)
            if code == codes[i]:
                continue
            new_along += w * v * F(code)
            new_energy += w * F(code) * F(code)
            if new_energy > 0 and new_along * new_along * energy > along * along * new_energy:
                codes[i], along, energy, changed = code, new_along, new_energy, True
        if not changed:
            break
    return along / energy if energy > 0 else F(0), [code + 4 for code in codes]


def qkx(
    x: Numbers,
    top: int,
    weights: Numbers,
    first: float,
    step: float,
    steps: int,
    mad: bool = False,
) -> tuple[np.float32, np.float32, list[int]]:
    low = high = x[0]
    sum_w, sum_x = weights[0], weights[0] * x[0]
    for v, w in zip(x[1:], weights[1:], strict=True):
        low, high = (v if v < low else low), (v if v > high else high)
        sum_w += w
        sum_x += w * v
    if low > 0:
        low = F(0)
    if high == low:
        return F(0), -low, [0] * len(x)

    def levels(inverse: np.float32) -> list[int]:
        return [clipped(inverse * (v - low), 0, top) for v in x]

    def loss(scale: np.float32, low: np.float32, codes: list[int]) -> np.float32:
        total = F(0)
        for v, w, code in zip(x, weights, codes, strict=True):
            difference = scale * F(code) + low - v
            total += w * (abs(difference) if mad else difference * difference)
        return total

    codes = levels(F(top) / (high - low))
    scale = F(1) / (F(top) / (high - low))
    best = loss(scale, low, codes)
    for trial in range(steps + 1):
        tried = levels((F(first) + F(step) * F(trial) + F(top)) / (high - low))
        sum_l = sum_l2 = sum_xl = F(0)
        for v, w, code in zip(x, weights, tried, strict=True):
            sum_l += w * F(code)
            sum_l2 += w * F(code) * F(code)
            sum_xl += w * F(code) * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if determinant > 0:
            fit_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            fit_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            if fit_low > 0:
                fit_low, fit_scale = F(0), sum_xl / sum_l2
            error = loss(fit_scale, fit_low, tried)
            if error < best:
                codes, best, scale, low = tried, error, fit_scale, fit_low
    return scale, -low, codes


def qp(x: Numbers, top: int, weights: Numbers) -> tuple[np.float32, list[int]]:
    extreme = F(0)
    for v in x:
        extreme = max(extreme, v)
    if extreme < SMALLEST:
        return F(0), [0] * len(x)

    def loss(scale: np.float32, codes: Sequence[int]) -> np.float32:
        total = F(0)
        for v, w, code in zip(x, weights, codes, strict=True):
            difference = v - scale * F(code)
            total += w * difference * difference
        return total

    inverse = F(top) / extreme
    best = loss(F(1) / inverse, [nearest_int(inverse * v) & 0xFF for v in x])
    for step in range(-4, 5):
        if step == 0:
            continue
        tried = (F(0.1) * F(step) + F(top)) / extreme
        error = loss(F(1) / tried, [min(top, nearest_int(tried * v)) for v in x])
        if error < best:
            best, inverse = error, tried
    codes, along, energy = [], F(0), F(0)
    for v, w in zip(x, weights, strict=True):
        code = min(top, nearest_int(inverse * v))
        along += w * v * F(code)
        energy += w * F(code) * F(code)
        codes.append(code & 0xFF)
    for _ in range(5):
        changed = False
        for i, (v, w) in enumerate(zip(x, weights, strict=True)):
            new_along = along - w * v * F(codes[i])
            new_energy = energy - w * F(codes[i]) * F(codes[i])
            if not (new_along > 0 and new_energy > 0):
                continue
            code = min(top, nearest_int(v * new_energy / new_along))
            if code == codes[i]:
                continue
            new_along += w * v * F(code)
            new_energy += w * F(code) * F(code)
            if new_along * new_along * energy > along * along * new_energy:
                codes[i], along, energy, changed = code & 0xFF, new_along, new_energy, True
        if not changed:
            break
    return along / energy if energy > 0 else F(0), codes


def groups_of(x: Numbers, size: int) -> list[Numbers]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def element_weights(x: Numbers, importance: Numbers, spread: int) -> list[np.float32]:
    sigma2 = F(spread) * total_of([v * v for v in x]) / F(256)
    return [w * np.sqrt(sigma2 + v * v) for v, w in zip(x, importance, strict=True)]


def requantized(
    groups: list[Numbers], steps: Numbers, lows: Numbers, levels: list[list[int]], limits: range
) -> list[int]:
    codes: list[int] = []
    for group, step, low, kept in zip(groups, steps, lows, levels, strict=True):
        if step == 0:
            codes += kept
        else:
            first, last = limits[0], limits[-1]
            codes += [clipped((v + low) / step, first, last) - first for v in group]
    return codes


def affine_block(name: str, x: Numbers, importance: Numbers | None) -> Block:
    size, top, scale_top, search, spread = {
        "Q2_K": (16, 3, 15, (-0.5, 0.1, 15), 1),
        "Q4_K": (32, 15, 63, (-1.0, 0.1, 20), 2),
        "Q5_K": (32, 31, 63, (-0.5, 0.1, 15), 2),
    }[name]
    groups = groups_of(x, size)
    if importance is not None:
        weights = groups_of(element_weights(x, importance, spread), size)
        found = [qkx(v, top, w, -0.9, 0.05, 36) for v, w in zip(groups, weights, strict=True)]
    elif name == "Q2_K":
        found = [qkx(v, top, [abs(e) for e in v], *search, mad=True) for v in groups]
    else:
        found = []
        for v in groups:
            average = np.sqrt(total_of([e * e for e in v]) / F(size))
            found.append(qkx(v, top, [average + abs(e) for e in v], *search))
    d, scales = quantized_scales(name, [f[0] for f in found], scale_top)
    dmin, mins = quantized_scales(name, [f[1] for f in found], scale_top)
    if importance is not None:
        sums = [total_of(w) for w in weights]
        d, scales = qp([f[0] for f in found], scale_top, sums)
        dmin, mins = qp([f[1] for f in found], scale_top, sums)
        if name == "Q5_K":
            scales, mins = [min(63, s) for s in scales], [min(63, m) for m in mins]
    scales, mins = read_back(name, scales, mins)
    half, low_half = np.float16(d), np.float16(dmin)
    steps, lows = [F(half) * F(s) for s in scales], [F(low_half) * F(m) for m in mins]
    codes = requantized(groups, steps, lows, [f[2] for f in found], range(top + 1))
    return {"d": half, "dmin": low_half, "scales": scales, "mins": mins, "codes": codes}


def quantized_scales(name: str, x: Numbers, top: int) -> tuple[np.float32, list[int]]:
    extreme = F(0)
    for v in x:
        extreme = max(extreme, v)
    inverse = F(top) / extreme if extreme > 0 else F(0)
    levels = [nearest_int(inverse * v) & 0xFF for v in x]
    return extreme / F(top), levels if name == "Q2_K" else [min(top, level) for level in levels]


def read_back(name: str, scales: list[int], mins: list[int]) -> tuple[list[int], list[int]]:
    """Through the bytes of the block: 4 + 4 bits each, or 12 bytes of six-bit numbers."""
    if name == "Q2_K":
        both = [(s | m << 4) & 0xFF for s, m in zip(scales, mins, strict=True)]
        return [b & 15 for b in both], [b >> 4 for b in both]
    q = [0] * 12
    for j in range(8):
        if j < 4:
            q[j], q[j + 4] = scales[j], mins[j]
        else:
            q[j + 4] = (scales[j] & 15) | ((mins[j] & 15) << 4)
            q[j - 4] |= ((scales[j] >> 4) << 6) & 0xFF
            q[j] |= ((mins[j] >> 4) << 6) & 0xFF
    first = [(q[j] & 63, q[j + 4] & 63) for j in range(4)]
    second = [
        ((q[j + 4] & 15) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4))
        for j in range(4, 8)
    ]
    return [s for s, _ in first + second], [m for _, m in first + second]


def q3_k_block(x: Numbers, importance: Numbers | None) -> Block:
    groups = groups_of(x, 16)
    if importance is None:
        found = [q3(v) for v in groups]
        extreme = largest([scale for scale, _ in found])
        scales, d = [0] * 16, F(0)
        if extreme != 0:
            inverse = F(-32) / extreme
            scales = [clipped(inverse * scale, -32, 31) + 32 for scale, _ in found]
            d = F(1) / inverse
    else:
        weights = groups_of(element_weights(x, importance, 2), 16)
        found = [qx(v, 4, w) for v, w in zip(groups, weights, strict=True)]
        d, scales = qx([scale for scale, _ in found], 32, [total_of(w) for w in weights])
    half = np.float16(d)
    steps = [F(half) * F(scale - 32) for scale in scales]
    codes = requantized(groups, steps, [F(0)] * 16, [c for _, c in found], range(-4, 4))
    return {"d": half, "scales": scales, "codes": codes}


def q6_k_block(x: Numbers, importance: Numbers | None) -> Block:
    groups = groups_of(x, 16)
    weights = groups_of([v * v for v in x] if importance is None else importance, 16)
    found = [qx(v, 32, w) for v, w in zip(groups, weights, strict=True)]
    extreme = largest([scale for scale, _ in found])
    if abs(extreme) < SMALLEST:
        return {"d": np.float16(0), "scales": [0] * 16, "codes": [0] * 256}
    inverse = F(-128) / extreme
    half = np.float16(F(1) / inverse)
    scales = [min(127, nearest_int(inverse * scale)) for scale, _ in found]
    steps = [F(half) * F(scale) for scale in scales]
    codes = requantized(groups, steps, [F(0)] * 16, [c for _, c in found], range(-32, 32))
    return {"d": half, "scales": scales, "codes": codes}


def of_row(
    block: Callable[[Numbers, Numbers | None], Block],
) -> Callable[[Numbers, Numbers | None], list[Block]]:
    def quantize(row: Numbers, importance: Numbers | None) -> list[Block]:
        some = [None] * (len(row) // 256) if importance is None else groups_of(importance, 256)
        return [block(x, w) for x, w in zip(groups_of(row, 256), some, strict=True)]

    return quantize


LOOPS: dict[str, Callable[[Numbers, Numbers | None], list[Block]]] = {
    "Q2_K": of_row(lambda x, w: affine_block("Q2_K", x, w)),
    "Q3_K": of_row(q3_k_block),
    "Q4_K": of_row(lambda x, w: affine_block("Q4_K", x, w)),
    "Q5_K": of_row(lambda x, w: affine_block("Q5_K", x, w)),
    "Q6_K": of_row(q6_k_block),
}
