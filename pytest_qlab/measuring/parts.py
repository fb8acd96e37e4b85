"""A model whose weights are read part by part while it runs: the base model, or a candidate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_qlab.checkpoint import (
    place_embedding,
    place_layers,
    structural_copy,
    tied_to,
)
from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.models.head import head_module
from pytest_qlab.models.lazy import restored
from pytest_qlab.models.rotation import attach_to_model
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears

if TYPE_CHECKING:
    from pytest_qlab.checkpoint import Checkpoint
    from pytest_qlab.models.lazy import LazyModel


class Parts(ABC):
    """The structure of a model, and what puts the weights of one part at a time into it.

    Args:
        lazy: the base model.

    Attributes:
        model: a copy of its structure, parameters on the meta device.
        device: where parts are put.
        count: of its decoder blocks.
        vocabulary: rows of its output head.
    """

    def __init__(self, lazy: LazyModel) -> None:
        self._lazy = lazy
        self.device = lazy.device
        self.model: Any = structural_copy(lazy.model)
        self._blocks = decoder_blocks(self.model)
        self.count = len(self._blocks)
        # Found now: a packed module may stand in their places later.
        names = {each: name for name, each in self.model.named_modules()}
        self._embedding = names[self.model.get_input_embeddings()]
        head = head_module(self.model)
        self._head = names[head]
        self.vocabulary: int = head.get_parameter("weight").shape[0]

    @abstractmethod
    def _resident(self, name: str, *, alone: bool) -> AbstractContextManager[None]:
        """Within, the parameters of a module are real, or (`alone`) those that it owns itself."""

    def block(self, index: int) -> AbstractContextManager[None]:
        """Within, that decoder block can be run."""
        return self._resident(self._blocks[index][0], alone=False)

    def embedding(self) -> AbstractContextManager[None]:
        """Within, the input embedding can be run."""
        return self._resident(self._embedding, alone=True)

    def head(self) -> AbstractContextManager[None]:
        """Within, the output head can be run."""
        return self._resident(self._head, alone=True)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Within, all else can be run: norms after the blocks, positions."""
        with ExitStack() as stack:
            for name, _ in self._lazy.outside:
                if name not in (self._embedding, self._head):
                    stack.enter_context(self._resident(name, alone=True))
            yield


class BaseParts(Parts):
    """The base model, from its files."""

    def _resident(self, name: str, *, alone: bool) -> AbstractContextManager[None]:
        return self._lazy.resident(self.model.get_submodule(name), alone=alone)


class PackedParts(Parts):
    """A candidate, from its checkpoint, which holds every parameter.

    Packed weights are dequantized once when their part is read, as `instantiate`d ones are for an
    evaluation.
    """

    def __init__(self, lazy: LazyModel, checkpoint: Checkpoint) -> None:
        super().__init__(lazy)
        self._checkpoint = checkpoint
        self._like = torch.empty(0, dtype=next(self.model.parameters()).dtype, device=lazy.device)
        # A head that is tied to a quantized embedding is packed as that is.
        self._packed = {
            place: name
            for name in checkpoint.index["embeddings"]
            for place in (name, *tied_to(self.model, name))
        }
        if checkpoint.rotation is not None:
            attach_to_model(self.model, checkpoint.rotation)

    @contextmanager
    def _resident(self, name: str, *, alone: bool) -> Iterator[None]:
        module = self.model.get_submodule(name)
        parent = self.model.get_submodule(name.rpartition(".")[0])
        modules = [module] if alone else list(module.modules())
        with restored([parent, *modules]), torch.no_grad():
            self._fill(modules)
            if not alone:
                sites = quantizable_linears(module, name)
                layers = self._checkpoint.layers({site.name for site in sites})
                place_layers(self.model, sites, layers, self._like)
            elif name in self._packed:
                packed = self._packed[name]
                layer = self._checkpoint.embeddings({packed})[packed]
                place_embedding(self.model, name, layer, self._like)
            set_materialized(self.model.get_submodule(name), True)
            yield

    def _fill(self, modules: Sequence[nn.Module]) -> None:
        """Put in all parameters that are not packed."""
        places = [
            (self._lazy.name_of(parameter), module, attribute)
            for module in modules
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        ]
        found = self._checkpoint.others({name for name, _, _ in places})
        for name, module, attribute in places:
            if name in found:
                value = found[name].to(module.get_parameter(attribute).dtype).to(self.device)
                module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
