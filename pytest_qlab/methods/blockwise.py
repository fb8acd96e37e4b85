"""`nf4` and `fp4`: a table of 16 numbers times the largest magnitude of a block; bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pytest_qlab.methods.base import Method, QuantizedLayer
from pytest_qlab.methods.inputs import check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.solvers.codebook import Codebook


class _Blockwise(Method):
    """What both have in common: every weight becomes the nearest number of the table."""

    block_size: int = Field(default=64, ge=8)
    double_quant: bool = False

    def codebook(self) -> Codebook:
        """The table's numbers under scales of blocks."""
        raise NotImplementedError

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round to the nearest number of the table; see `Method.quantize`."""
        from pytest_qlab.solvers.codebook import round_nearest

        check_weight(weight, name)
        return QuantizedLayer(round_nearest(weight, self.codebook()))


class Nf4(_Blockwise):
    """QLoRA's NormalFloat, as in bitsandbytes.

    Options:
        block_size: weights of the flattened matrix that share a scale.
        double_quant: store the scales in 8 bits.
    """

    name: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "quantiles of the normal distribution, scaled per block"
    reference: ClassVar[str] = "arXiv 2305.14314; bitsandbytes"

    def codebook(self) -> Codebook:
        """NormalFloat's."""
        from pytest_qlab.solvers.blockwise import NormalFloat4

        return NormalFloat4(self.block_size, self.double_quant)


class Fp4(_Blockwise):
    """bitsandbytes' 4-bit float; its numbers are not those of E2M1.

    Options:
        block_size: weights of the flattened matrix that share a scale.
        double_quant: store the scales in 8 bits.
    """

    name: ClassVar[str] = "fp4"
    summary: ClassVar[str] = "bitsandbytes' 4-bit floats, scaled per block"
    reference: ClassVar[str] = "bitsandbytes"

    def codebook(self) -> Codebook:
        """The 4-bit float's."""
        from pytest_qlab.solvers.blockwise import Float4

        return Float4(self.block_size, self.double_quant)
