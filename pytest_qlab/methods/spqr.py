"""`spqr`: small groups with quantized scales, GPTQ, and outliers kept as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pytest_qlab.methods.base import Bits, Method, QuantizedLayer, Statistic, Stream
from pytest_qlab.methods.inputs import GroupSize, check_statistics, check_weight, solving

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Spqr(Method):
    """SpQR on the inputs that the quantized blocks before produce.

    Options:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or -1 for the whole row. Where it does not divide
            the row, the last group is shorter.
        statistic_bits: width of the code of a scale or zero point: 2, 3, 4 or 8.
        statistic_group_size: rows whose scales share a range.
        outlier_threshold: the squared error of a weight that makes it an outlier, as a share of the
            mean variance of a column, both in terms of the layer's output. More is fewer outliers.
        leave_one_out: fit each grid without the weights that spoil it.
        desc_act: act-order: columns with the most active inputs first, groups in that order.
        damp_percent: share of the Gram matrix's mean diagonal that is added to its diagonal; raised
            in steps while below 1 where the matrix cannot be factored.
    """

    name: ClassVar[str] = "spqr"
    summary: ClassVar[str] = "tiny groups with quantized scales, second-order, outliers kept"
    reference: ClassVar[str] = "arXiv 2306.03078; Vahe1994/SpQR"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"gram"})
    cost: ClassVar[float] = 15.0

    bits: Bits = 3
    group_size: GroupSize = 16
    statistic_bits: Bits = 3
    statistic_group_size: int = Field(default=16, ge=1)
    outlier_threshold: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    leave_one_out: bool = True
    desc_act: bool = True
    damp_percent: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def stream(self) -> Stream:
        """Each block is calibrated on the outputs of the quantized blocks before it."""
        return "quantized"

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Solve one layer; all inputs count alike if no calibration token has reached it."""
        (layer,) = self.quantize_shared({name: weight}, statistics)
        return layer

    def quantize_shared(
        self, weights: Mapping[str, Tensor], statistics: LayerStatistics | None
    ) -> list[QuantizedLayer]:
        """Solve layers that read the same inputs with one factorization of their Gram matrix."""
        from pytest_qlab.solvers.spqr import SpqrRule, spqr_solve_shared

        for name, weight in weights.items():
            check_weight(weight, name)
            known = check_statistics(statistics, weight, name, self.name, gram=True)
        rule = SpqrRule(
            self.bits,
            self.group_size,
            self.statistic_bits,
            self.statistic_group_size,
            self.outlier_threshold,
            self.leave_one_out,
        )
        with solving("SpQR", weights, known.tokens):
            solutions = spqr_solve_shared(
                list(weights.values()),
                known.gram if known.tokens else None,
                rule,
                desc_act=self.desc_act,
                damp_percent=self.damp_percent,
            )
        return [QuantizedLayer(solution.pack()) for solution in solutions]
