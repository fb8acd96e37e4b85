"""Packed layers with known numbers, and what they multiply by, made without the formats' code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.formats import ActivationQuantizer, AffineGroups
from pytest_qlab.kernels.linear import PackedLinear

U = 2.0**-8
"""The largest relative error of rounding to bfloat16."""


@dataclass(frozen=True)
class Case:
    """Codes (m, n), scales and zero points (m, G), and the group of every column (n,).

    Zero points in float16 are real ones.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: NDArray[np.int64]
    bits: int
    group_size: int

    def layer(
        self,
        *,
        bias: Tensor | None = None,
        activation: ActivationQuantizer | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> PackedLinear:
        """The layer that dequantizes and multiplies."""
        in_order = np.array_equal(self.groups, np.sort(self.groups))
        packed = AffineGroups.pack(
            self.codes,
            self.scales,
            self.zeros,
            bits=self.bits,
            group_size=self.group_size,
            column_groups=None if in_order else torch.from_numpy(self.groups),
            real_zeros=self.zeros is not None and self.zeros.dtype == torch.float16,
        )
        return PackedLinear(packed, bias, activation, dtype)

    def each(self, values: Tensor) -> NDArray[np.float64]:
        """Numbers of groups (m, G) for every weight, float64 (m, n)."""
        return values.double().numpy()[:, self.groups]

    @property
    def offsets(self) -> NDArray[np.float64]:
        """The zero point of every weight."""
        middle = torch.full(self.scales.shape, 2.0 ** (self.bits - 1))
        return self.each(middle if self.zeros is None else self.zeros)

    @property
    def exact(self) -> NDArray[np.float64]:
        """scale * (code - zero), float64 (m, n)."""
        product: NDArray[np.float64] = self.each(self.scales) * (
            self.codes.double().numpy() - self.offsets
        )
        return product


def random_case(
    rows: int,
    columns: int,
    group_size: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    scattered: bool = False,
    real_zeros: bool = False,
    exact: bool = False,
    seed: int = 0,
) -> Case:
    """Codes and zero points drawn evenly; scales like real ones, or powers of 2 if `exact`.

    Real zero points are quarters, so that products with powers of 2 are exact in bfloat16.
    """
    rng = np.random.default_rng(seed)
    length = columns if group_size == -1 else group_size
    count = -(-columns // length)
    groups = np.arange(columns) // length
    if scattered:
        groups = rng.permutation(groups)
    if exact:
        scales = 2.0 ** rng.integers(-3, 4, (rows, count))
    else:
        scales = rng.uniform(0.001, 0.02, (rows, count))
    zeros = torch.from_numpy(rng.integers(0, 2**bits, (rows, count)).astype(np.uint8))
    if real_zeros:
        zeros = torch.from_numpy(rng.integers(-16, 4 * 2**bits, (rows, count)) / 4).half()
    return Case(
        torch.from_numpy(rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)),
        torch.from_numpy(scales.astype(np.float16)),
        None if symmetric else zeros,
        groups,
        bits,
        group_size,
    )


def normal(rows: int, columns: int, seed: int = 1) -> Tensor:
    """bfloat16 inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
