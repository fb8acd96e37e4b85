"""Where a method's statistics of the original model's activations come from: the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import load_file, save_file

from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.calibration.stream import BlockStream, input_groups
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears, routers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

INDEX = "layers.json"


class StatisticsSource(Protocol):
    """Gives the statistics of a block's linears, by layer name."""

    def __call__(self, index: int) -> dict[str, LayerStatistics]:
        """Statistics of the linears and routers of block `index`."""


def write_statistics(
    directory: Path,
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    gram: bool,
    threads: int,
    progress: Callable[[str], None],
) -> int:
    """Collect the original model's statistics, one file for each block; returns the forwards run.

    Linears that share an input share the stored tensors.
    """
    blocks = decoder_blocks(model)
    stream = BlockStream(model, [block for _, block in blocks], sequences, threads=threads)
    layers: list[dict[str, int]] = []
    for index, (name, block) in enumerate(blocks):
        progress(f"calibration statistics, block {index + 1}/{len(blocks)}")
        sites = [*quantizable_linears(block, name), *routers(block, name)]
        groups = input_groups(block, stream.call(index), sites)
        statistics = stream.collect(index, block, sites, groups, gram=gram, advance=True)
        by_group = {groups[layer]: found for layer, found in statistics.items()}
        save_file(
            {
                f"{group}.{key}": tensor.contiguous()
                for group, found in by_group.items()
                for key, tensor in found.tensors().items()
            },
            directory / f"block-{index:04d}.safetensors",
        )
        layers.append(groups)
    (directory / INDEX).write_text(json.dumps(layers), encoding="utf-8")
    return stream.forwards


class StoredStatistics:
    """Statistics read from the files that `write_statistics` wrote, one block at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._layers: list[dict[str, int]] = json.loads((directory / INDEX).read_text("utf-8"))

    def __call__(self, index: int) -> dict[str, LayerStatistics]:
        """Statistics of the linears and routers of block `index`."""
        tensors = load_file(self._directory / f"block-{index:04d}.safetensors")
        groups: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            group, _, field = key.partition(".")
            groups.setdefault(int(group), {})[field] = tensor
        loaded = {group: LayerStatistics.from_tensors(found) for group, found in groups.items()}
        return {layer: loaded[group] for layer, group in self._layers[index].items()}
