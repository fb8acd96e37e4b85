"""What a quantization method is: a frozen set of options, and a way to choose codes.

This module imports no torch, so that method specifications can be read, checked and listed while
tests are collected. The tensors' side is imported where a method runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pytest_qlab.methods.configured import Configured, Statistic

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.engines.base import Engine, EngineLoad
    from pytest_qlab.formats.activations import ActivationQuantizer
    from pytest_qlab.formats.base import PackedWeight
    from pytest_qlab.methods.blocks import BlockContext
    from pytest_qlab.methods.pipeline import QuantizedModel
    from pytest_qlab.models.load import LoadedModel

__all__ = ["Bits", "Method", "QuantizedLayer", "Statistic", "Stream"]

Bits = Literal[2, 3, 4, 8]
Stream = Literal["none", "original", "quantized"]


@dataclass(frozen=True)
class QuantizedLayer:
    """What a method returns for one linear layer: its bits and how its inputs are quantized."""

    weight: PackedWeight
    activation: ActivationQuantizer | None = None


class Method(Configured):
    """A quantization method with its options, which carry the field's own names.

    Subclasses declare options as pydantic fields with defaults; equal options make equal, hashable
    methods. `needs` says which calibration statistics are wanted, and `stream` on which inputs they
    are collected: the original model's, or those of a model whose earlier blocks are quantized.

    Class variables:
        stored_dtype: what all parameters that are not quantized are stored in; as the model's own
            checkpoint stores them if None.
        in_all: whether `all` names the method, too.
    """

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    cost: ClassVar[float] = 1.0
    stored_dtype: ClassVar[str | None] = None
    in_all: ClassVar[bool] = True

    @property
    def wanted_statistics(self) -> frozenset[Statistic]:
        """`needs`, for methods that need more or less with certain options."""
        return self.needs

    @property
    def stream(self) -> Stream:
        """The activations that calibration statistics are collected on."""
        return "original" if self.wanted_statistics else "none"

    @property
    def original_statistics(self) -> frozenset[Statistic]:
        """What is wanted of the original model's activations, whatever `stream` is besides."""
        return self.wanted_statistics if self.stream == "original" else frozenset()

    def assign(self, model: nn.Module) -> dict[str, Method]:
        """Which method quantizes which matrix of a model, by the dotted name of its module.

        Every linear layer of the decoder blocks must be among them; the input embedding and the
        output head may be. All linear layers by this method, unless overridden.
        """
        from pytest_qlab.models.structure import all_linears

        return {site.name: self for site in all_linears(model)}

    def import_model(
        self,
        loaded: LoadedModel,
        directory: Path,
        progress: Callable[[str], None],
        statistics: StatisticsSource | None = None,
    ) -> QuantizedModel | None:
        """For methods that bring finished bits: the packed model; None to quantize layer by layer.

        Args:
            loaded: the base model.
            directory: the checkpoint's, empty; what is left there can be read later.
            progress: to be called with a line of text during long work.
            statistics: of the base model's activations, where the method wants any.
        """
        return None

    def engine(self, directory: Path, *, threads: int = 1) -> Engine | None:
        """For methods with a runtime of their own: it, open on a checkpoint's directory.

        Quality and speed are then the engine's; None to run the packed layers in torch. Its
        numbers must not depend on `threads`, which an operation may use.
        """
        return None

    def time_load(
        self, directory: Path, ids: Sequence[int], *, steady: int, threads: int = 1
    ) -> EngineLoad | None:
        """For methods with a runtime of their own: one load of a checkpoint in a fresh process.

        The runtime's files are whatever `import_model` has left in the directory. None where it
        cannot time its loads.

        Args:
            ids: what the first token is generated from.
            steady: how many more times that token is generated, each from an empty cache.
        """
        return None

    def transform_block(self, block: BlockContext) -> None:
        """Change a decoder block in a function-preserving way before its layers are quantized."""

    def groups_of(self, block: BlockContext) -> list[list[str]]:
        """Names of the block's linears in the batches that are quantized between two forwards.

        One batch by default: all layers see statistics of the same forward. Methods that collect
        statistics anew after each sublayer return one batch for each.
        """
        return [[layer.name for layer in block.layers]]

    def quantize(
        self,
        weight: Tensor,
        statistics: LayerStatistics | None,
        *,
        name: str = "",
    ) -> QuantizedLayer:
        """Choose codes for one linear layer.

        Args:
            weight: float32 of shape (out_features, in_features).
            statistics: what `needs` asks for, or None.
            name: the layer's dotted name, for messages.

        It is called for several layers of a block at a time, from different threads.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to quantize a layer")

    def quantize_shared(
        self, weights: Mapping[str, Tensor], statistics: LayerStatistics | None
    ) -> list[QuantizedLayer]:
        """`quantize` for layers that read the same inputs, for methods that save work by it.

        Args:
            weights: float32 of shape (out_features, in_features), by the layers' dotted names.
            statistics: of the inputs of all of them.
        """
        return [self.quantize(weight, statistics, name=name) for name, weight in weights.items()]
