"""The searches for scales of ggml-quants.c, for many groups of weights at once.

Arrays are element-major: C-contiguous float32 (n, groups), the n weights of a group along axis 0.
So a sum over axis 0 adds one row after the other, for all groups together, in the order of the C
code; and each operation is a call of its own, so that no two are rounded together. The results are
those of llama.cpp to the last bit, where it was compiled without fused multiply-adds.

Overflow and division by 0 go on as infinities and NaN, as in C: call under
`np.errstate(all="ignore")`. Work arrays are as large as the input; pass `portion(n)` groups at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.solvers.ggml.arrays import Floats, column_sums, signed_extremes
from pytest_qlab.solvers.ggml.refinement import Problem, refine
from pytest_qlab.solvers.ggml.rounding import (
    LARGEST,
    read_as_bytes,
    rounded,
    rounded_by_bits,
)

Levels = NDArray[np.uint8]
Rounding = Callable[[Floats, int | None, int], Floats]

# Weights to search at once: few enough for work arrays to stay in the cache, and so many that numpy
# spends its time on numbers, not on calls. Measured; a work array takes half a megabyte.
PORTION = 131072
SMALLEST = np.float32(1e-15)  # a group whose weights are all smaller counts as zeros
TENTH = np.float32(0.1)


class Symmetric(NamedTuple):
    """`scale * (level - half)`, or `scale * level`: scales (groups,), levels (n, groups)."""

    scale: Floats
    levels: Levels


class Affine(NamedTuple):
    """`scale * level - below`: scales and depths below zero (groups,), levels (n, groups)."""

    scale: Floats
    below: Floats
    levels: Levels


def portion(elements: int) -> int:
    """How many groups of `elements` weights to search at once."""
    return PORTION // elements


def make_qx(x: Floats, half: int, weights: Floats) -> Symmetric:
    """`make_qx_quants` with rmse_type 1: levels 0 .. 2 * half - 1 from 19 trials of a scale.

    A trial rounds x to about `half` steps of its largest magnitude. The one with the largest
    (sum w x l)^2 / sum w l^2, l = level - half, has the least square error with its best scale.
    Groups of zeros get scale 0 and level 0.
    """
    # Scales are searched with this, too, and they may have overflowed.
    rounding = rounded if np.isfinite(x.sum()) else rounded_by_bits
    extreme, zero = _extremes_and_zeros(x)
    weighted = weights * x
    codes, product = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)

    def trial(inverse: Floats) -> tuple[Floats, Floats]:
        rounding(np.multiply(x, inverse, out=codes), -half, half - 1)
        return _projection(weights, weighted, codes, product)

    kept = np.float32(-half) / extreme
    along, energy = trial(kept)
    scale = np.where(energy != 0, along / energy, np.float32(0))
    best = scale * along
    for step in (*range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(half) + TENTH * np.float32(step)) / extreme
        along, energy = trial(inverse)
        better = along * along > best * energy
        better &= energy > 0
        (won,) = better.nonzero()
        if len(won):
            kept[won] = inverse[won]
            scale[won] = along[won] / energy[won]
            best[won] = scale[won] * along[won]
    rounding(np.multiply(x, kept, out=codes), -half, half - 1)
    codes += np.float32(half)
    return _without_zeros(scale, codes, zero)


def make_q3(x: Floats, half: int = 4) -> Symmetric:
    """`make_q3_quants` with do_rmse: levels 0 .. 2 * half - 1 from a coordinate search, w = x^2."""
    extreme, zero = _extremes_and_zeros(x)
    weights = x * x
    weighted = weights * x
    codes = rounded(x * (np.float32(-half) / extreme), -half, half - 1)
    along, energy = _projection(weights, weighted, codes, np.empty(x.shape, np.float32))
    refine(Problem(x, weights, weighted, -half, half - 1), codes, along, energy)
    scale = np.where(energy > 0, along / energy, np.float32(0))
    codes += np.float32(half)
    return _without_zeros(scale, codes, zero)


def make_qkx(
    x: Floats,
    top: int,
    weights: Floats,
    first: float,
    step: float,
    steps: int,
    *,
    mad: bool = False,
) -> Affine:
    """`make_qkx2_quants` and `make_qkx3_quants`: levels 0 .. top from `steps + 2` trials.

    Trial t rounds x to `top + first + t * step` steps of the range from the best minimum so far to
    the maximum, and fits scale and minimum to these levels by weighted least squares. The least
    weighted square error wins; with `mad`, the least absolute error.
    """
    found, wild = _search_affine(x, top, weights, first, step, steps, mad, rounded)
    if len(wild):
        again, _ = _search_affine(
            x.take(wild, 1), top, weights.take(wild, 1), first, step, steps, mad, rounded_by_bits
        )
        found.scale[wild], found.below[wild] = again.scale, again.below
        found.levels[:, wild] = again.levels
    return found


def make_qp(x: Floats, top: int, weights: Floats) -> Symmetric:
    """`make_qp_quants`: levels 0 .. top that stand for `scale * level`; x is not negative.

    If x is negative after all, which ill-conditioned scales can be, its level is a byte that
    wrapped around.
    """
    largest = np.maximum.reduce(x, axis=0)
    (zero,) = (largest < SMALLEST).nonzero()
    largest[zero] = 1
    kept = np.float32(top) / largest
    codes = read_as_bytes(rounded_by_bits(kept * x, None, LARGEST))
    best = _square_error(x, weights, np.float32(1) / kept, codes)
    for step in (*range(-4, 0), *range(1, 5)):
        inverse = (TENTH * np.float32(step) + np.float32(top)) / largest
        codes = rounded_by_bits(inverse * x, None, top)
        error = _square_error(x, weights, np.float32(1) / inverse, codes)
        (won,) = (error < best).nonzero()
        best[won], kept[won] = error[won], inverse[won]
    codes = rounded_by_bits(kept * x, None, top)
    weighted = weights * x
    along, energy = _projection(weights, weighted, codes, np.empty(x.shape, np.float32))
    codes = read_as_bytes(codes)
    refine(Problem(x, weights, weighted, None, top), codes, along, energy)
    scale = np.where(energy > 0, along / energy, np.float32(0))
    return _without_zeros(scale, codes, zero)


def first_of_largest_magnitude(x: Floats) -> Floats:
    """The element of largest magnitude along axis 0, the first where some are equal."""
    high, low = np.maximum.reduce(x, axis=0), np.minimum.reduce(x, axis=0)
    if np.isnan(high).any():
        # A scan passes over NaN, because comparisons with it are false.
        return first_of_largest_magnitude(np.where(np.isnan(x), np.float32(0), x))
    return signed_extremes(high, low, x)


def _extremes_and_zeros(x: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """The largest of each group, 1 for those that count as zeros, and which these are."""
    extreme = first_of_largest_magnitude(x)
    (zero,) = (np.absolute(extreme) < SMALLEST).nonzero()
    extreme[zero] = 1
    return extreme, zero


def _without_zeros(scale: Floats, codes: Floats, zero: NDArray[np.intp]) -> Symmetric:
    scale[zero] = 0
    codes[:, zero] = 0
    return Symmetric(scale, codes.astype(np.uint8))


def _sums(values: Floats) -> Floats:
    """Sums (groups,) that begin with +0, so that none is -0."""
    total = column_sums(values)
    total += np.float32(0)
    return total


def _projection(
    weights: Floats, weighted: Floats, codes: Floats, product: Floats
) -> tuple[Floats, Floats]:
    """Sums (groups,) of `w x l` and `w l l`; `weighted` is `w x`, `product` is overwritten."""
    along = _sums(np.multiply(weighted, codes, out=product))
    np.multiply(weights, codes, out=product)
    product *= codes
    return along, _sums(product)


def _square_error(x: Floats, weights: Floats, scale: Floats, codes: Floats) -> Floats:
    difference = x - scale * codes
    return _sums(weights * difference * difference)


def _search_affine(
    x: Floats,
    top: int,
    weights: Floats,
    first: float,
    step: float,
    steps: int,
    mad: bool,
    rounding: Rounding,
) -> tuple[Affine, NDArray[np.intp]]:
    """What `make_qkx` does, and the groups for which `rounding` met numbers beyond its range."""
    codes, product, weighted = (np.empty(x.shape, np.float32) for _ in range(3))

    def round_codes(inverse: Floats, low: Floats) -> None:
        np.subtract(x, low, out=codes)
        np.multiply(codes, inverse, out=codes)
        rounding(codes, 0, top)

    def error_of(scale: Floats, low: Floats) -> Floats:
        difference = np.multiply(codes, scale, out=product)
        difference += low
        difference -= x
        (np.absolute if mad else np.square)(difference, out=difference)
        difference *= weights
        return _sums(difference)

    high, lowest = np.maximum.reduce(x, axis=0), _lowest(x)
    lowest[lowest > 0] = 0
    (flat,) = (high == lowest).nonzero()
    sum_w, sum_x = column_sums(weights), column_sums(np.multiply(weights, x, out=product))

    span = high - lowest
    narrowest = span.copy()
    inverse = np.float32(top) / span
    scale, low = np.float32(1) / inverse, lowest.copy()
    round_codes(inverse, low)
    best = error_of(scale, low)
    # The best codes come from these; low is already that of the fit to them.
    kept_inverse, kept_low = inverse, lowest.copy()
    for trial in range(steps + 1):
        count = np.float32(first) + np.float32(step) * np.float32(trial) + np.float32(top)
        inverse = count / (high - low)
        round_codes(inverse, low)
        sum_l = _sums(np.multiply(weights, codes, out=weighted))
        sum_xl = _sums(np.multiply(weighted, x, out=product))
        sum_l2 = _sums(np.multiply(weighted, codes, out=product))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fit_scale = sum_w * sum_xl - sum_x * sum_l
        fit_scale /= determinant
        fit_low = sum_l2 * sum_x - sum_l * sum_xl
        fit_low /= determinant
        (above,) = (fit_low > 0).nonzero()
        fit_low[above], fit_scale[above] = 0, sum_xl[above] / sum_l2[above]
        error = error_of(fit_scale, fit_low)
        better = error < best
        better &= determinant > 0
        (won,) = better.nonzero()
        if len(won):
            kept_inverse[won], kept_low[won] = inverse[won], low[won]
            best[won], scale[won], low[won] = error[won], fit_scale[won], fit_low[won]
            narrowest[won] = np.minimum(narrowest[won], np.absolute(high[won] - low[won]))
    round_codes(kept_inverse, kept_low)
    codes[:, flat] = 0
    scale[flat] = 0

    # All minima are <= 0, so what was rounded is at most (top + 2) * max(1, -lowest / narrowest).
    reach = np.maximum(narrowest, -lowest) * np.float32(top + 2)
    tame = (reach <= narrowest * np.float32(LARGEST)) & (narrowest > 1e-34) & (span < 1e36)
    tame[flat] = True
    (wild,) = (~tame).nonzero()
    return Affine(scale, -low, codes.astype(np.uint8)), wild


def _lowest(x: Floats) -> Floats:
    """The smallest element along axis 0; of zeros of both signs the first, as in a scan."""
    low: Floats = np.minimum.reduce(x, axis=0)
    (zero,) = (low == 0).nonzero()
    if len(zero):
        columns = x.take(zero, 1)
        low[zero] = columns[(columns == 0).argmax(0), np.arange(len(zero))]
    return low
