"""Q2_K to Q6_K: super-blocks of 256 weights, as ggml-quants.c of llama.cpp makes them.

A super-block is 8 groups of 32 or 16 groups of 16 weights. The scale (and minimum) of each group is
searched first, then these scales are quantized themselves, then each weight is rounded once more
with what was stored. A group whose stored scale is 0 keeps the levels of the search.

Each function takes float32 (m, n) and the importance of the columns, (n,) or None, and returns the
fields of `formats.ggml.pack_blocks` for the super-blocks in row-major order. They are called under
`np.errstate(all="ignore")`: as in C, overflow goes on as infinities.

Inside, weights are (elements of a group, groups), the groups in the order (group in its
super-block, super-block). So what there is one of for each group is, as (groups of a super-block,
super-blocks), element-major itself, and can be searched like weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.solvers.ggml.arrays import (
    Fields,
    Floats,
    Quantizer,
    column_sums,
    element_weights,
    steps,
)
from pytest_qlab.solvers.ggml.kernels import (
    SMALLEST,
    Affine,
    Levels,
    first_of_largest_magnitude,
    make_q3,
    make_qkx,
    make_qp,
    make_qx,
    portion,
)
from pytest_qlab.solvers.ggml.rounding import (
    LARGEST,
    read_as_bytes,
    rounded_by_bits,
    rounded_quotients,
)

SUPER = 256
SYMMETRIC_GROUP = 16
ZERO = np.float32(0)


class Rule(NamedTuple):
    """What differs between the types with minima.

    Attributes:
        group: weights of a group.
        top: largest level of a weight.
        scale_top: largest level of a scale or minimum.
        limited: whether levels of scales are limited to it with importance, too.
        search: first, step and steps of the search without importance.
        mad: that search weighs by |x| and minimizes absolute errors.
        spread: factor of mean(x^2) in the weights of the search with importance.
    """

    group: int
    top: int
    scale_top: int
    limited: bool
    search: tuple[float, float, int]
    mad: bool
    spread: int


Q2_K = Rule(16, 3, 15, limited=False, search=(-0.5, 0.1, 15), mad=True, spread=1)
Q4_K = Rule(32, 15, 63, limited=False, search=(-1.0, 0.1, 20), mad=False, spread=2)
Q5_K = Rule(32, 31, 63, limited=True, search=(-0.5, 0.1, 15), mad=False, spread=2)
SEARCH_BY_IMPORTANCE = (-0.9, 0.05, 36)


def affine(rule: Rule, x: Floats, importance: Floats | None) -> Fields:
    """Levels that stand for `(d * scale) * level - dmin * minimum`: Q2_K, Q4_K and Q5_K."""
    blocks = _Blocks(x, importance, rule.group)
    fields = blocks.fields(
        d=np.float16, dmin=np.float16, scales=np.uint8, mins=np.uint8, codes=np.uint8
    )
    for part in blocks.portions():
        values = blocks.values(part)
        if importance is None:
            search = make_qkx(
                values, rule.top, _plain_weights(values, rule), *rule.search, mad=rule.mad
            )
            largest, levels = by_largest(blocks.of_blocks(*_both(search)), rule.scale_top)
        else:
            weights = blocks.weights(values, part, rule.spread)
            search = make_qkx(values, rule.top, weights, *SEARCH_BY_IMPORTANCE)
            total = column_sums(weights)
            largest, levels = make_qp(
                blocks.of_blocks(*_both(search)), rule.scale_top, blocks.of_blocks(total, total)
            )
            if rule.limited:
                np.minimum(levels, rule.scale_top, out=levels)
        d, dmin = np.split(largest.astype(np.float16), 2)
        scales, mins = as_stored(levels[:, : len(d)], levels[:, len(d) :], rule.scale_top)
        values += (dmin.astype(np.float32) * mins).ravel()
        divisor = (d.astype(np.float32) * scales).ravel()
        codes = _requantized(values, divisor, 0, rule.top, search.levels)
        blocks.store(fields, part, d=d, dmin=dmin, scales=scales, mins=mins, codes=codes)
    return fields


def q3_k(x: Floats, importance: Floats | None) -> Fields:
    """Levels that stand for `(d * (scale - 32)) * (level - 4)`."""
    blocks = _Blocks(x, importance, SYMMETRIC_GROUP)
    fields = blocks.fields(d=np.float16, scales=np.uint8, codes=np.uint8)
    for part in blocks.portions():
        values = blocks.values(part)
        if importance is None:
            search = make_q3(values)
            step, found, zero = _by_signed_largest(blocks.of_blocks(search.scale), 32, 31)
            scales = (found + np.float32(32)).astype(np.uint8)
            scales[:, zero] = 0
        else:
            weights = blocks.weights(values, part, spread=2)
            search = make_qx(values, 4, weights)
            step, scales = make_qx(
                blocks.of_blocks(search.scale), 32, blocks.of_blocks(column_sums(weights))
            )
        d = step.astype(np.float16)
        divisor = (d.astype(np.float32) * (scales - np.float32(32))).ravel()
        codes = _requantized(values, divisor, -4, 3, search.levels)
        blocks.store(fields, part, d=d, scales=scales, codes=codes)
    return fields


def q6_k(x: Floats, importance: Floats | None) -> Fields:
    """Levels that stand for `(d * scale) * (level - 32)`."""
    blocks = _Blocks(x, importance, SYMMETRIC_GROUP)
    fields = blocks.fields(d=np.float16, scales=np.int8, codes=np.uint8)
    for part in blocks.portions():
        values = blocks.values(part)
        weights = values * values if importance is None else blocks.importance(part)
        search = make_qx(values, 32, weights)
        step, scales, zero = _by_signed_largest(
            blocks.of_blocks(search.scale), 128, 127, smallest=SMALLEST
        )
        scales[:, zero] = 0
        d = step.astype(np.float16)
        divisor = (d.astype(np.float32) * scales).ravel()
        codes = _requantized(values, divisor, -32, 31, search.levels)
        # Such a block is zero bytes, even its levels.
        codes.reshape(SYMMETRIC_GROUP, -1, len(d))[:, :, zero] = 0
        blocks.store(fields, part, d=d, scales=scales, codes=codes)
    return fields


class _Blocks:
    """The super-blocks of a weight, and the way between their order and that of the searches."""

    def __init__(self, x: Floats, importance: Floats | None, group: int) -> None:
        self._blocks = x.reshape(-1, SUPER)
        self._importance = None if importance is None else importance.reshape(-1, SUPER)
        self._group, self._groups = group, SUPER // group
        self._last: tuple[tuple[int, int], Floats] | None = None

    def portions(self) -> Iterator[slice]:
        return steps(len(self._blocks), portion(SUPER))

    def values(self, part: slice) -> Floats:
        """A copy of some super-blocks, (elements of a group, groups)."""
        return self._element_major(self._blocks[part])

    def importance(self, part: slice) -> Floats:
        """The importance of the columns that these super-blocks lie in, arranged as `values`."""
        assert self._importance is not None
        first, count = part.start % len(self._importance), part.stop - part.start
        if self._last is None or self._last[0] != (first, count):
            columns = np.arange(first, first + count) % len(self._importance)
            self._last = (first, count), self._element_major(self._importance[columns])
        return self._last[1]

    def weights(self, values: Floats, part: slice, spread: int) -> Floats:
        """`importance * sqrt(spread * mean(x^2) + x^2)`, the mean over the super-block."""
        shape = (self._group, self._groups, -1)
        in_order = values.reshape(shape).swapaxes(0, 1)
        squares = np.empty(in_order.shape, np.float32)
        np.multiply(in_order, in_order, out=squares)
        total = column_sums(squares.reshape(SUPER, -1))
        sigma2 = np.float32(spread) * total / np.float32(SUPER)
        importance = self.importance(part).reshape(shape)
        return element_weights(values.reshape(shape), importance, sigma2).reshape(values.shape)

    def of_blocks(self, *of_groups: Floats) -> Floats:
        """(groups of a super-block, super-blocks), of several arrays side by side."""
        return np.concatenate([each.reshape(self._groups, -1) for each in of_groups], axis=1)

    def fields(self, **types: type) -> Fields:
        """Empty fields of all super-blocks."""
        widths = {"codes": SUPER, "scales": self._groups, "mins": self._groups}
        count = len(self._blocks)
        return {
            name: np.empty((count, widths[name]) if name in widths else count, type)
            for name, type in types.items()
        }

    def store(self, fields: Fields, part: slice, **found: NDArray[Any]) -> None:
        """Write what was found for some super-blocks, in the order of the searches."""
        codes = found.pop("codes").reshape(self._group, self._groups, -1)
        target = fields["codes"][part].reshape(-1, self._groups, self._group)
        np.copyto(target, codes.transpose(2, 1, 0))
        for name, values in found.items():
            fields[name][part] = values.T

    def _element_major(self, blocks: Floats) -> Floats:
        view = blocks.reshape(-1, self._groups, self._group).transpose(2, 1, 0)
        return np.ascontiguousarray(view).reshape(self._group, -1)


def _both(search: Affine) -> tuple[Floats, Floats]:
    return search.scale, search.below


def _plain_weights(values: Floats, rule: Rule) -> Floats:
    """|x|, plus the root of the group's mean square unless it is for absolute errors."""
    weights: Floats = np.absolute(values)
    if not rule.mad:
        weights += np.sqrt(column_sums(values * values) / np.float32(rule.group))
    return weights


def by_largest(values: Floats, top: int) -> tuple[Floats, Levels]:
    """Steps (B,) and levels (groups, B) of values (groups, B), the largest of which gets `top`."""
    largest = np.maximum(np.maximum.reduce(values, axis=0), ZERO)
    inverse = np.float32(top) / largest
    inverse[largest == 0] = 0
    levels = read_as_bytes(rounded_by_bits(inverse * values, None, LARGEST)).astype(np.uint8)
    if top > 15:
        # Q2_K has no such limit: there the levels of negative scales spill into those of minima.
        np.minimum(levels, top, out=levels)
    return largest / np.float32(top), levels


def _by_signed_largest(
    scale: Floats, count: int, high: int, smallest: np.float32 = ZERO
) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Steps (B,) and levels (groups, B) of scales, that of largest magnitude gets `-count`.

    Also returns which super-blocks have no scale larger than `smallest`; their step is 0.
    """
    largest = first_of_largest_magnitude(scale)
    magnitude = np.absolute(largest)
    (zero,) = ((magnitude < smallest) | (magnitude == 0)).nonzero()
    inverse = np.float32(-count) / largest
    step = np.float32(1) / inverse
    step[zero] = 0
    return step, rounded_by_bits(inverse * scale, -count, high), zero


def as_stored(scales: Levels, mins: Levels, top: int) -> tuple[Levels, Levels]:
    """Levels (groups, B) as they are read back from a block in which too large ones overlap."""
    four, six = np.uint8(4), np.uint8(6)
    if top == 15:
        return scales & np.uint8(15), (scales >> four) | mins
    read = scales & np.uint8(63)
    read[4:] |= (scales[:4] >> six) << four
    return read, mins


def _requantized(values: Floats, divisor: Floats, low: int, high: int, levels: Levels) -> Levels:
    """Levels of `values / divisor` from 0; those given where a divisor is 0. Overwrites values."""
    (kept,) = (divisor == 0).nonzero()
    rounded_quotients(values, divisor, low, high)
    values -= np.float32(low)
    codes = values.astype(np.uint8)
    codes[:, kept] = levels[:, kept]
    return codes


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {
        "Q2_K": partial(affine, Q2_K),
        "Q3_K": q3_k,
        "Q4_K": partial(affine, Q4_K),
        "Q5_K": partial(affine, Q5_K),
        "Q6_K": q6_k,
    }
)
