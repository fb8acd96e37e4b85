"""Where a method's statistics of the original model's activations come from: the store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import load_file, save_file

from pytest_qlab.calibration.spilled import SpilledStream
from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.calibration.stream import BlockStream
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears, routers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from pytest_qlab.models.lazy import LazyModel

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
    stream = BlockStream(model, blocks, sequences, threads=threads)
    layers: list[dict[str, int]] = []
    for index, (name, block) in enumerate(blocks):
        progress(f"calibration statistics, block {index + 1}/{len(blocks)}")
        layers.append(_write_block(directory, stream, index, name, block, gram=gram))
    (directory / INDEX).write_text(json.dumps(layers), encoding="utf-8")
    return stream.forwards


def write_statistics_streamed(
    directory: Path,
    lazy: LazyModel,
    sequences: Sequence[Sequence[int]],
    *,
    gram: bool,
    threads: int,
    progress: Callable[[str], None],
) -> int:
    """`write_statistics`, to the bit, of a model that is read block by block.

    If it is killed, another call with the same directory goes on at the block that it was at.
    """
    scratch = directory / "stream"
    if (directory / INDEX).exists():
        shutil.rmtree(scratch, ignore_errors=True)
        return len(sequences)
    scratch.mkdir(exist_ok=True)
    known = [json.loads(file.read_text("utf-8")) for file in sorted(scratch.glob("block-*.json"))]
    blocks = lazy.blocks
    if len(known) < len(blocks):
        stream = SpilledStream(lazy, sequences, scratch, start=len(known), threads=threads)
        for index in range(len(known), len(blocks)):
            progress(f"calibration statistics, block {index + 1}/{len(blocks)}")
            name, block = blocks[index]
            with lazy.resident(block):
                groups = _write_block(directory, stream, index, name, block, gram=gram)
            stream.settle()
            known.append(groups)
            _record(scratch / f"block-{index:04d}.json", groups)
            stream.forget(index)
    _record(directory / INDEX, known)
    shutil.rmtree(scratch)
    return len(sequences)


def _record(file: Path, value: Any) -> None:
    """Write a JSON file, all of it or nothing."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(file)


def _write_block(
    directory: Path, stream: BlockStream, index: int, name: str, block: nn.Module, *, gram: bool
) -> dict[str, int]:
    """Collect and store one block's statistics, and move the stream on; returns the groups."""
    sites = [*quantizable_linears(block, name), *routers(block, name)]
    groups = stream.call(index).groups
    statistics = stream.collect(index, block, sites, gram=gram, advance=True)
    by_group = {groups[layer]: found for layer, found in statistics.items()}
    save_file(
        {
            f"{group}.{key}": tensor.contiguous().cpu()
            for group, found in by_group.items()
            for key, tensor in found.tensors().items()
        },
        directory / f"block-{index:04d}.safetensors",
    )
    return groups


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
