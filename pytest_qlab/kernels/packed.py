"""What every module over packed bits shares: its buffers are the format's, its weight is made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.plain import PlainWeight


class PackedModule(nn.Module):
    """A module that holds a matrix as packed tensors in buffers, so its resident bytes are theirs.

    Args:
        weight: packed, (m, n).
        dtype: the type the matrix is dequantized to.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._format = type(weight)
        self._metadata = weight.metadata()
        self._names = tuple(weight.tensors())
        self._first = f"packed_{self._names[0]}"
        for name, tensor in weight.tensors().items():
            self.register_buffer(f"packed_{name}", tensor)
        # In a list, which neither `buffers()` nor `state_dict()` looks into.
        self._cache: list[Tensor] = []

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, on the device that the module is on."""
        tensors = {name: self.get_buffer(f"packed_{name}") for name in self._names}
        return self._format.from_tensors(tensors, self._metadata)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (m, n), of the module's dtype; for code that asks a module."""
        if self.materialized:
            return self._cache[0]
        packed = self.packed
        if isinstance(packed, PlainWeight):
            return packed.weight.to(self.dtype)
        return packed.dequantize().to(self.dtype)

    @property
    def materialized(self) -> bool:
        """Whether the dequantized weight is kept, on the device that the module is on."""
        if not self._cache:
            return False
        first = self._buffers[self._first]  # which `get_buffer` takes microseconds to find
        return first is not None and self._cache[0].device == first.device

    @property
    def is_plain(self) -> bool:
        """Whether the weight is stored as numbers, not as codes."""
        return self._format is PlainWeight

    def materialize(self) -> None:
        """Keep the dequantized weight for the forwards to come; it is no buffer."""
        self._cache[:] = [self.weight]

    def release(self) -> None:
        """Drop what `materialize` keeps."""
        self._cache.clear()


def set_materialized(model: nn.Module, on: bool) -> None:
    """Materialize or release every packed module of a model."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            if on:
                module.materialize()
            else:
                module.release()
