"""`hqq`: affine grids whose zero points are real numbers, moved for the least error in l_p."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pytest_qlab.methods.base import Bits, Method, QuantizedLayer
from pytest_qlab.methods.inputs import GroupSize, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Hqq(Method):
    """Half-quadratic quantization.

    Options:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale and zero point, or -1 for the whole row. Where it
            does not divide the row, the last group is shorter.
        optimize: move the zero points; otherwise they are those of the range.
        iterations: the most steps of the search, which ends when the error no longer falls.
        lp_norm: p of the error's norm.
        beta: weight of the splitting's constraint.
    """

    name: ClassVar[str] = "hqq"
    summary: ClassVar[str] = "real zero points by half-quadratic splitting"
    reference: ClassVar[str] = "Badri and Shaji 2023; mobiusml/hqq"
    cost: ClassVar[float] = 1.5

    bits: Bits = 4
    group_size: GroupSize = 64
    optimize: bool = True
    iterations: int = Field(default=20, ge=1)
    lp_norm: float = Field(default=0.7, gt=0, le=1)
    beta: float = Field(default=10.0, gt=0, allow_inf_nan=False)

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Fit and round; see `Method.quantize`."""
        from pytest_qlab.solvers.hqq import HqqRule

        check_weight(weight, name)
        rule = HqqRule(
            self.bits,
            self.group_size,
            optimize=self.optimize,
            iterations=self.iterations,
            lp_norm=self.lp_norm,
            beta=self.beta,
        )
        return QuantizedLayer(rule.pack(weight, rule.solve(weight)))
