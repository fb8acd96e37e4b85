"""`smooth` and `smoothquant`: outliers of the inputs move into the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pytest_qlab.errors import MethodError
from pytest_qlab.methods.base import Bits, Method, QuantizedLayer
from pytest_qlab.methods.configured import Statistic
from pytest_qlab.methods.dynamic import Dynamic
from pytest_qlab.methods.inputs import check_statistics, check_weight
from pytest_qlab.methods.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.methods.blocks import BlockContext, FoldContext

_REFERENCE = "arXiv 2211.10438; mit-han-lab/smoothquant"


class Smooth(Preprocessing):
    """SmoothQuant's scales alone, to be followed by any method.

    Behind every norm, inputs are divided by s = max|x|^alpha / max|W|^(1 - alpha) for each channel,
    and the columns of all layers that read it are multiplied by s. Layers that read no norm, such
    as output and down projections, stay as they are.

    Options:
        alpha: from 0 to 1: how much of the inputs' range the weights take over.
    """

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = "moves the range of inputs behind norms into the weights"
    reference: ClassVar[str] = _REFERENCE
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels"})
    scales_norms: ClassVar[bool] = True

    alpha: float = Field(default=0.5, ge=0, le=1)

    def transform_block(self, block: BlockContext) -> None:
        """Find the scales of all norms on the unchanged block, then apply them.

        Raises:
            MethodError: no norm of the block can take up a scale.
        """
        norms = [fold for fold in block.folds if fold.fold.kind == "norm"]
        if not norms:
            raise MethodError(
                f"smooth finds no norm in block {block.index} whose output is read by linear "
                f"layers alone, so there is nothing to smooth.{_about_type(block)} Take a method "
                "without it, such as dynamic, for this architecture."
            )
        found = [(fold, self._scale(fold)) for fold in norms]
        for fold, scale in found:
            if scale is not None:
                fold.apply(scale)

    def _scale(self, fold: FoldContext) -> Tensor | None:
        """The scale behind a norm, or None if no calibration token has passed it."""
        import torch

        from pytest_qlab.solvers.smooth import smoothing_scale

        weights: list[Tensor] = []
        largest: list[Tensor] = []
        for layer in fold.layers:
            weight = layer.site.weight()
            check_weight(weight, layer.name)
            known = check_statistics(
                layer.statistics, weight, layer.name, self.name, gram=False, channels=True
            )
            weights.append(weight)
            if known.tokens:
                largest.append(torch.maximum(known.maximum, -known.minimum))
        if not largest:
            return None
        return smoothing_scale(weights, torch.stack(largest).amax(0), self.alpha)


def _about_type(block: BlockContext) -> str:
    """What 16 bits may have to do with it: Gemma's norms, which multiply by 1 + weight."""
    if block.hidden is None or block.hidden.dtype.itemsize >= 4:
        return ""
    dtype = str(block.hidden.dtype).removeprefix("torch.")
    return (
        f" Norms that multiply by 1 + weight, as Gemma's, cannot take up a scale in {dtype}, whose "
        "numbers near -1 are too coarse; in float32 (--qlab-dtype=float32) they can."
    )


class SmoothQuant(Method):
    """`smooth`, then weights with a scale for each output channel and inputs with one per token.

    Options:
        bits: of the weights: 2, 3, 4 or 8.
        activation_bits: of the inputs: 4 or 8.
        alpha: from 0 to 1: how much of the inputs' range the weights take over.
    """

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = (
        "inputs behind norms made even, then weights per channel, inputs per token"
    )
    reference: ClassVar[str] = _REFERENCE
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels"})
    cost: ClassVar[float] = 1.5

    bits: Bits = 8
    activation_bits: Literal[4, 8] = 8
    alpha: float = Field(default=0.5, ge=0, le=1)

    def transform_block(self, block: BlockContext) -> None:
        """Smooth the block; see `Smooth`."""
        Smooth(alpha=self.alpha).transform_block(block)

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round the weight, as `dynamic` does; see `Method.quantize`."""
        dynamic = Dynamic(bits=self.bits, activation_bits=self.activation_bits)
        return dynamic.quantize(weight, None, name=name)
