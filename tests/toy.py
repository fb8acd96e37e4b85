"""Deterministic test problems, made by a linear congruential generator in exact arithmetic."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SEQUENCES, LENGTH, COLUMNS = 4, 128, 256
DEAD_COLUMN = 37


def uniform(count: int, seed: int) -> NDArray[np.float64]:
    """`count` numbers in [-1, 1): s <- (1664525 s + 1013904223) mod 2^32, upper 24 bits of each."""
    state, states = seed, []
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        states.append(state >> 8)
    return (np.array(states, dtype=np.float64) - 2**23) / 2**23


@cache
def toy_weight(rows: int = 16) -> Tensor:
    """float32 (rows, 256): cubes, so that small weights are frequent."""
    u = uniform(rows * COLUMNS, 11)
    return torch.from_numpy((u * u * u).astype(np.float32)).view(rows, COLUMNS)


@cache
def toy_inputs() -> Tensor:
    """float32 (4 * 128, 256): neighbouring channels correlate, scales differ, column 37 is dead."""
    z = uniform(SEQUENCES * LENGTH * COLUMNS, 22).reshape(-1, COLUMNS)
    x = np.empty_like(z)
    x[:, 0] = z[:, 0]
    for j in range(1, COLUMNS):
        x[:, j] = z[:, j] + 0.6 * x[:, j - 1]
    x *= 1 + (5 * np.arange(COLUMNS)) % 7
    x[:, DEAD_COLUMN] = 0
    return torch.from_numpy(x.astype(np.float32))


def toy_gram() -> Tensor:
    """float32 (256, 256): sum of x x^T."""
    return toy_inputs().T @ toy_inputs()


def relative_output_error(weight: Tensor, approximation: Tensor) -> float:
    """||X (W - Q)^T||^2 / ||X W^T||^2 on the toy inputs, in float64."""
    x = toy_inputs().double()
    error = x @ (weight.double() - approximation.double()).T
    return float(error.square().sum() / (x @ weight.double().T).square().sum())


def digest(tensor: Tensor) -> str:
    """Hex SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
