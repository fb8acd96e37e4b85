"""A quantization method of one's own: rounding after a clip that spares the busy inputs.

It is registered when pytest reads this file, and is then one of `--qlab-methods`:

    pytest examples/own_method --qlab-methods=clip_rtn,rtn
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pytest_qlab import Method, QuantizedLayer, register_method
from pytest_qlab.methods.base import Bits, Statistic
from pytest_qlab.methods.inputs import GroupSize, check_statistics, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics


@register_method
class ClipRtn(Method):
    """Clip each row to the share of its range that hurts busy inputs least, then round."""

    name: ClassVar[str] = "clip_rtn"
    summary: ClassVar[str] = "round to nearest after an activity-weighted clip"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels"})

    bits: Bits = 3
    group_size: GroupSize = 128
    steps: int = Field(default=10, ge=1, le=20)

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Try `steps` shares of the range, from 1 downwards; keep the one with the least error."""
        from pytest_qlab.solvers.grid import GridRule, round_to_nearest

        check_weight(weight, name)
        known = check_statistics(statistics, weight, name, self.name, gram=False)
        importance = known.square_sum if known.tokens else weight.new_ones(weight.shape[1])
        widest = weight.abs().amax(dim=1, keepdim=True)
        tried = []
        for step in range(self.steps):
            edge = widest * (1 - 0.05 * step)
            clipped = weight.clamp(-edge, edge)
            packed = round_to_nearest(clipped, GridRule(self.bits), self.group_size).pack()
            error = (weight - packed.dequantize()).square() * importance
            tried.append((float(error.sum()), step, packed))
        return QuantizedLayer(min(tried)[2])
