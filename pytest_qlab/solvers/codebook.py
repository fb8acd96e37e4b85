"""Between a solver, which chooses codes, and a codebook, which says what codes can stand for.

A `Codebook` is fitted to a matrix and gives its `Points`: what each weight can become. A solver
asks for the nearest points of some columns and hands the codes back to be packed. Solvers that know
no more than this (`round_nearest` here, `ldlq`) work with every codebook.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pytest_qlab.formats.base import PackedWeight


class Points(Protocol):
    """What each weight of one matrix (m, n) can become; settled before codes are chosen."""

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes (m, k) of the points nearest to `values` (m, k) in those columns, int64 (k,)."""

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """The points that codes (m, k) of those columns stand for: float32 (m, k)."""

    def pack(self, codes: Tensor) -> PackedWeight:
        """Lay out the codes (m, n) of all columns in their own order."""


class Codebook(Protocol):
    """A rule by which points are fitted to a matrix."""

    def fit(self, weight: Tensor) -> Points:
        """The points for a weight, float32 (m, n)."""


def round_nearest(weight: Tensor, codebook: Codebook) -> PackedWeight:
    """Every weight of (m, n) becomes the nearest point."""
    points = codebook.fit(weight)
    columns = torch.arange(weight.shape[1], device=weight.device)
    return points.pack(points.nearest(weight, columns))
