"""Run one method over a model, block by block: transform, collect, quantize, move on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_qlab.calibration.stream import BlockCall, BlockStream, capture_calls
from pytest_qlab.errors import MethodError
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.blocks import BlockContext, FoldContext, LayerContext
from pytest_qlab.methods.configured import follows_channels
from pytest_qlab.methods.inputs import check_weight
from pytest_qlab.models.folds import discover_folds
from pytest_qlab.models.rotation import LayerRotation, Rotation, attach
from pytest_qlab.models.structure import (
    LinearSite,
    decoder_blocks,
    quantizable_linears,
    routers,
)
from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.methods.base import QuantizedLayer

TRACE_TOKENS = 64


@dataclass
class QuantizedModel:
    """What a method made of a model.

    Attributes:
        layers: the quantized linears of the decoder blocks, by dotted name.
        embeddings: the input embedding and the output head where they are quantized, by the dotted
            names of their modules; tied ones under the input embedding's.
        changed: other parameters whose values are not the base model's, float32, by name.
        stored_dtype: what all other parameters are stored in; None as the base checkpoint has them.
        scales: per layer, what folds multiplied its columns by and divided its rows by.
        rotation: of the hidden states between blocks, if the layers work on rotated ones.
        rotations: per layer, what was rotated after it was scaled.
        kernel: what really runs the bits, where that is not torch.
        seconds: wall time of the whole pass.
        forwards: calibration sequences that were run.
    """

    layers: dict[str, QuantizedLayer]
    embeddings: dict[str, QuantizedLayer] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    stored_dtype: torch.dtype | None = None
    scales: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rotation: Rotation | None = None
    rotations: dict[str, LayerRotation] = field(default_factory=dict)
    kernel: str = ""
    seconds: float = 0.0
    forwards: int = 0


def quantize_model(
    model: nn.Module,
    method: Method,
    sequences: Sequence[Sequence[int]],
    statistics: StatisticsSource | None,
    *,
    threads: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> QuantizedModel:
    """Quantize every matrix that the method assigns; the model itself is not changed.

    Args:
        sequences: calibration token ids, needed by methods with a stream.
        statistics: the original model's, for methods whose stream is `original` or that need its
            gradients.
    """
    started = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad():
        work = copy.deepcopy(model)
        result = Pass(work, method, sequences, statistics, threads, progress).run()
        originals = dict(model.named_parameters())
        weights = {f"{name}.weight" for name in (*result.layers, *result.embeddings)}
        current = {**dict(work.named_parameters()), **result.changed}
        result.changed = {
            name: tensor.detach().float()
            for name, tensor in current.items()
            if name not in weights and not torch.equal(tensor, originals[name])
        }
    result.seconds = time.perf_counter() - started
    return result


class Pass:
    """The working model and what is known while it is quantized."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        sequences: Sequence[Sequence[int]],
        statistics: StatisticsSource | None,
        threads: int,
        progress: Callable[[str], None],
    ) -> None:
        self.model = model
        self.method = method
        self.statistics = statistics
        self.threads = threads
        self.progress = progress
        self.blocks = decoder_blocks(model)
        self.assigned = method.assign(model)
        self.result = self.nothing()
        self.stream: BlockStream | None = None
        self.calls: list[BlockCall] | None = None
        self.traces: list[BlockCall] | None = None
        if method.stream != "none" and not sequences:
            raise MethodError(f"{method.id} needs calibration text, and there is none.")
        if method.stream == "quantized":
            self.stream = self._open_stream(sequences, threads)
            self.calls = [self.stream.call(index) for index in range(len(self.blocks))]
            self.result.forwards = self.stream.forwards
        if self._transforms:
            ids = sequences[0][:TRACE_TOKENS] if sequences else _any_tokens(model)
            self.traces = self._capture(ids)
            self.calls = self.calls or self.traces

    def nothing(self) -> QuantizedModel:
        """What is known before anything was quantized."""
        stored = self.method.stored_dtype
        return QuantizedModel({}, stored_dtype=None if stored is None else getattr(torch, stored))

    @property
    def _transforms(self) -> bool:
        return type(self.method).transform_block is not Method.transform_block

    def _open_stream(self, sequences: Sequence[Sequence[int]], threads: int) -> BlockStream:
        return BlockStream(self.model, self.blocks, sequences, threads=threads)

    def _capture(self, ids: Sequence[int]) -> list[BlockCall]:
        return capture_calls(self.model, self.blocks, ids)

    def run(self) -> QuantizedModel:
        for index, (name, block) in enumerate(self.blocks):
            self.run_block(index, name, block)
        for name, method in self.assigned.items():
            if name not in self.result.layers:
                self.quantize_embedding(name, method)
        return self.result

    def run_block(self, index: int, name: str, block: nn.Module) -> None:
        self.progress(f"{self.method.id}: block {index + 1}/{len(self.blocks)}")
        context = self._context(index, name, block)
        if self._transforms:
            self.method.transform_block(context)
        by_name = {layer.name: layer for layer in context.layers}
        with self._rotating(context, block):
            for batch in self.method.groups_of(context):
                layers = [by_name[layer] for layer in batch]
                if self.stream is not None:
                    self._collect(index, block, layers)
                self._quantize(layers)
            if self.stream is not None and index + 1 < len(self.blocks):
                self.stream.advance(index, block)
        set_materialized(block, False)

    @contextmanager
    def _rotating(self, context: BlockContext, block: nn.Module) -> Iterator[None]:
        """Within, the first block rotates what it is given, and the last its output back."""
        if context.rotation is None:
            yield
            return
        self.result.rotation = context.rotation
        first = context.index == 0
        handles = attach(block, context.rotation, first=first, last=context.last)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def quantize_embedding(self, name: str, method: Method) -> None:
        self.progress(f"{self.method.id}: {name}")
        weight = self.model.get_submodule(name).get_parameter("weight")
        copy_of_it = weight.detach().to(torch.float32, copy=True)
        check_weight(copy_of_it, name)
        self.result.embeddings[name] = method.quantize(copy_of_it, None, name=name)

    def _context(self, index: int, name: str, block: nn.Module) -> BlockContext:
        sites = quantizable_linears(block, name)
        gates = routers(block, name)
        known = self.statistics(index) if self.statistics is not None else {}
        groups = {} if self.calls is None else self.calls[index].groups

        def layer(site: LinearSite, quantized: bool) -> LayerContext:
            found = known.get(site.name)
            if found is not None:
                found = found.to(site.stored.device)
            return LayerContext(site.name, site, found, quantized, groups.get(site.name, 0))

        context = BlockContext(index, [layer(site, True) for site in sites])
        if self.traces is not None:
            context.routers = [layer(site, False) for site in gates]
            everything = {each.name: each for each in (*context.layers, *context.routers)}
            trace = self.traces[index]
            context.module, context.name = block, name
            context.last = index + 1 == len(self.blocks)
            context.hidden, context.run = trace.hidden, lambda hidden: trace(block, hidden)
            found = discover_folds(block, lambda: trace(block, trace.hidden), sites, name)
            context.folds = [
                FoldContext(
                    fold, [everything[each] for each in fold.layers], everything.get(fold.previous)
                )
                for fold in found
            ]
        return context

    def _collect(self, index: int, block: nn.Module, layers: list[LayerContext]) -> None:
        assert self.stream is not None
        wanted = self.method.wanted_statistics
        found = self.stream.collect(
            index,
            block,
            [layer.site for layer in layers],
            gram="gram" in wanted,
            channels=follows_channels(wanted),
        )
        for layer in layers:
            # Gradients are the original model's, whatever the stream.
            fisher = None if layer.statistics is None else layer.statistics.fisher
            collected = found[layer.name].to(layer.site.stored.device)
            layer.statistics = replace(collected, fisher=fisher)

    def _quantize(self, layers: list[LayerContext]) -> None:
        """Quantize some layers, those that a method can solve together in one call of it."""
        together: dict[Any, list[LayerContext]] = {}
        for layer in layers:
            # Of the original model each layer has its own statistics, which folds may have changed;
            # and gradients are each layer's own.
            alone = self.stream is None or "fisher" in self.method.wanted_statistics
            inputs = layer.name if alone else layer.input_group
            together.setdefault((self.assigned[layer.name], inputs), []).append(layer)

        def solve(shared: list[LayerContext]) -> list[QuantizedLayer]:
            weights = {layer.name: layer.site.weight() for layer in shared}
            for name, weight in weights.items():
                check_weight(weight, name)
            return self.assigned[shared[0].name].quantize_shared(weights, self._told(shared[0]))

        tasks = list(together.values())
        found = {
            layer.name: quantized
            for shared, solved in zip(tasks, ordered_map(solve, tasks, self.threads), strict=True)
            for layer, quantized in zip(shared, solved, strict=True)
        }
        for layer in layers:
            self._keep(layer, found[layer.name])

    def _told(self, layer: LayerContext) -> LayerStatistics | None:
        """What is known of a layer's inputs, and the method asks for, whoever else has."""
        known = layer.statistics
        if known is None or follows_channels(self.method.wanted_statistics):
            return known
        return replace(known, channels=None)

    def _keep(self, layer: LayerContext, quantized: QuantizedLayer) -> None:
        self.result.layers[layer.name] = quantized
        if layer.site.bias is not None:
            self.result.changed[f"{layer.name}.bias"] = layer.site.bias
        scales = {"column": layer.column_scale, "row": layer.row_scale}
        kept = {key: scale for key, scale in scales.items() if scale is not None}
        if kept:
            self.result.scales[layer.name] = kept
        if layer.rotation is not None:
            self.result.rotations[layer.name] = layer.rotation
        if self.stream is not None:
            self._install(layer.site, quantized)

    def _install(self, site: LinearSite, quantized: QuantizedLayer) -> None:
        """Let later layers see this one's errors."""
        module = PackedLinear(
            quantized.weight, site.bias, quantized.activation, next(self.model.parameters()).dtype
        )
        module.materialize()
        site.replace(self.model, module)


def _any_tokens(model: Any) -> range:
    """A few different token ids, to trace a model for a method that calibrates on nothing."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return range(min(TRACE_TOKENS, rows))


def describe_layer(layer: QuantizedLayer) -> dict[str, Any]:
    """The JSON side of a quantized layer: how its tensors are to be read."""
    return {
        "weight": layer.weight.metadata(),
        "activation": None if layer.activation is None else layer.activation.metadata(),
    }
