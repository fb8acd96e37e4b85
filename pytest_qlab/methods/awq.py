"""`awq`: scale input channels by their activity, clip, round to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pytest_qlab.errors import MethodError
from pytest_qlab.methods.base import Bits, Method, QuantizedLayer, Statistic
from pytest_qlab.methods.inputs import GroupSize, check_statistics, check_weight

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.methods.blocks import BlockContext, FoldContext

UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv", "c_attn", "qkv_proj")


class Awq(Method):
    """Activation-aware scales, folded into the operation before, then clipping and rounding.

    Scales are searched per group of linears that share an input, all on the block as it is, and
    applied afterwards; the block computes the same function before rounding. Query and key
    projections are not clipped, as in the reference, nor are projections fused with them: it leaves
    out those it knows (`Wqkv`, `query_key_value`), here `c_attn` and `qkv_proj` are left out too.

    Options:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or -1 for the whole row. Where it does not divide
            the row, the last group is shorter.
        symmetric: no zero points.
        n_grid: steps of both searches.
        duo_scaling: divide the scales by the weights' mean magnitude, as AutoAWQ does.
        clip: search a clipping limit for each group.
        max_shrink: the largest share of the range that clipping may cut off.
    """

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "activation-aware channel scales and clipping, then rounding"
    reference: ClassVar[str] = "arXiv 2306.00978; mit-han-lab/llm-awq"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels", "gram"})
    cost: ClassVar[float] = 8.0

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    n_grid: int = Field(default=20, ge=1)
    duo_scaling: bool = False
    clip: bool = True
    max_shrink: float = Field(default=0.5, ge=0, lt=1)

    def transform_block(self, block: BlockContext) -> None:
        """Search the scale of every fold on the unchanged block, then apply them all."""
        found = [(fold, self._search(fold)) for fold in block.folds]
        for fold, scale in found:
            if scale is not None:
                fold.apply(scale)

    def _search(self, fold: FoldContext) -> Tensor | None:
        """The scale of a fold's inputs, or None if no calibration token has reached them."""
        from pytest_qlab.solvers.awq import search_scale
        from pytest_qlab.solvers.grid import GridRule

        weights, grams, tokens = [], [], 0
        sum_abs: Tensor | None = None
        for layer in fold.layers:
            if not layer.quantized:
                continue
            weight = layer.site.weight()
            check_weight(weight, layer.name)
            known = check_statistics(
                layer.statistics, weight, layer.name, self.name, gram=True, channels=True
            )
            if known.tokens and known.gram is not None:
                weights.append(weight)
                grams.append(known.gram)
                tokens += known.tokens
                share = known.mean_abs * known.tokens
                sum_abs = share if sum_abs is None else sum_abs + share
        if sum_abs is None:
            return None
        try:
            return search_scale(
                weights,
                grams,
                sum_abs / tokens,
                GridRule(self.bits, symmetric=self.symmetric),
                self.group_size,
                n_grid=self.n_grid,
                duo_scaling=self.duo_scaling,
            ).scale
        except ValueError as error:
            names = ", ".join(layer.name for layer in fold.layers)
            raise MethodError(
                f"AWQ finds no scale for the inputs of {names}: {error}. Their weights or "
                "activations are too large for float32; check the checkpoint."
            ) from error

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Clip and round one layer; only rounds if no calibration token has reached it."""
        from pytest_qlab.solvers.awq import clip, search_clip
        from pytest_qlab.solvers.grid import GridRule, round_to_nearest

        check_weight(weight, name)
        known = check_statistics(statistics, weight, name, self.name, gram=True)
        rule = GridRule(self.bits, symmetric=self.symmetric)
        if known.tokens and known.gram is not None and self.clip and is_clipped(name):
            limits = search_clip(
                weight,
                known.gram,
                rule,
                self.group_size,
                n_grid=self.n_grid,
                max_shrink=self.max_shrink,
            )
            weight = clip(weight, limits, self.group_size)
        return QuantizedLayer(round_to_nearest(weight, rule, self.group_size).pack())


def is_clipped(name: str) -> bool:
    """Whether a layer's name, its last part, is none of a query or key projection's."""
    return not any(part in name.rpartition(".")[2] for part in UNCLIPPED)
