"""`none`: the identity, through the same path as every other method."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_qlab.methods.base import Method, QuantizedLayer
from pytest_qlab.methods.inputs import check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Identity(Method):
    """Keep every weight as it is, in the narrowest type that holds it exactly."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "no quantization: the reference point of every table"
    cost: ClassVar[float] = 0.1

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Store the weight; see `Method.quantize`."""
        from pytest_qlab.formats.plain import PlainWeight

        check_weight(weight, name)
        return QuantizedLayer(PlainWeight.lossless(weight))
