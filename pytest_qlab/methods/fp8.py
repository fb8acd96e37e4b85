"""`fp8`: weights in E4M3 per channel, inputs in E4M3 per token at run time; no calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_qlab.methods.base import Method, QuantizedLayer
from pytest_qlab.methods.inputs import check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Fp8(Method):
    """E4M3 weights with a scale for each output channel, E4M3 inputs with one for each token.

    Options:
        activations: round the inputs, too.
    """

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "E4M3 weights per channel, E4M3 inputs per token"
    reference: ClassVar[str] = "arXiv 2209.05433; FP8 dynamic of llm-compressor and vLLM"

    activations: bool = True

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round to the nearest E4M3 number; see `Method.quantize`."""
        from pytest_qlab.formats.activations import PerTokenFloat8
        from pytest_qlab.solvers.codebook import round_nearest
        from pytest_qlab.solvers.float8 import Float8

        check_weight(weight, name)
        packed = round_nearest(weight, Float8())
        return QuantizedLayer(packed, PerTokenFloat8() if self.activations else None)
