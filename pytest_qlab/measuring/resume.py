"""Forward passes that begin at a decoder block, from hidden states that were kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pytest_qlab.models.structure import decoder_blocks

T = TypeVar("T")


class _Stop(Exception):
    """Ends a forward pass at the point of interest."""


class Resumable:
    """A model whose forwards can skip its first blocks; safe in several threads.

    Everything else (embeddings, masks, what follows the blocks) runs as the model's own code has
    it, so this works for every architecture whose blocks pass on nothing but their output.

    Args:
        model: its blocks' `forward` are replaced; give a copy.
        embeds_once: the input embedding is run only if no block is skipped, and gives zeros
            otherwise, so that its weights need not be there.
    """

    def __init__(self, model: nn.Module, *, embeds_once: bool = False) -> None:
        self._here = threading.local()
        if embeds_once:
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            embedding.forward = self._hollow(embedding, embedding.forward)
        blocks = decoder_blocks(model)
        self.count = len(blocks)
        for index, (_, block) in enumerate(blocks):
            block.forward = self._patched(index, block.forward)

    def _patched(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        here = self._here

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < getattr(here, "start", 0):
                return here.state
            output = original(*args, **kwargs)
            if index == getattr(here, "last", -1):
                here.state = output
                raise _Stop
            return output

        return forward

    def _hollow(
        self, embedding: nn.Module, original: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        weight, here = embedding.get_parameter("weight"), self._here

        def forward(ids: Tensor) -> Tensor:
            if getattr(here, "start", 0) == 0:
                return original(ids)
            return torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype, device=ids.device)

        return forward

    def run(self, forward: Callable[[], T], start: int, state: Any) -> T:
        """`forward()`, the blocks before `start` being skipped.

        Args:
            forward: runs the model.
            start: the first block that runs.
            state: what `boundary` gave for the block before it; unused if `start` is 0.
        """
        self._here.start, self._here.state, self._here.last = start, state, -1
        try:
            return forward()
        finally:
            del self._here.start, self._here.state

    def boundary(self, forward: Callable[[], object], index: int, state: Any) -> Any:
        """What block `index` puts out; `state` is what the block before it did (None for 0)."""
        here = self._here
        here.start, here.state, here.last = index, state, index
        try:
            with suppress(_Stop):
                forward()
            return here.state
        finally:
            here.last = -1
            del here.start, here.state
