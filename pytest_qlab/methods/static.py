"""`static`: weights per channel, inputs on one grid whose range calibration has found."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pytest_qlab.methods.base import Bits, Method, QuantizedLayer, Statistic
from pytest_qlab.methods.inputs import check_statistics, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Static(Method):
    """Symmetric weights with a scale for each output channel, inputs with one for the whole tensor.

    The inputs' range is the least and the greatest value seen in calibration. A layer that no
    calibration token has reached, such as an idle expert, has no range: its inputs get one for each
    token at run time, as with `dynamic`.

    Options:
        bits: of the weights: 2, 3, 4 or 8.
        activation_bits: of the inputs: 4 or 8.
    """

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "weights per channel, inputs per tensor with calibrated ranges"
    reference: ClassVar[str] = "Jacob et al., arXiv 1712.05877, sections 2.1 and 3"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels"})

    bits: Bits = 8
    activation_bits: Literal[4, 8] = 8

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round the weight and fix the inputs' grid; see `Method.quantize`."""
        from pytest_qlab.formats.activations import (
            ActivationQuantizer,
            PerTensorAffine,
            PerTokenSymmetric,
        )
        from pytest_qlab.solvers.grid import GridRule, round_to_nearest

        check_weight(weight, name)
        known = check_statistics(statistics, weight, name, self.name, gram=False, channels=True)
        packed = round_to_nearest(weight, GridRule(self.bits, symmetric=True), -1).pack()
        activation: ActivationQuantizer = PerTokenSymmetric(self.activation_bits)
        if known.tokens:
            activation = PerTensorAffine.from_range(
                float(known.minimum.min()), float(known.maximum.max()), self.activation_bits
            )
        return QuantizedLayer(packed, activation)
