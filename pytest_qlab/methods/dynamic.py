"""`dynamic`: weights per channel, inputs per token at run time; no calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pytest_qlab.methods.base import Bits, Method, QuantizedLayer
from pytest_qlab.methods.inputs import check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Dynamic(Method):
    """Symmetric weights with a scale for each output channel, inputs with one for each token.

    Options:
        bits: of the weights: 2, 3, 4 or 8.
        activation_bits: of the inputs: 4 or 8.
    """

    name: ClassVar[str] = "dynamic"
    summary: ClassVar[str] = "weights per channel, inputs per token with ranges found at run time"
    reference: ClassVar[str] = "ZeroQuant's token-wise activations, arXiv 2206.01861, section 4.1"

    bits: Bits = 8
    activation_bits: Literal[4, 8] = 8

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round the weight; see `Method.quantize`."""
        from pytest_qlab.formats.activations import PerTokenSymmetric
        from pytest_qlab.solvers.grid import GridRule, round_to_nearest

        check_weight(weight, name)
        packed = round_to_nearest(weight, GridRule(self.bits, symmetric=True), -1).pack()
        return QuantizedLayer(packed, PerTokenSymmetric(self.activation_bits))
