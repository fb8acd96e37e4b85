"""A decoder block as a method sees it: its layers, their statistics, and the scale folds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_qlab.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.models.folds import Fold
    from pytest_qlab.models.rotation import LayerRotation, Rotation
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
        rotation: of its inputs and outputs, after all scales; None if it is not rotated.
    """

    name: str
    site: LinearSite
    statistics: LayerStatistics | None = None
    quantized: bool = True
    input_group: int = 0
    column_scale: Tensor | None = None
    row_scale: Tensor | None = None
    rotation: LayerRotation | None = None


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

        Raises:
            MethodError: a layer has been rotated, so that its columns are no channels any more.
        """
        for layer in (*self.layers, *([] if self.previous is None else [self.previous])):
            if layer.rotation is not None:
                raise MethodError(
                    f"{layer.name} is rotated already, and its channels cannot be scaled any more. "
                    "Put what scales channels in front of the rotation."
                )
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
    """A decoder block, its quantizable layers in model order, and its folds.

    Attributes:
        index: of the block in the model.
        routers: layers that take part in folds and are not quantized.
        module: the block itself.
        name: its dotted name in the model.
        last: whether it is the model's last one.
        run: gives the block's output for hidden states of `hidden`'s shape.
        hidden: the block's input for a few tokens in the model as it was, (1, tokens, width).
        rotation: of the hidden states between blocks, if the block works on rotated ones.
    """

    index: int
    layers: list[LayerContext]
    folds: list[FoldContext] = field(default_factory=list)
    routers: list[LayerContext] = field(default_factory=list)
    module: nn.Module | None = None
    name: str = ""
    last: bool = False
    run: Callable[[Tensor], Tensor] | None = None
    hidden: Tensor | None = None
    rotation: Rotation | None = None
