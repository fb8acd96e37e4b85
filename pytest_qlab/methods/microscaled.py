"""`mxfp4` and `nvfp4`: E2M1 numbers with a scale for each block of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pytest_qlab.methods.base import Method, QuantizedLayer, Statistic
from pytest_qlab.methods.inputs import check_statistics, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


class Mxfp4(Method):
    """OCP's MXFP4: blocks of 32 columns under a power of two.

    Options:
        scale: `floor`: the exponent of the block's largest weight less that of 4, so that weights
            beyond 6 times the scale saturate; `ceil`: the least power of two with which none does;
            `even`: twice that of `floor` for blocks whose largest weight is at least 7 times it.
        activations: round the inputs, too, by the same rule for each 32 of a token.
    """

    name: ClassVar[str] = "mxfp4"
    summary: ClassVar[str] = "E2M1 numbers under powers of two, per 32 columns"
    reference: ClassVar[str] = "OCP Microscaling Formats 1.0"

    scale: Literal["floor", "ceil", "even"] = "floor"
    activations: bool = False

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round to the nearest E2M1 number; see `Method.quantize`."""
        from pytest_qlab.formats.activations import PerBlockMxfp4
        from pytest_qlab.solvers import float4
        from pytest_qlab.solvers.codebook import round_nearest

        check_weight(weight, name)
        packed = round_nearest(weight, float4.Mxfp4(self.scale))
        return QuantizedLayer(packed, PerBlockMxfp4(self.scale) if self.activations else None)


class Nvfp4(Method):
    """NVIDIA's NVFP4: blocks of 16 columns under an E4M3 scale, below one of the tensor.

    The scale of inputs that is above those of blocks follows from the largest magnitude seen in
    calibration. A layer that no calibration token has reached, such as an idle expert, has none:
    its inputs get one for each token at run time.

    Options:
        four_over_six: choose for each block of weights whether its largest becomes 6 or 4,
            whichever has the less squared error.
        activations: round the inputs, too, in blocks of 16 of a token.
    """

    name: ClassVar[str] = "nvfp4"
    summary: ClassVar[str] = "E2M1 numbers under E4M3 scales, per 16 columns"
    reference: ClassVar[str] = "arXiv 2509.25149; arXiv 2512.02010 for four_over_six"

    four_over_six: bool = False
    activations: bool = False

    @property
    def wanted_statistics(self) -> frozenset[Statistic]:
        """The range of the inputs, where they are rounded."""
        return frozenset({"channels"}) if self.activations else frozenset()

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round to the nearest E2M1 number; see `Method.quantize`."""
        import torch

        from pytest_qlab.formats.activations import PerBlockNvfp4
        from pytest_qlab.solvers import float4
        from pytest_qlab.solvers.codebook import round_nearest

        check_weight(weight, name)
        packed = round_nearest(weight, float4.Nvfp4(self.four_over_six))
        if not self.activations:
            return QuantizedLayer(packed)
        known = check_statistics(statistics, weight, name, self.name, gram=False, channels=True)
        largest = torch.maximum(-known.minimum, known.maximum).max()
        return QuantizedLayer(packed, PerBlockNvfp4.from_largest(float(largest)))
