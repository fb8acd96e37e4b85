"""A decoder block as a method sees it: its layers, their statistics, and the scale folds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.models.folds import Fold
    from pytest_qlab.models.structure import LinearSite


@dataclass
class LayerContext:
    """One linear layer of a block, m = out_features, n = in_features.

    Attributes:
        name: dotted name in the model.
        site: where the layer is; `site.weight()` is its current weight.
        statistics: of its inputs, once collected.
        quantized: False for a router, which only takes part in folds.
        input_group: layers with the same number read the same input; numbers grow in the order in
            which the block runs them.
        column_scale: [n], what folds have multiplied the weight's columns by; None for 1.
        row_scale: [m], what folds have divided the weight's rows by; None for 1.
    """

    name: str
    site: LinearSite
    statistics: LayerStatistics | None = None
    quantized: bool = True
    input_group: int = 0
    column_scale: Tensor | None = None
    row_scale: Tensor | None = None


@dataclass
class FoldContext:
    """A fold, the layers whose columns it scales, and the layer before them if it is one."""

    fold: Fold
    layers: list[LayerContext]
    previous: LayerContext | None = None

    def apply(self, scale: Tensor) -> None:
        """Divide the previous operation's outputs by `scale` [n], multiply the layers' columns.

        The layers' statistics follow, so that they describe the inputs x / scale, as do the
        gradients of the layer before.
        """
        self.fold.apply(scale)
        for layer in self.layers:
            if layer.statistics is not None:
                layer.statistics = layer.statistics.rescaled(scale)
            known = layer.column_scale
            layer.column_scale = scale if known is None else known * scale
        if self.previous is not None:
            if self.previous.statistics is not None:
                self.previous.statistics = self.previous.statistics.rescaled_rows(scale)
            known = self.previous.row_scale
            self.previous.row_scale = scale if known is None else known * scale


@dataclass
class BlockContext:
    """A decoder block, its quantizable layers in model order, and its folds."""

    index: int
    layers: list[LayerContext]
    folds: list[FoldContext] = field(default_factory=list)
