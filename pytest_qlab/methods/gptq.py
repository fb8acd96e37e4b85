"""`gptq`: codes chosen column by column, each error made good by the columns after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pytest_qlab.methods.base import Bits, Method, QuantizedLayer, Statistic, Stream
from pytest_qlab.methods.inputs import GroupSize, check_statistics, check_weight, solving

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.methods.blocks import BlockContext


class Gptq(Method):
    """GPTQ on the inputs that the quantized blocks before produce.

    The defaults are the recipe that is best without cost at run time: act-order with static groups.
    `desc_act` without `static_groups` stores a group index for every column.

    Options:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or -1 for the whole row. Where it does not divide
            the row, the last group is shorter.
        symmetric: no zero points.
        desc_act: act-order: columns with the most active inputs first.
        static_groups: fit all grids beforehand, to groups of neighbouring columns.
        damp_percent: share of the Gram matrix's mean diagonal that is added to its diagonal;
            raised in steps where the matrix cannot be factored.
        block_size: columns between two updates of the rest.
        mse: search the range of each grid for the least sum of |error|**2.4.
        true_sequential: collect the inputs anew after each sublayer of a block.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "second-order rounding that compensates each column's error"
    reference: ClassVar[str] = "arXiv 2210.17323; IST-DASLab/gptq"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Statistic]] = frozenset({"gram"})
    cost: ClassVar[float] = 10.0

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    desc_act: bool = True
    static_groups: bool = True
    damp_percent: float = Field(default=0.01, ge=0, lt=1)
    block_size: int = Field(default=128, ge=1)
    mse: bool = False
    true_sequential: bool = False

    @property
    def stream(self) -> Stream:
        """Each block is calibrated on the outputs of the quantized blocks before it."""
        return "quantized"

    def groups_of(self, block: BlockContext) -> list[list[str]]:
        """All layers at once, or, true-sequentially, those that share an input, as they run."""
        if not self.true_sequential:
            return super().groups_of(block)
        batches: dict[int, list[str]] = {}
        for layer in block.layers:
            batches.setdefault(layer.input_group, []).append(layer.name)
        return [batches[group] for group in sorted(batches)]

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Solve one layer; rounds to nearest if no calibration token has reached it."""
        (layer,) = self.quantize_shared({name: weight}, statistics)
        return layer

    def quantize_shared(
        self, weights: Mapping[str, Tensor], statistics: LayerStatistics | None
    ) -> list[QuantizedLayer]:
        """Solve layers that read the same inputs with one factorization of their Gram matrix."""
        from pytest_qlab.solvers.gptq import gptq_solve_shared
        from pytest_qlab.solvers.grid import GridRule, round_to_nearest

        for name, weight in weights.items():
            check_weight(weight, name)
            known = check_statistics(statistics, weight, name, self.name, gram=True)
        rule = GridRule(self.bits, symmetric=self.symmetric, mse=self.mse)
        if not known.tokens or known.gram is None:
            return [
                QuantizedLayer(round_to_nearest(weight, rule, self.group_size).pack())
                for weight in weights.values()
            ]
        with solving("GPTQ", weights, known.tokens):
            solutions = gptq_solve_shared(
                list(weights.values()),
                known.gram,
                rule,
                group_size=self.group_size,
                desc_act=self.desc_act,
                static_groups=self.static_groups,
                damp_percent=self.damp_percent,
                block_size=self.block_size,
            )
        return [QuantizedLayer(solution.quantized.pack()) for solution in solutions]
