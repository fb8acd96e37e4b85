"""How much the loss depends on each weight: squared gradients of the original model, stored.

The diagonal of the empirical Fisher matrix, as SqueezeLLM takes it (arXiv 2306.07629, section 4.1):
F_ij is the sum over calibration sequences of (dL_s / dw_ij)**2, where L_s is the mean cross entropy
of sequence s. The gradient is squared once for each sequence, not for each token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from pytest_qlab.errors import MethodError
from pytest_qlab.finite import is_finite
from pytest_qlab.machine import available_memory
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears
from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.calibration.statistics import LayerStatistics

HALF_LOSS_SCALE = 2.0**10
"""Of losses in float16, whose least number is 6e-8: most gradients of a mean loss are below it."""
SHARE = 0.5


def write_gradients(
    directory: Path,
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    threads: int,
    progress: Callable[[str], None],
) -> int:
    """Sum up the squared gradients of all quantizable weights, one file for each block.

    Up to `threads` sequences run at a time, each with its own gradients, or fewer where the machine
    has no room for that. They are added in the order of the sequences, so that the sums do not
    depend on it. They are float32: a gradient below 1e-19 squares to 0, and would not be seen
    beside the others either.

    Returns:
        the number of forward passes.

    Raises:
        MethodError: the gradients cannot be computed, or are not finite.
    """
    if not sequences or len(sequences[0]) < 2:
        raise MethodError(
            "Gradients of the loss need calibration sequences of at least 2 tokens. Give more "
            "calibration text, or raise --qlab-calibration-length."
        )
    blocks = [(name, quantizable_linears(block, name)) for name, block in decoder_blocks(model)]
    weights = [site.stored for _, sites in blocks for site in sites]
    at_once = min(threads, _sequences_that_fit(weights))
    with torch.inference_mode(False), torch.no_grad(), _gradients_only_for(model, weights):
        totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for start in range(0, len(sequences), at_once):
            progress(f"gradients, sequence {start + 1}/{len(sequences)}")
            # A batch at a time, so that no finished gradients pile up.
            for gradients in ordered_map(
                lambda ids: _gradients(model, weights, ids),
                sequences[start : start + at_once],
                at_once,
            ):
                for total, gradient in zip(totals, gradients, strict=True):
                    if gradient is not None:  # else an expert that no token was routed to
                        total.addcmul_(gradient, gradient)
    found = iter(totals)
    for index, (_, sites) in enumerate(blocks):
        squares = {}
        for site in sites:
            total = next(found)
            if not is_finite(total):
                raise MethodError(
                    f"The gradients of {site.name} on the calibration text are not finite. Run the "
                    "model in float32 (--qlab-dtype=float32) and see that its loss is finite."
                )
            squares[site.name] = (total.t() if site.transposed else total).contiguous().cpu()
        save_file(squares, directory / f"block-{index:04d}.safetensors")
    return len(sequences)


def _gradients(
    model: nn.Module, weights: Sequence[Tensor], ids: Sequence[int]
) -> list[Tensor | None]:
    """Gradients of a sequence's mean cross entropy, float32, in the layout of the weights."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            batch = torch.tensor([list(ids)], device=weights[0].device)
            logits = model(input_ids=batch, use_cache=False).logits
            loss = cross_entropy(logits[0, :-1].float(), batch[0, 1:])
            scale = HALF_LOSS_SCALE if logits.dtype == torch.float16 else 1.0
            found = torch.autograd.grad(scale * loss, weights, allow_unused=True)
        return [None if each is None else each.float().div_(scale) for each in found]
    except RuntimeError as error:
        raise MethodError(
            f"The gradients of {type(model).__name__} cannot be computed: {error}. Choose a method "
            "that needs none, such as gptq; if memory was short, fewer threads or shorter "
            "sequences (--qlab-calibration-length) need less."
        ) from error


def _sequences_that_fit(weights: Sequence[Tensor]) -> int:
    """How many sequences' gradients there is room for, at least 1."""
    if weights[0].device.type != "cpu":
        return 1
    room = available_memory()
    if room is None:
        return sys.maxsize
    # While they are computed in the weights' dtype and turned into float32.
    nbytes = sum(weight.numel() * (4 + weight.element_size()) for weight in weights)
    return max(1, int(SHARE * room / nbytes))


@contextmanager
def _gradients_only_for(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


class StoredGradients:
    """Squared gradients read from the files that `write_gradients` wrote, one block at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Of the linears of block `index`, by layer name: float32 (out_features, in_features)."""
        return load_file(self._directory / f"block-{index:04d}.safetensors")


class WithGradients:
    """A source of statistics that have the squared gradients as well."""

    def __init__(self, statistics: StatisticsSource, gradients: StoredGradients) -> None:
        self._statistics = statistics
        self._gradients = gradients

    def __call__(self, index: int) -> dict[str, LayerStatistics]:
        """Statistics of the linears and routers of block `index`."""
        gradients = self._gradients(index)
        return {
            name: replace(known, fisher=gradients.get(name))
            for name, known in self._statistics(index).items()
        }
