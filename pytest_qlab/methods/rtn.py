"""`rtn`: round each weight to the nearest point of its group's grid; no calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_qlab.methods.base import Bits, Method, QuantizedLayer
from pytest_qlab.methods.inputs import GroupSize, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Rtn(Method):
    """Group-wise rounding to nearest.

    Options:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or -1 for the whole row. Where it does not divide
            the row, the last group is shorter.
        symmetric: no zero points.
        mse: search the range of each group for the least sum of |error|**2.4.
    """

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest on a grid per group"
    reference: ClassVar[str] = "grids as in IST-DASLab/gptq, quant.py"

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    mse: bool = False

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round the weight; see `Method.quantize`."""
        from pytest_qlab.solvers.grid import GridRule, round_to_nearest

        check_weight(weight, name)
        rule = GridRule(self.bits, symmetric=self.symmetric, mse=self.mse)
        return QuantizedLayer(round_to_nearest(weight, rule, self.group_size).pack())
