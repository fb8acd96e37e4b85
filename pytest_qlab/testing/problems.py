"""Weights and inputs to quantize: made by a seed, the same on every machine but for rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_qlab.calibration.statistics import Accumulator

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


def gaussian_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """float32 (rows, columns) of independent standard normal numbers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def toy_problem(rows: int, columns: int, seed: int = 0, tokens: int = 256) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns), and inputs (tokens, columns) that are correlated and of many sizes.

    Neighbouring channels have much in common, and one in sixteen is ten times as large.
    """
    weight = gaussian_weight(rows, columns, seed)
    weight = weight * (1 + weight.abs())  # Heavier tails than normal, as weights have.
    noise = gaussian_weight(tokens, columns, seed + 1)
    inputs = noise + 0.7 * noise.roll(1, dims=1)
    inputs[:, ::16] *= 10
    return weight, inputs


def statistics_of(inputs: Tensor, *, gram: bool = True, channels: bool = True) -> LayerStatistics:
    """What calibration knows after it has seen `inputs`, float32 (tokens, columns)."""
    accumulator = Accumulator(inputs.shape[-1], gram=gram, channels=channels)
    accumulator.add(inputs)
    return accumulator.result()
