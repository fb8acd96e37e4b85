"""Rounding to whole numbers as ggml-quants.c does it, where it matters beyond the usual range.

`nearest_int` there adds 1.5 * 2**23 and reads a whole number from the lower 23 bits of the sum.
That is the nearest integer, halves to even, up to 2**22; beyond, and for infinities and NaN, it is
whatever the bits say. Both are here: the plain one, and the one by bits for numbers that may be too
large.
"""

from __future__ import annotations

import numpy as np

from pytest_qlab.solvers.ggml.arrays import Floats

MAGIC = np.float32(12582912)
MANTISSA, ZERO = np.int32(0x7FFFFF), np.int32(0x400000)
LARGEST = 4194303  # of what is rounded to the nearest integer, and of what it can be rounded to


def rounded(values: Floats, low: int | None, high: int) -> Floats:
    """The values, replaced by the nearest whole numbers between the limits."""
    np.rint(values, out=values)
    return values.clip(low, high, out=values)


def rounded_by_bits(values: Floats, low: int | None, high: int) -> Floats:
    """As `rounded`, for values of any size."""
    values += MAGIC
    bits = values.view(np.int32) & MANTISSA
    bits -= ZERO
    np.copyto(values, bits.clip(low, high, out=bits), casting="unsafe")
    return values


def rounded_quotients(x: Floats, divisor: Floats, low: int, high: int) -> Floats:
    """x (n, groups), replaced by `x / divisor` rounded between the limits; divisors (groups,).

    Groups whose divisor is 0 get anything.
    """
    reach = np.maximum(np.maximum.reduce(x, axis=0), -np.minimum.reduce(x, axis=0))
    # Of twice as large numbers, so that no rounding of a quotient can make a difference.
    small = 2 * reach <= np.absolute(divisor) * np.float32(LARGEST)
    x /= divisor
    return (rounded if (small | (divisor == 0)).all() else rounded_by_bits)(x, low, high)


def read_as_bytes(codes: Floats) -> Floats:
    """What is read back of whole numbers that were stored in unsigned bytes."""
    wrapped: Floats = np.mod(codes, np.float32(256))
    return wrapped
