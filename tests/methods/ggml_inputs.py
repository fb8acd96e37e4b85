"""Weights that the GGML quantizers are tried on: published vectors, and kinds with corners."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

import pytest_qlab
from tests.toy import uniform

Floats = NDArray[np.float32]

EMBEDDED = Path(pytest_qlab.__file__).parent / "embedded" / "model" / "model.safetensors"


def cubes(count: int, seed: int) -> Floats:
    """Cubes of uniform numbers, in float32: `(u * u) * u`."""
    u = uniform(count, seed).astype(np.float32)
    return (u * u) * u


def importance(count: int, seed: int) -> Floats:
    """Squares of numbers in [0, 1), and a little more."""
    v = ((uniform(count, seed) + 1) / 2).astype(np.float32)
    return v * v + np.float32(2.0**-10)


@cache
def vector_weight() -> Floats:
    """(4, 1024); its importance is `importance(1024, 5678)`."""
    return cubes(4096, 1234).reshape(4, 1024)


@cache
def vector_edges() -> Floats:
    """(10, 256): zeros, constants, tiny and one-sided rows; with `importance(256, 77)`."""
    x = cubes(2560, 99).reshape(10, 256)
    x[0] = 0
    x[1] = 0.5
    x[2] = -0.5
    x[3] *= np.float32(1e-12)
    x[4, :128] = 0
    x[5] = np.abs(x[5])
    x[6] = -np.abs(x[6])
    x[7] = 0
    x[7, 17] = 3
    x[8] *= np.float32(1000)
    x[9] = np.rint(x[9] * 8) / 8
    return x


def kinds(rows: int, columns: int) -> dict[str, Floats]:
    """Weights (rows, columns) by kind; `columns` is a multiple of 256.

    The same numbers on every machine that draws and rounds as numpy and torch do on x86-64.
    """
    rng = np.random.default_rng(20260801)
    shape = (rows, columns)

    def normal() -> Floats:
        return rng.standard_normal(shape, dtype=np.float32)

    spread = normal() * np.exp2(rng.integers(-40, 14, (rows, columns // 32, 1))).repeat(
        32, axis=2
    ).reshape(shape).astype(np.float32)
    outliers = normal() * np.float32(0.02)
    outliers[np.arange(rows), rng.integers(0, columns, rows)] = rng.choice(
        np.array([-3, 3], np.float32), rows
    )
    constants = np.repeat(rng.choice(normal().ravel(), rows), columns).reshape(shape)
    constants[: rows // 4] = np.float32(0.1)
    signs = np.where(np.arange(columns) % 2 == 0, 1, -1).astype(np.float32)
    sparse = np.where(rng.random(shape) < 0.9, np.float32(0), normal())
    halves = rng.integers(-254, 255, shape).astype(np.float32) / 2
    anchors = rng.choice(np.array([127, -127, 16, -16, 8, -8], np.float32), (rows, columns // 32))
    steps = np.repeat(anchors, 32, axis=1)
    # The anchor makes the scale a whole number, so that rounding meets halves and their neighbours.
    anchored = np.clip(halves, -np.abs(steps), np.abs(steps))
    anchored = np.nextafter(anchored, rng.choice(np.array([-1, 0, 1], np.float32), shape) * steps)
    anchored[:, ::32] = anchors
    return {
        "Gaussian": normal() * np.float32(0.02),
        "Student-t": rng.standard_t(3, shape).astype(np.float32),
        "uniform": rng.uniform(-1, 1, shape).astype(np.float32),
        "positive": np.abs(normal()),
        "negative": -np.abs(normal()) - np.float32(1),
        "bfloat16": torch.from_numpy(normal()).bfloat16().float().numpy(),
        "zeros": zeros(rows, columns),
        "sparse": sparse,
        "constant": constants,
        "alternating": np.abs(constants) * signs,
        "outlier": outliers,
        # Whole and half multiples of a power of two: on, and next to, boundaries of rounding.
        "ties": rng.integers(-32, 33, shape).astype(np.float32) / 2,
        "near ties": np.nextafter(
            rng.integers(-32, 33, shape).astype(np.float32) / 2,
            rng.choice(np.array([-100, 100], np.float32), shape),
        ),
        "anchored ties": anchored,
        # Where a float32 logarithm is a whole number already.
        "below powers of two": np.exp2(rng.integers(-40, 14, (rows, 1))).astype(np.float32)
        * rng.integers(2**24 - 60, 2**24 + 1, shape).astype(np.float32)
        * np.float32(2.0**-24),
        "spread": spread,
        "fp16 underflow": normal() * np.float32(2.0**-24),
        "tiny": normal() * np.exp2(-rng.uniform(40, 145, (rows, 1))).astype(np.float32),
        "denormal": normal() * np.float32(2.0**-140),
    }


def zeros(rows: int, columns: int) -> Floats:
    """Zeros of both signs, in rows of one and of the other, blocks of each, and mixed."""
    x = np.zeros((rows, columns), np.float32)
    x[1::4] = -0.0
    x[2::4, 1::2] = -0.0
    x[3::4, ::2] = -0.0
    return x


def huge(rows: int, columns: int, low: float = 14, high: float = 40) -> Floats:
    """(rows, columns) with maxima from 2**low to 2**high.

    From about 2**19 on, or 2**23 for Q8_0, scales overflow in float16; from about 2**40 on, sums of
    cubes in float32.
    """
    rng = np.random.default_rng(20260802)
    size = np.exp2(np.linspace(low, high, rows))[:, None]
    return (rng.uniform(-1, 1, (rows, columns)) * size).astype(np.float32)


def of_kinds(columns: int, seed: int = 3) -> Floats:
    """Importance (columns,) from 1e-4 to 1e2, a few columns of which no input ever reached."""
    rng = np.random.default_rng(seed)
    found = np.exp(rng.uniform(-9, 4.6, columns)).astype(np.float32)
    found[rng.integers(0, columns, columns // 64)] = 0
    return found


def embedded_weights(rows: int, columns: int) -> Floats:
    """(rows, columns): leading rows of every matrix of the embedded model that is wide enough."""
    found = []
    with safe_open(EMBEDDED, framework="pt") as file:
        for name in sorted(file.keys()):
            shape = file.get_slice(name).get_shape()
            if len(shape) == 2 and shape[1] >= columns:
                found.append(file.get_slice(name)[:rows, :columns].float())
    return np.ascontiguousarray(torch.cat(found).numpy())
