"""IQ4_NL, IQ4_XS and MXFP4: 4-bit codes of levels that are not equally far apart.

As llama.cpp's ggml-quants.c makes them, rounded to float32 in the order of the C code, so that the
bytes are the same. The functions take and return what those of `legacy` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from pytest_qlab.solvers.ggml.arrays import (
    BLOCK,
    Fields,
    Floats,
    Quantizer,
    column_sums,
    element_weights,
    steps,
)
from pytest_qlab.solvers.ggml.kernels import first_of_largest_magnitude

# The levels of IQ4_NL and IQ4_XS: nearly the quantiles of weights seen in the wild.
LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
GROUPS = 8  # of a super-block of IQ4_XS
TRIALS = range(-7, 8)
SMALLEST = np.float32(1e-15)  # a group whose weights are all smaller counts as zeros
# Groups of 32 weights in one step: its work arrays stay in the second-level cache.
STEP = 1024

# The nearest level of v, the upper one of two at the same distance, depends only on floor(2 v),
# since all boundaries are multiples of 1/2. Trials reach |2 v| <= 268; beyond the table it is the
# first or the last level.
EDGE = 270
BOUNDARIES = (LEVELS[1:] + LEVELS[:-1]) / 2
CODE_OF = np.searchsorted(
    BOUNDARIES, np.arange(-EDGE, EDGE + 1, dtype=np.float32) / 2, side="right"
).astype(np.uint8)
LEVEL_OF = LEVELS[CODE_OF]

# Boundaries of E2M1's magnitudes 0, 1/2, 1, 1 1/2, 2, 3, 4 and 6, in units of 1/2; on a boundary
# the smaller magnitude is taken.
FP4_BOUNDARIES = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)
FP4_SIGN = np.uint8(8)


def iq4_nl(x: Floats, importance: Floats | None) -> Fields:
    """Codes 0 .. 15 of 32 weights that stand for `LEVELS[q] * d`."""
    blocks = x.reshape(-1, BLOCK)
    scale, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.uint8)
    search = _Search()
    for part in steps(len(blocks), STEP):
        values = np.ascontiguousarray(blocks[part].T)
        scale[part] = search.scales(values, _weights(blocks[part], part.start, importance).T)
        codes[part] = search.codes(values, scale[part]).T
    return {"d": scale.astype(np.float16), "codes": codes}


def iq4_xs(x: Floats, importance: Floats | None) -> Fields:
    """Eight groups of 32 that stand for `LEVELS[q] * (d * (scale - 32))`."""
    blocks = x.reshape(-1, GROUPS * BLOCK)
    d, scales = np.empty(len(blocks), np.float32), np.empty((len(blocks), GROUPS), np.uint8)
    codes = np.empty((len(blocks), GROUPS, BLOCK), np.uint8)
    search = _Search()
    for part in steps(len(blocks), STEP // GROUPS):
        values = np.ascontiguousarray(blocks[part].reshape(-1, BLOCK).T)
        weights = _weights(blocks[part], part.start, importance).reshape(-1, BLOCK).T
        found = search.scales(values, weights).reshape(-1, GROUPS)
        step = -first_of_largest_magnitude(found.T) / np.float32(32)
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
        levels = np.clip(np.rint(inverse[:, None] * found), -32, 31)
        levels[np.isnan(levels)] = 0  # where sums have overflowed; so does C's rounding by bits
        d[part] = step
        scales[part] = levels + 32
        shared = (step[:, None] * levels).ravel()
        codes[part] = search.codes(values, shared).T.reshape(-1, GROUPS, BLOCK)
    return {"d": d.astype(np.float16), "scales": scales, "codes": codes.reshape(blocks.shape)}


def mxfp4(x: Floats, importance: Floats | None) -> Fields:
    """E2M1 codes under a power of two for 32 weights; llama.cpp knows no search for this type."""
    blocks = x.reshape(-1, BLOCK)
    exponent, codes = np.empty(len(blocks), np.uint8), np.empty(blocks.shape, np.uint8)
    work = np.empty((STEP, BLOCK), np.float32)
    above = np.empty((STEP, BLOCK), np.bool_)
    for part in steps(len(blocks), STEP):
        values, count = blocks[part], len(blocks[part])
        exponent[part] = _exponents(torch.from_numpy(values).abs().amax(1).numpy())
        unit = np.ldexp(np.float32(1), exponent[part].astype(np.int32) - 128)
        magnitude = np.divide(values, unit[:, None], out=work[:count])
        np.absolute(magnitude, out=magnitude)
        found, more = codes[part], above[:count]
        np.greater(magnitude, FP4_BOUNDARIES[0], out=found.view(np.bool_))
        for boundary in FP4_BOUNDARIES[1:]:
            np.greater(magnitude, boundary, out=more)
            found += more.view(np.uint8)
        # Zero is stored with a positive sign.
        np.less(values, -unit[:, None] * FP4_BOUNDARIES[0], out=more)
        found += more.view(np.uint8) * FP4_SIGN
    return {"e": exponent, "codes": codes}


class _Search:
    """Searches scales, and looks up codes, for up to `STEP` groups of 32 weights at a time."""

    def __init__(self) -> None:
        self._work = np.empty((3, BLOCK * STEP), np.float32)
        self._index = np.empty(BLOCK * STEP, np.intp)

    def scales(self, values: Floats, weights: Floats) -> Floats:
        """The scales (groups,) that lose least of `values` (32, groups), weighted."""
        largest = first_of_largest_magnitude(values)
        zero = np.absolute(largest) < SMALLEST
        largest[zero] = 1
        weights = np.ascontiguousarray(weights)
        first = np.float32(1) / (largest / np.float32(127))
        along, energy = self._sums(values, weights, first)
        scale = np.where(energy > 0, along / energy, np.float32(0))
        best = scale * along
        for trial in TRIALS:
            along, energy = self._sums(values, weights, (trial + LEVELS[0]) / largest)
            better = (energy > 0) & (along * along > best * energy)
            np.divide(along, energy, out=scale, where=better)
            np.multiply(scale, along, out=best, where=better)
        scale[zero] = 0
        return scale

    def codes(self, values: Floats, scale: Floats) -> NDArray[np.uint8]:
        """Codes (32, groups) of the levels nearest to `values / scale`; those of 0 for scale 0."""
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        return np.take(CODE_OF, self._places(values, inverse, clip=True), mode="clip")

    def _sums(self, values: Floats, weights: Floats, inverse: Floats) -> tuple[Floats, Floats]:
        """Sums of `w q x` and `w q q` with the levels q nearest to `inverse * values`."""
        places = self._places(values, inverse)
        level, product = (each[: values.size].reshape(values.shape) for each in self._work[1:])
        np.take(LEVEL_OF, places, out=level, mode="clip")
        weighted = np.multiply(
            weights, level, out=self._work[0][: values.size].reshape(values.shape)
        )
        along = column_sums(np.multiply(weighted, values, out=product))
        energy = column_sums(np.multiply(weighted, level, out=product))
        return along, energy

    def _places(self, values: Floats, inverse: Floats, *, clip: bool = False) -> NDArray[np.intp]:
        """Where the levels nearest to `inverse * values` are in the tables."""
        doubled = self._work[0][: values.size].reshape(values.shape)
        np.multiply(values, inverse * np.float32(2), out=doubled)
        np.floor(doubled, out=doubled)
        if clip:
            np.clip(doubled, -EDGE, EDGE, out=doubled)
        doubled += np.float32(EDGE)
        places = self._index[: values.size].reshape(values.shape)
        np.copyto(places, doubled, casting="unsafe")
        return places


def _weights(blocks: Floats, start: int, importance: Floats | None) -> Floats:
    """Weights of all elements of (super-)blocks (B, size), the first of which is number `start`."""
    squares = blocks * blocks
    if importance is None:
        return squares
    size = blocks.shape[1]
    sigma2 = np.add.accumulate(squares, axis=1)[:, -1] * np.float32(2 / size)
    columns = importance.reshape(-1, size)
    place = np.arange(start, start + len(blocks)) % len(columns)
    return element_weights(blocks, columns[place], sigma2[:, None])


def _exponents(largest: Floats) -> NDArray[np.uint8]:
    """Stored exponents of blocks with these largest magnitudes.

    C takes the logarithm in float32, which lifts a few numbers just below a power of two to it. The
    float64 logarithm rounded to float32 is that of glibc at every such number. What is below 0
    wraps around, as on x86.
    """
    positive = largest > 0
    logarithm = np.log2(largest.astype(np.float64)).astype(np.float32)
    whole = np.floor(np.where(positive, logarithm, 0)).astype(np.int32) + (127 - 2)
    return np.where(positive, whole & 0xFF, 0).astype(np.uint8)


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {"IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4}
)
