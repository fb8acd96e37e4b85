"""`squeezellm`: a table of values for each row, where the loss is sensitive; sparse outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pytest_qlab.methods.base import Method, QuantizedLayer, Statistic
from pytest_qlab.methods.inputs import check_statistics, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class SqueezeLlm(Method):
    """Non-uniform quantization that weighs each weight's error by its squared gradient.

    Options:
        bits: 2, 3 or 4; a row's table has 2**bits entries.
        dense_and_sparse: keep some weights as float16 outliers in a sparse matrix.
        sensitive_percent: share of a matrix's weights that are outliers for their gradients.
        outlier_percent: share of a matrix's weights that are outliers for their magnitude.
    """

    name: ClassVar[str] = "squeezellm"
    summary: ClassVar[str] = "a table for each row by gradient-weighted k-means; sparse outliers"
    reference: ClassVar[str] = "arXiv 2306.07629; SqueezeAILab/SqueezeLLM"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"fisher"})
    cost: ClassVar[float] = 12.0

    bits: Literal[2, 3, 4] = 4
    dense_and_sparse: bool = False
    sensitive_percent: float = Field(default=0.05, ge=0, le=100)
    outlier_percent: float = Field(default=0.4, ge=0, le=100)

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Fit tables to one layer; all its weights count the same if no gradient reached it."""
        from pytest_qlab.formats.outliers import WithOutliers
        from pytest_qlab.solvers.codebook import round_nearest
        from pytest_qlab.solvers.tables import RowTables

        check_weight(weight, name)
        known = check_statistics(statistics, weight, name, self.name, gram=False, fisher=True)
        fisher = known.fisher
        assert fisher is not None
        if not self.dense_and_sparse:
            return QuantizedLayer(round_nearest(weight, RowTables(self.bits, fisher)))
        outliers = self._outliers(weight, fisher)
        dense = round_nearest(weight, RowTables(self.bits, fisher.masked_fill(outliers, 0)))
        return QuantizedLayer(WithOutliers.pack(dense, weight, outliers))

    def _outliers(self, weight: Tensor, fisher: Tensor) -> Tensor:
        """bool (m, n): the most sensitive weights, and the largest of the others."""
        sensitive = largest(fisher, self.sensitive_percent)
        return sensitive | largest(weight.abs().masked_fill(sensitive, 0), self.outlier_percent)


def largest(values: Tensor, percent: float) -> Tensor:
    """Where values (m, n), none negative, are above the k-th largest of all, k = percent * m * n.

    So those that equal it are not among them, and there are at most k - 1: with few weights, none.
    """
    import torch

    count = int(values.numel() * percent / 100)
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    return values > values.flatten().kthvalue(values.numel() - count + 1).values
