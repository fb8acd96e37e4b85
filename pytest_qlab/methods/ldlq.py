"""`ldlq`: any codebook against the Gram matrix of a layer's inputs; GPTQ for floats and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pytest_qlab.methods.base import Method, QuantizedLayer, Statistic, Stream
from pytest_qlab.methods.inputs import check_statistics, check_weight, solving

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.solvers.codebook import Codebook


class Ldlq(Method):
    """Columns rounded one after the other to the points of a codebook, errors fed back.

    Options:
        codebook: `nf4`, `fp4`, `mxfp4`, `nvfp4` or `fp8`, fitted as by the methods of those names;
            `table4`, `table3` or `table2`: a table for each row, as by `squeezellm`, weighted by
            the mean square of each column's inputs.
        desc_act: take the columns with the most active inputs first.
        damp_percent: share of the Gram matrix's mean diagonal that is added to its diagonal; raised
            in steps where the matrix cannot be factored.
        greedy_passes: rounds of coordinate descent afterwards, at most.
    """

    name: ClassVar[str] = "ldlq"
    summary: ClassVar[str] = "second-order rounding to the points of any codebook"
    reference: ClassVar[str] = "arXiv 2307.13304, section 3; for FP4, arXiv 2509.23202"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Statistic]] = frozenset({"gram"})
    cost: ClassVar[float] = 12.0
    positional: ClassVar[str | None] = "codebook"

    codebook: Literal["nf4", "fp4", "mxfp4", "nvfp4", "fp8", "table4", "table3", "table2"] = "nvfp4"
    desc_act: bool = True
    damp_percent: float = Field(default=0.01, ge=0, lt=1)
    greedy_passes: int = Field(default=0, ge=0)

    @property
    def stream(self) -> Stream:
        """Each block is calibrated on the outputs of the quantized blocks before it."""
        return "quantized"

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Solve one layer; rounds to nearest if no calibration token has reached it."""
        from pytest_qlab.solvers.codebook import round_nearest
        from pytest_qlab.solvers.ldlq import ldlq

        check_weight(weight, name)
        known = check_statistics(statistics, weight, name, self.name, gram=True)
        codebook = self._codebook(weight, known)
        if not known.tokens or known.gram is None:
            return QuantizedLayer(round_nearest(weight, codebook))
        points = codebook.fit(weight)
        with solving("LDLQ", [name], known.tokens):
            solution = ldlq(
                weight,
                known.gram,
                points,
                order="active" if self.desc_act else "first",
                damp_percent=self.damp_percent,
                greedy_passes=self.greedy_passes,
            )
        return QuantizedLayer(points.pack(solution.codes))

    def _codebook(self, weight: Tensor, known: LayerStatistics) -> Codebook:
        from pytest_qlab.solvers import codebooks
        from pytest_qlab.solvers.tables import RowTables

        if self.codebook.startswith("table"):
            importance = known.square_sum if known.tokens else weight.new_ones(weight.shape[1])
            return RowTables(int(self.codebook[-1]), importance.expand_as(weight))
        fixed: dict[str, Codebook] = {
            "nf4": codebooks.NormalFloat4(),
            "fp4": codebooks.Float4(),
            "mxfp4": codebooks.Mxfp4(),
            "nvfp4": codebooks.Nvfp4(),
            "fp8": codebooks.Float8(),
        }
        return fixed[self.codebook]
