"""Many small operations launched at once: a walk over columns as a CUDA graph.

A solver that rounds one column after the other runs operations that take a GPU a microsecond or
two each, and take Python several to launch. They are the same for every block of columns. So they
are recorded for one block and replayed on the numbers of the others: one launch for a block.
On other devices a walk is simply called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

FEWEST_CALLS = 4
"""Recording runs a block once, launches it once and replays it once more; it pays from here on."""
AGREEMENT = 0.01
"""Relative norm by which a replay may differ: a product summed in another order may round a few
weights the other way."""

Walk = Callable[..., tuple[Tensor, ...]]


class Recording(Protocol):
    """Operations on fixed memory, which can be run again."""

    outputs: tuple[Tensor, ...]

    def replay(self) -> None:
        """Run all of them; results are in `outputs`."""


class CudaRecording:
    """A function of no arguments, captured as a CUDA graph; it must not wait for the device."""

    def __init__(self, function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> None:
        # `torch.cuda.graph` would collect garbage and empty the allocator's cache, for every layer.
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            # Other threads may quantize other layers meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.outputs = function()
            finally:
                self._graph.capture_end()
        current.wait_stream(aside)

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


def recorder(
    device: torch.device,
) -> Callable[[Callable[[], tuple[Tensor, ...]], torch.device], Recording] | None:
    """What records on a device; None where launching costs little."""
    return CudaRecording if device.type == "cuda" else None


class Graphed:
    """A walk that is called for many blocks of the same shape.

    The first call runs the walk, records it, and replays it on the same numbers: where recording
    fails or the replay gives something else, a warning says so, and every call runs the walk.

    Args:
        walk: a function of tensors that returns tensors, what it changes in place included.
        device: of the tensors.
        calls: how many there will be.
    """

    def __init__(self, walk: Walk, device: torch.device, calls: int) -> None:
        self._walk = walk
        self._device = device
        self._record = recorder(device) if calls >= FEWEST_CALLS else None
        self._recording: Recording | None = None
        self._held: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`walk(*inputs)`; inputs may be changed in place or not."""
        if self._record is None or (self._held and not _alike(self._held, inputs)):
            return self._walk(*inputs)
        if self._recording is not None:
            self._fill(inputs)
            self._recording.replay()
            return tuple(each.clone() for each in self._recording.outputs)
        before = tuple(each.clone() for each in inputs)
        found = self._walk(*inputs)
        self._held = tuple(each.clone() for each in before)
        try:
            recording = self._record(lambda: self._walk(*self._held), self._device)
            self._fill(before)
            recording.replay()
            if not all(map(_agree, recording.outputs, found)):
                raise RuntimeError("replayed, it gives other numbers")
            self._recording = recording
        except RuntimeError as error:
            self._record = None
            warnings.warn(
                "Columns are quantized one launch after the other, which is slow on this device: "
                f"their operations could not be recorded ({str(error).splitlines()[0]}).",
                RuntimeWarning,
                stacklevel=3,
            )
        return found

    def _fill(self, inputs: tuple[Tensor, ...]) -> None:
        for held, given in zip(self._held, inputs, strict=True):
            held.copy_(given)


def _alike(held: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> bool:
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(held, given, strict=True))


def _agree(replayed: Tensor, found: Tensor) -> bool:
    wide = found.to(torch.float64)
    off = (replayed.to(torch.float64) - wide).norm()
    return bool(off <= AGREEMENT * wide.norm())
