"""`quip`: weights rotated until they look alike, one grid for all of them, LDLQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pytest_qlab.methods.base import Method, QuantizedLayer, Statistic, Stream
from pytest_qlab.methods.inputs import check_statistics, check_weight, solving

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Quip(Method):
    """QuIP: incoherence processing and LDLQ, on what the quantized blocks before produce.

    Options:
        bits: 2, 3 or 4.
        transform: `kronecker`, products of two random orthogonal matrices with random permutations;
            or `hadamard`, a Hadamard matrix with random signs (QuIP#), where one of the order is
            known, else `kronecker`.
        rescale: make the columns of weights and inputs even in size before they are rotated.
        damp_percent: share of the Gram matrix's mean diagonal that is added to its diagonal; raised
            in steps where the matrix cannot be factored.
        greedy_passes: rounds of coordinate descent after LDLQ, at most.
        seed: of the rotations.
    """

    name: ClassVar[str] = "quip"
    summary: ClassVar[str] = "random rotations on both sides, one grid, LDLQ"
    reference: ClassVar[str] = "arXiv 2307.13304; Cornell-RelaxML/QuIP"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"gram"})
    cost: ClassVar[float] = 12.0

    bits: Literal[2, 3, 4] = 4
    transform: Literal["kronecker", "hadamard"] = "kronecker"
    rescale: bool = True
    damp_percent: float = Field(default=0.01, ge=0, lt=1)
    greedy_passes: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)

    @property
    def stream(self) -> Stream:
        """Each block is calibrated on the outputs of the quantized blocks before it."""
        return "quantized"

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Solve one layer; rounds the rotated weight if no calibration token has reached it."""
        from pytest_qlab.solvers.incoherence import quip_solve

        check_weight(weight, name)
        known = check_statistics(statistics, weight, name, self.name, gram=True)
        with solving("QuIP", [name], known.tokens):
            packed = quip_solve(
                weight,
                known.gram if known.tokens else None,
                bits=self.bits,
                transform=self.transform,
                rescale=self.rescale,
                damp_percent=self.damp_percent,
                seed=self.seed,
                greedy_passes=self.greedy_passes,
            )
        return QuantizedLayer(packed)
