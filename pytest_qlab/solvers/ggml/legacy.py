"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights, as llama.cpp's ggml-quants.c makes them.

Every operation is rounded to float32 in the order of the C code, so that the bytes are the same.
Each function takes float32 (m, n) and the importance of the columns, (n,) or None, and returns the
fields of `formats.ggml.pack_blocks` for the blocks in row-major order.

Without importance there is no search: an extreme weight sets the scale. With it, the scale (and the
minimum) come from the weighted searches that the K-quants use, too; the weight of an element grows
with the mean square of its row, which makes this path the only one that is not local to a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
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
    sign_zeros,
    signed_extremes,
    steps,
)
from pytest_qlab.solvers.ggml.kernels import make_qkx, make_qx

# Blocks that are searched at once: their work arrays stay in the second-level cache.
STEP = 2048
# The largest float32 below 1/2. Added away from zero before the fraction is cut off, it rounds
# halves away from zero, as C's roundf does; 1/2 itself would round 0.49999997 up.
BELOW_HALF = np.float32(0.49999997)


def symmetric(half: int, x: Floats, importance: Floats | None) -> Fields:
    """Codes `q` in 0 .. 2 * half - 1 that stand for `(q - half) * d`: Q4_0 (8) and Q5_0 (16)."""
    if importance is not None:
        return _symmetric_search(half, x, importance)
    blocks = x.reshape(-1, BLOCK)
    scale = signed_extremes(*_extremes(blocks), blocks.T) / np.float32(-half)
    inverse, lost = _reciprocal(scale)
    scaled = _scaled(blocks, inverse)
    scaled += np.float32(half + 0.5)
    return {"d": scale.astype(np.float16), "codes": _cut_off(scaled, 2 * half, lost)}


def asymmetric(top: int, x: Floats, importance: Floats | None) -> Fields:
    """Codes `q` in 0 .. top that stand for `q * d + m`: Q4_1 (15) and Q5_1 (31)."""
    if importance is not None:
        return _asymmetric_search(top, x, importance)
    blocks = x.reshape(-1, BLOCK)
    high, low = _extremes(blocks)
    sign_zeros(low, blocks.T)
    # 0 is added because the difference of zeros of two signs may be -0 here; in C it never is.
    scale: Floats = high - low
    scale += np.float32(0)
    scale /= np.float32(top)
    inverse, lost = _reciprocal(scale)
    scaled = _scaled(blocks, inverse, low)
    scaled += np.float32(0.5)
    return {
        "d": scale.astype(np.float16),
        "m": low.astype(np.float16),
        "codes": _cut_off(scaled, top + 1, lost),
    }


def q8_0(x: Floats, importance: Floats | None) -> Fields:
    """Codes in -127 .. 127 that stand for `q * d`; llama.cpp knows no search for this type."""
    blocks = x.reshape(-1, BLOCK)
    high, low = _extremes(blocks)
    scale: Floats = np.absolute(np.maximum(high, -low))
    scale /= np.float32(127)
    inverse, lost = _reciprocal(scale)
    scaled = _scaled(blocks, inverse)
    scaled += np.copysign(BELOW_HALF, scaled)
    codes = scaled.astype(np.int8)
    codes[lost] = 0
    return {"d": scale.astype(np.float16), "codes": codes}


def _symmetric_search(half: int, x: Floats, importance: Floats) -> Fields:
    scale, codes = _empty_blocks(x)
    for part, values, weights in _columns_of_blocks(x, importance):
        found, levels = make_qx(values, half, weights)
        scale[part] = found
        codes[part] = levels.T
    return {"d": scale.astype(np.float16), "codes": codes}


def _asymmetric_search(top: int, x: Floats, importance: Floats) -> Fields:
    scale, codes = _empty_blocks(x)
    low = np.empty_like(scale)
    for part, values, weights in _columns_of_blocks(x, importance):
        found, below, levels = make_qkx(values, top, weights, -0.9, 0.05, 36, mad=False)
        scale[part] = found
        np.negative(below, out=low[part])
        codes[part] = levels.T
    return {"d": scale.astype(np.float16), "m": low.astype(np.float16), "codes": codes}


def _empty_blocks(x: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    count = x.size // BLOCK
    return np.empty(count, np.float32), np.empty((count, BLOCK), np.uint8)


def _columns_of_blocks(x: Floats, importance: Floats) -> Iterator[tuple[slice, Floats, Floats]]:
    """Slices of blocks with their elements and weights, (32, blocks)."""
    columns = x.shape[1]
    per_row = columns // BLOCK
    of_blocks = np.ascontiguousarray(importance.reshape(per_row, BLOCK).T)
    for rows in steps(len(x), max(1, STEP // per_row)):
        sigma2 = column_sums(np.square(x[rows].T, order="C")) / np.float32(columns)
        for inside in steps(per_row, STEP):
            values = np.ascontiguousarray(
                x[rows].reshape(-1, per_row, BLOCK)[:, inside].transpose(2, 0, 1)
            )
            weights = element_weights(values, of_blocks[:, None, inside], sigma2[:, None])
            start = rows.start * per_row + inside.start
            count = values.shape[1] * values.shape[2]
            part = slice(start, start + count)
            yield part, values.reshape(BLOCK, -1), weights.reshape(BLOCK, -1)


def _extremes(blocks: Floats) -> tuple[Floats, Floats]:
    """Largest and smallest element of each row; torch, because numpy is slow on short rows."""
    values = torch.from_numpy(blocks)
    return values.amax(1).numpy(), values.amin(1).numpy()


def _reciprocal(scale: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """`1 / scale`, 0 where it does not exist, and the places where it overflows.

    There C multiplies by infinity and converts what comes out, infinities and NaN, to an integer,
    which gives 0 on x86. Such scales, below 2**-128, are stored as 0 anyway.
    """
    inverse = np.float32(1) / scale
    lost = np.flatnonzero(np.isinf(inverse))
    inverse[lost] = 0
    return inverse, lost[scale[lost] != 0]


def _scaled(blocks: Floats, inverse: Floats, low: Floats | None = None) -> Floats:
    """`(blocks - low) * inverse`, one factor for each row; by torch, as in `_extremes`."""
    values, factors = torch.from_numpy(blocks), torch.from_numpy(inverse)[:, None]
    if low is None:
        return (values * factors).numpy()
    return (values - torch.from_numpy(low)[:, None]).mul_(factors).numpy()


def _cut_off(scaled: Floats, count: int, lost: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Whole parts; where rounding has yielded `count` (a power of two), `count - 1`."""
    codes = scaled.astype(np.uint8)
    codes -= codes >> np.uint8(count.bit_length() - 1)
    codes[lost] = 0
    return codes


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {
        "Q4_0": partial(symmetric, 8),
        "Q4_1": partial(asymmetric, 15),
        "Q5_0": partial(symmetric, 16),
        "Q5_1": partial(asymmetric, 31),
        "Q8_0": q8_0,
    }
)
