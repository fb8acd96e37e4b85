"""Calibration sequences as they travel through a model, one decoder block at a time.

A block's inputs are its hidden state, which depends on the blocks before it, and everything else
(masks, rotary embeddings), which does not. The latter is captured once, and with it which of its
linears read the same input; the former is kept for all sequences and moved on block by block, so
that a block can see what quantized blocks before it make.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pytest_qlab.calibration.statistics import Accumulator, LayerStatistics
from pytest_qlab.errors import ModelError
from pytest_qlab.models.structure import LinearSite, quantizable_linears, routers
from pytest_qlab.parallel import ordered_map

TOGETHER, SHARES = 4, 8  # sequences of a share at most, shares at least


class _Stop(Exception):
    """Ends a forward pass at the point of interest."""


class BlockCall:
    """How a model calls one of its blocks: everything but the hidden state.

    Attributes:
        hidden: the hidden state that the block was given when the call was captured.
        groups: of the linears and routers of the block, by name, the number of the input they read,
            in the order in which they run. Those that read the same tensor have the same number;
            one that does not run, such as an expert that no token is routed to, has its own.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.groups: dict[str, int] = {}
        if args:
            self.hidden: Tensor = args[0]
            self._args, self._kwargs, self._keyword = args[1:], dict(kwargs), ""
        elif "hidden_states" in kwargs:
            rest = dict(kwargs)
            self.hidden = rest.pop("hidden_states")
            self._args, self._kwargs, self._keyword = (), rest, "hidden_states"
        else:
            raise ModelError(
                "This model's decoder blocks do not take their hidden state as the first argument "
                "or as 'hidden_states', so calibration cannot follow it. Use a method without "
                "calibration, such as rtn."
            )

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden state for an input of the captured shape."""
        if self._keyword:
            output = block(**{self._keyword: hidden}, **self._kwargs)
        else:
            output = block(hidden, *self._args, **self._kwargs)
        return output if isinstance(output, Tensor) else output[0]


def capture_calls(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    ids: Sequence[int],
    make: Callable[[tuple[Any, ...], dict[str, Any]], BlockCall] = BlockCall,
) -> list[BlockCall]:
    """Run the model on one sequence and record how each block is called, with `make`.

    The output head, which may be larger than any block, is not run.

    Raises:
        ModelError: the blocks do not run one after the other, each of them once, or do not take
            their hidden state where blocks do.
    """
    calls: list[BlockCall] = []
    inputs: list[Tensor] = []  # of the linears of the block that runs

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.clear()
        calls.append(make(args, kwargs))

    def read(name: str, tensor: Tensor) -> None:
        if not calls:
            return
        for number, known in enumerate(inputs):
            if known is tensor:
                calls[-1].groups[name] = number
                return
        calls[-1].groups[name] = len(inputs)
        inputs.append(tensor)

    def stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        if len(calls) == len(blocks):
            raise _Stop

    sites = [[*quantizable_linears(block, name), *routers(block, name)] for name, block in blocks]
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for _, block in blocks] + [
        site.module.register_forward_pre_hook(
            lambda _module, args, name=site.name: read(name, args[0])
        )
        for of_block in sites
        for site in of_block
    ]
    find_head = getattr(model, "get_output_embeddings", None)
    if callable(find_head) and (head := find_head()) is not None:
        handles.append(head.register_forward_pre_hook(stop, prepend=True))
    try:
        with torch.inference_mode(), suppress(_Stop):
            model(input_ids=_batch(model, ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(blocks):
        raise ModelError(
            f"The model has {len(blocks)} decoder blocks but ran {len(calls)} of them in one "
            "forward pass, so calibration cannot follow its hidden state. Use a method without "
            "calibration, such as rtn."
        )
    for call, of_block in zip(calls, sites, strict=True):
        for site in of_block:
            call.groups.setdefault(site.name, max(call.groups.values(), default=-1) + 1)
    return calls


def _batch(model: nn.Module, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=next(model.parameters()).device)


class States(Protocol):
    """Hidden states of the sequences in their order, as they are made."""

    def append(self, state: Tensor, /) -> None:
        """Add the next sequence's."""

    def __iter__(self) -> Iterator[Tensor]:
        """All of them."""


class BlockStream:
    """The hidden states of all calibration sequences in front of one block.

    Args:
        model: whose embeddings make the first hidden states.
        blocks: its decoder blocks in order, with their names.
        sequences: token ids, all of one length.
        threads: how many sequences run at the same time.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        sequences: Sequence[Sequence[int]],
        *,
        threads: int = 1,
    ) -> None:
        self.forwards = len(sequences)
        self._threads = threads
        self._calls = capture_calls(model, blocks, sequences[0])
        self._hidden = self._embed(model, blocks[0][1], sequences)

    def _states(self, index: int) -> States:
        """An empty place for the hidden states in front of block `index`."""
        return []

    def _embed(
        self, model: nn.Module, first: nn.Module, sequences: Sequence[Sequence[int]]
    ) -> States:
        here = threading.local()

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            here.hidden = BlockCall(args, kwargs).hidden
            raise _Stop

        def run(ids: Sequence[int]) -> Tensor:
            with suppress(_Stop):
                model(input_ids=_batch(model, ids), use_cache=False)
            hidden: Tensor = here.hidden
            return hidden

        handle = first.register_forward_pre_hook(keep, with_kwargs=True)
        states = self._states(0)
        try:
            for hidden in ordered_map(run, sequences, self._threads):
                states.append(hidden)
        finally:
            handle.remove()
        return states

    def call(self, index: int) -> BlockCall:
        """How block `index` is called."""
        return self._calls[index]

    def collect(
        self,
        index: int,
        block: nn.Module,
        sites: Sequence[LinearSite],
        *,
        gram: bool,
        channels: bool = True,
        advance: bool = False,
    ) -> dict[str, LayerStatistics]:
        """Statistics of the inputs of `sites` over all sequences; one object per shared input.

        `gram` and `channels` are those of `Accumulator`.
        `advance` also moves the hidden states on, for a block that does not change in between.
        Otherwise a forward ends at the last of the sites, once a whole one has shown that the block
        runs each of them once.
        """
        groups = self._calls[index].groups
        first_of = {groups[site.name]: site for site in reversed(sites)}

        def empty() -> dict[int, Accumulator]:
            return {
                number: Accumulator(site.in_features, gram=gram, channels=channels)
                for number, site in first_of.items()
            }

        here = threading.local()
        names = sorted(site.name for site in sites)
        once: list[bool] = []  # of whole forwards: whether each site ran once

        def run(share: list[Tensor]) -> tuple[dict[int, Accumulator], list[Tensor]]:
            here.parts = empty()
            outputs = []
            for hidden in share:
                here.seen = []
                with suppress(_Stop):
                    output = self._calls[index](block, hidden)
                    once.append(sorted(here.seen) == names)
                    if advance:
                        outputs.append(output)
            return here.parts, outputs

        def see(site: LinearSite, inputs: Tensor) -> None:
            number = groups[site.name]
            if site is first_of[number]:
                here.parts[number].add(inputs)
            here.seen.append(site.name)
            if not advance and once and once[0] and len(here.seen) == len(names):
                raise _Stop

        handles = [
            site.module.register_forward_pre_hook(
                lambda _module, args, site=site: see(site, args[0])
            )
            for site in sites
        ]
        totals = empty()
        states = self._states(index + 1)
        try:
            for parts, outputs in ordered_map(run, self._shares(), self._threads):
                for output in outputs:
                    states.append(output)
                for number, part in parts.items():
                    totals[number].merge(part)
        finally:
            for handle in handles:
                handle.remove()
        if advance:
            self._hidden = states
        # One after the other out of the way, because a result is as large as what it is made of.
        results = {number: totals.pop(number).result() for number in list(totals)}
        return {site.name: results[groups[site.name]] for site in sites}

    def _shares(self) -> Iterator[list[Tensor]]:
        """The hidden states, a few sequences at a time, the same whatever the threads.

        Within a share statistics go into the same sums; of different shares they are merged, which
        takes as long as some of the products that they are made of.
        """
        size = min(max(self.forwards // SHARES, 1), TOGETHER)
        states = iter(self._hidden)
        while share := list(islice(states, size)):
            yield share

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the outputs of block `index`."""
        call = self._calls[index]
        outputs = self._states(index + 1)
        for output in ordered_map(lambda hidden: call(block, hidden), self._hidden, self._threads):
            outputs.append(output)
        self._hidden = outputs
