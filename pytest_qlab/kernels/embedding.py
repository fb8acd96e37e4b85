"""The embedding that keeps its table packed: only the rows that are looked up are dequantized."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.kernels.packed import PackedModule


class PackedEmbedding(PackedModule):
    """Looks up rows of a packed matrix.

    Args:
        weight: packed, (rows, n).
        dtype: of the rows that are given out.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to (..., n)."""
        if self.materialized:
            return embedding(ids, self.weight)
        rows = self.packed.take_rows(ids.reshape(-1)).dequantize().to(self.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self._metadata['format']}"
