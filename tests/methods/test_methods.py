"""The methods as a whole: what they return, ask for, refuse, and how they compare."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pytest_qlab.calibration.statistics import ChannelRange, LayerStatistics
from pytest_qlab.errors import MethodError
from pytest_qlab.formats import AffineGroups, PerTensorAffine, PerTokenSymmetric, PlainWeight
from pytest_qlab.methods.awq import Awq, is_clipped
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.blocks import BlockContext, FoldContext, LayerContext
from pytest_qlab.methods.blockwise import Nf4
from pytest_qlab.methods.dynamic import Dynamic
from pytest_qlab.methods.gptq import Gptq
from pytest_qlab.methods.hqq import Hqq
from pytest_qlab.methods.identity import Identity
from pytest_qlab.methods.quip import Quip
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.methods.spqr import Spqr
from pytest_qlab.methods.static import Static
from pytest_qlab.solvers.grid import GridRule, fake_quantize
from tests.methods.oracles import correlated

ALL: list[type[Method]] = [Identity, Rtn, Dynamic, Static, Gptq, Awq]
CALIBRATED: list[type[Method]] = [Static, Gptq, Awq]


def statistics_of(inputs: Tensor) -> LayerStatistics:
    return LayerStatistics(
        tokens=len(inputs),
        square_sum=inputs.square().sum(0),
        channels=ChannelRange(inputs.amin(0), inputs.amax(0), inputs.abs().mean(0)),
        gram=inputs.T @ inputs,
    )


def unreached(columns: int) -> LayerStatistics:
    empty = torch.zeros(columns)
    ranges = ChannelRange(empty, empty, empty)
    return LayerStatistics(0, empty, ranges, torch.zeros(columns, columns))


def layer(rows: int = 24, columns: int = 64, seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    weight, inputs, _ = correlated(rows, columns, 300, seed)
    return weight.float(), statistics_of(inputs.float())


def output_error(weight: Tensor, found: Tensor, statistics: LayerStatistics) -> float:
    assert statistics.gram is not None
    delta = weight - found
    return float((delta @ statistics.gram * delta).sum())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (3, 41), (1, 9), (5, 1), (1, 1)])
def test_every_method_returns_a_weight_of_the_same_shape(
    kind: type[Method], rows: int, columns: int
) -> None:
    weight, statistics = layer(rows, columns)
    before = weight.clone()
    found = kind().quantize(weight, statistics, name="block.layer").weight
    assert found.shape == (rows, columns)
    error = found.dequantize() - weight
    assert bool(error.isfinite().all())
    assert float(error.abs().max()) < 0.5 * float(weight.abs().max())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", [Rtn, Gptq, Awq])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_options_reach_the_bits(
    kind: Callable[..., Method], bits: int, group_size: int, symmetric: bool
) -> None:
    weight, statistics = layer(8, 96)
    method = kind(bits=bits, group_size=group_size, symmetric=symmetric)
    found = cast(AffineGroups, method.quantize(weight, statistics).weight)
    assert (found.bits, found.group_size, found.symmetric) == (bits, group_size, symmetric)
    groups = {32: 3, 64: 2, 128: 1, -1: 1}[group_size]
    zeros = 0 if symmetric else 8 * math.ceil(groups * bits / 8)
    assert found.nbytes == 8 * (96 * bits // 8 + 2 * groups) + zeros


def test_more_bits_cost_less_error() -> None:
    weight, statistics = layer()
    for kind in (Rtn, Gptq, Awq, Dynamic, Static):
        errors = [
            output_error(
                weight,
                cast(Any, kind)(bits=bits).quantize(weight, statistics).weight.dequantize(),
                statistics,
            )
            for bits in (2, 3, 4, 8)
        ]
        assert errors == sorted(errors, reverse=True), kind


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_and_awq_beat_rounding_on_the_same_grid(bits: int, symmetric: bool) -> None:
    options: dict[str, Any] = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    totals = dict.fromkeys(("rtn", "gptq", "awq"), 0.0)
    for seed in range(4):
        weight, statistics = layer(seed=seed)
        for kind in (Rtn, Gptq, Awq):
            found = cast(Any, kind)(**options).quantize(weight, statistics, name="up_proj").weight
            totals[kind.name] += output_error(weight, found.dequantize(), statistics)
    assert totals["gptq"] < 0.8 * totals["rtn"]
    assert totals["awq"] < totals["rtn"]


def test_none_keeps_the_weight_in_its_storage_type() -> None:
    weight, _ = layer()
    stored = weight.to(torch.bfloat16).float()
    found = Identity().quantize(stored, None)
    assert isinstance(found.weight, PlainWeight)
    assert torch.equal(found.weight.dequantize(), stored)
    assert found.weight.bits_per_weight == 16
    assert found.activation is None


def test_dynamic_rounds_inputs_per_token_and_weights_per_row() -> None:
    weight, _ = layer()
    found = Dynamic(bits=4, activation_bits=8).quantize(weight, None)
    assert isinstance(found.activation, PerTokenSymmetric)
    assert found.activation.bits == 8
    expected = fake_quantize(weight, GridRule(4, symmetric=True), -1)
    assert torch.equal(found.weight.dequantize(), expected)


def test_static_rounds_inputs_on_the_calibrated_range() -> None:
    weight, statistics = layer()
    found = Static(activation_bits=8).quantize(weight, statistics).activation
    assert isinstance(found, PerTensorAffine)
    low, high = float(statistics.minimum.min()), float(statistics.maximum.max())
    assert found.scale == pytest.approx((high - low) / 255, rel=1e-6)
    assert found.zero_point == round(-low / found.scale)


@pytest.mark.parametrize("kind", CALIBRATED)
def test_a_layer_that_no_token_reached_is_rounded_to_nearest(kind: type[Method]) -> None:
    weight, _ = layer()
    found = kind().quantize(weight, unreached(64))
    expected = Dynamic() if kind is Static else Rtn()
    assert torch.equal(
        found.weight.dequantize(), expected.quantize(weight, None).weight.dequantize()
    )
    if kind is Static:
        assert isinstance(found.activation, PerTokenSymmetric)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(kind: type[Method], poison: float) -> None:
    weight, statistics = layer()
    weight[3, 5] = poison
    with pytest.raises(MethodError, match=r"layers\.7\.up_proj contains NaN"):
        kind().quantize(weight, statistics, name="layers.7.up_proj")


@pytest.mark.parametrize("kind", [*(each for each in ALL if each is not Identity), Hqq, Nf4, Spqr])
def test_weights_at_the_end_of_float32_are_refused_by_name(kind: type[Method]) -> None:
    """Sums and steps of such numbers would be infinite; a little below they are not."""
    weight, statistics = layer()
    with pytest.raises(MethodError, match=r"layers\.7\.up_proj reaches 3e\+37"):
        kind().quantize(weight * (3e37 / weight.abs().max()), statistics, name="layers.7.up_proj")
    below = weight * (9e35 / weight.abs().max())
    found = kind().quantize(below, statistics, name="layers.7.up_proj").weight.dequantize()
    assert bool(found.isfinite().all())
    assert float((found / 9e35 - below / 9e35).square().sum()) < float(
        (below / 9e35).square().sum()
    )


@pytest.mark.parametrize("kind", [*CALIBRATED, Spqr, Quip])
def test_the_order_of_calibration_tokens_changes_rounding_errors_only(kind: type[Method]) -> None:
    """Sums are added up in another order: few codes flip, and the error is what it was."""
    weight, inputs, _ = correlated(24, 64, 300, 0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    weight, inputs = weight.float(), inputs.float()
    known = statistics_of(inputs)
    found, again = (
        kind().quantize(weight, statistics, name="up_proj").weight.dequantize()
        for statistics in (known, statistics_of(inputs[order]))
    )
    errors = [output_error(weight, each, known) for each in (found, again)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert float((found - again).norm()) < 0.2 * float((weight - found).norm())


@pytest.mark.parametrize("kind", CALIBRATED)
def test_statistics_that_are_missing_wrong_or_not_finite_are_refused(kind: type[Method]) -> None:
    weight, statistics = layer()
    _, other = layer(columns=32)
    assert statistics.channels is not None
    maximum, gram = statistics.maximum.clone(), cast(Tensor, statistics.gram).clone()
    maximum[0], gram[0, 0] = math.inf, math.nan
    channels = replace(statistics.channels, maximum=maximum)
    with pytest.raises(MethodError, match=r"needs .* of up_proj"):
        kind().quantize(weight, None, name="up_proj")
    with pytest.raises(MethodError, match="32 input channels"):
        kind().quantize(weight, other, name="up_proj")
    with pytest.raises(MethodError, match="up_proj contain NaN"):
        kind().quantize(weight, replace(statistics, channels=channels, gram=gram), name="up_proj")


def test_gptq_and_awq_need_the_gram_matrix() -> None:
    weight, statistics = layer()
    for method in (Gptq(), Awq()):
        with pytest.raises(MethodError, match="Gram matrix"):
            method.quantize(weight, replace(statistics, gram=None))


def test_what_reads_ranges_of_channels_needs_them() -> None:
    weight, statistics = layer()
    with pytest.raises(MethodError, match="'static' needs the range of the inputs of up_proj"):
        Static().quantize(weight, replace(statistics, channels=None), name="up_proj")


def test_a_gram_matrix_that_cannot_be_factored_names_the_layer() -> None:
    weight, statistics = layer()
    broken = replace(statistics, gram=-torch.eye(64))
    with pytest.raises(MethodError, match=r"cannot solve up_proj.*300"):
        Gptq().quantize(weight, broken, name="up_proj")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Rtn, {"bits": 5}),
        (Rtn, {"group_size": 7}),
        (Gptq, {"group_size": 0}),
        (Gptq, {"damp_percent": 1.0}),
        (Gptq, {"block_size": 0}),
        (Awq, {"max_shrink": 1.0}),
        (Awq, {"n_grid": 0}),
        (Dynamic, {"activation_bits": 3}),
        (Static, {"group": 3}),
    ],
)
def test_wrong_options_are_refused(kind: Callable[..., Method], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        kind(**options)


def test_what_calibration_each_method_asks_for() -> None:
    asked = {kind.name: (kind().stream, sorted(kind.needs)) for kind in ALL}
    assert asked == {
        "none": ("none", []),
        "rtn": ("none", []),
        "dynamic": ("none", []),
        "static": ("original", ["channels"]),
        "gptq": ("quantized", ["gram"]),
        "awq": ("original", ["channels", "gram"]),
    }


def test_ids_are_readable_and_differ() -> None:
    methods: list[Method] = [
        *(kind() for kind in ALL),
        Gptq(bits=3, group_size=-1, desc_act=False),
        Awq(bits=3, symmetric=True, clip=False),
    ]
    assert [method.id for method in methods] == [
        "none",
        "rtn-w4g128",
        "dynamic-w8a8",
        "static-w8a8",
        "gptq-w4g128",
        "awq-w4g128",
        "gptq-w3-channel-no_desc_act",
        "awq-w3g128-no_clip-symmetric",
    ]


def test_reading_options_imports_no_torch() -> None:
    modules = [f"pytest_qlab.methods.{kind.__module__.rpartition('.')[2]}" for kind in ALL]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "clipped"),
    [
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.0.self_attn.k_proj", False),
        ("transformer.h.1.self_attention.query_key_value", False),
        ("transformer.h.1.attn.c_attn", False),
        ("model.layers.0.self_attn.qkv_proj", False),
        ("transformer.blocks.3.attn.Wqkv", False),
        ("model.layers.0.self_attn.v_proj", True),
        ("model.layers.0.self_attn.o_proj", True),
        # "block_sparse_moe" contains "k_", but the layer's own name does not.
        ("model.layers.0.block_sparse_moe.experts.3.w1", True),
    ],
)
def test_query_and_key_projections_are_not_clipped(name: str, clipped: bool) -> None:
    assert is_clipped(name) == clipped
    weight, statistics = layer()
    weight[:, ::16] *= 5
    found = Awq(bits=2, group_size=16).quantize(weight, statistics, name=name).weight
    plain = Rtn(bits=2, group_size=16).quantize(weight, None).weight
    assert torch.equal(found.dequantize(), plain.dequantize()) != clipped


@dataclass
class FakeSite:
    """A linear layer without a model."""

    matrix: Tensor

    def weight(self) -> Tensor:
        return self.matrix.clone()


class FakeFold:
    """A fold that scales the columns of fake layers and keeps what it was given."""

    def __init__(self, sites: list[FakeSite]) -> None:
        self.sites = sites
        self.applied: list[Tensor] = []

    def apply(self, scale: Tensor) -> None:
        self.applied.append(scale)
        for site in self.sites:
            site.matrix = site.matrix * scale


def context(name: str, weight: Tensor, statistics: LayerStatistics, **options: Any) -> LayerContext:
    return LayerContext(name, cast(Any, FakeSite(weight)), statistics, **options)


def fold_of(layers: list[LayerContext]) -> tuple[FoldContext, FakeFold]:
    fold = FakeFold([cast(FakeSite, layer.site) for layer in layers])
    return FoldContext(cast(Any, fold), layers), fold


def test_awq_scales_every_fold_and_the_outputs_improve() -> None:
    first, second = layer(), layer(16, 64, seed=1)
    second = (second[0], first[1])
    pair = [context("q_proj", *first), context("v_proj", *second)]
    down = [context("down_proj", *layer(8, 40, seed=2))]
    folds = [fold_of(pair), fold_of(down)]
    block = BlockContext(0, [*pair, *down], [each for each, _ in folds])
    method = Awq(bits=3, group_size=16, clip=False)
    method.transform_block(block)
    for _, fake in folds:
        (scale,) = fake.applied
        assert not torch.allclose(scale, torch.ones_like(scale))
    awq, rtn = 0.0, 0.0
    for each, (weight, statistics) in zip(
        block.layers, [first, second, layer(8, 40, seed=2)], strict=True
    ):
        assert each.column_scale is not None
        assert each.statistics is not None
        found = method.quantize(each.site.weight(), each.statistics, name=each.name).weight
        awq += output_error(weight, found.dequantize() / each.column_scale, statistics)
        plain = Rtn(bits=3, group_size=16).quantize(weight, None).weight
        rtn += output_error(weight, plain.dequantize(), statistics)
    assert awq < rtn


def test_all_scales_are_searched_before_any_is_applied() -> None:
    """A layer in front of one fold and behind another: its weight must be searched unchanged."""
    middle = context("up_proj", *layer())
    behind = context("down_proj", *layer(8, 64, seed=3))
    alone = context("down_proj", *layer(8, 64, seed=3))
    first, _ = fold_of([middle])
    second, fake = fold_of([behind])
    original = cast(FakeFold, first.fold).apply

    def disturb(scale: Tensor) -> None:
        original(scale)
        cast(FakeSite, behind.site).matrix *= 7 * torch.rand(8, 64)

    cast(Any, first.fold).apply = disturb
    Awq(bits=3, group_size=16).transform_block(BlockContext(0, [middle, behind], [first, second]))
    lonely, expected = fold_of([alone])
    Awq(bits=3, group_size=16).transform_block(BlockContext(0, [alone], [lonely]))
    assert torch.equal(fake.applied[0], expected.applied[0])


def test_routers_and_idle_experts_do_not_take_part_in_the_search_but_are_scaled() -> None:
    busy = layer()
    experts = [context("w1", *busy), context("w2", busy[0] * 2, unreached(64))]
    router = context("gate", torch.randn(4, 64), unreached(64), quantized=False)
    fold, fake = fold_of([router, *experts])
    Awq(bits=3, group_size=16).transform_block(BlockContext(0, experts, [fold]))
    alone, expected = fold_of([context("w1", *busy)])
    Awq(bits=3, group_size=16).transform_block(BlockContext(0, alone.layers, [alone]))
    assert torch.equal(fake.applied[0], expected.applied[0])
    assert all(each.column_scale is not None for each in fold.layers)


def test_a_fold_that_no_token_reached_is_left_alone() -> None:
    fold, fake = fold_of([context("w1", torch.randn(4, 64), unreached(64))])
    Awq().transform_block(BlockContext(0, fold.layers, [fold]))
    assert fake.applied == []


def test_experts_count_by_their_tokens() -> None:
    """Two experts on halves of the tokens search as one linear on all of them does."""
    weight, inputs, _ = correlated(24, 64, 300)
    weight, inputs = weight.float(), inputs.float()
    halves = [
        context(n, weight, statistics_of(x))
        for n, x in zip(("w1", "w3"), (inputs[:200], inputs[200:]), strict=True)
    ]
    both, fake = fold_of(halves)
    Awq(bits=3, group_size=16).transform_block(BlockContext(0, halves, [both]))
    whole, expected = fold_of([context("w1", weight, statistics_of(inputs))])
    Awq(bits=3, group_size=16).transform_block(BlockContext(0, whole.layers, [whole]))
    assert torch.allclose(fake.applied[0], expected.applied[0], rtol=1e-4)


def test_true_sequential_takes_layers_by_shared_input_in_running_order() -> None:
    layers = [
        LayerContext(name, cast(Any, None), input_group=group)
        for name, group in [("down", 3), ("q", 0), ("k", 0), ("o", 1), ("up", 2), ("gate", 2)]
    ]
    block = BlockContext(0, layers)
    assert Gptq(true_sequential=True).groups_of(block) == [
        ["q", "k"],
        ["o"],
        ["up", "gate"],
        ["down"],
    ]
    assert Gptq().groups_of(block) == [["down", "q", "k", "o", "up", "gate"]]


@pytest.mark.parametrize("kind", [Gptq, Awq, Rtn])
def test_the_same_input_gives_the_same_bits(kind: type[Method]) -> None:
    weight, statistics = layer()
    found = [kind().quantize(weight, statistics).weight.tensors() for _ in range(2)]
    for (name, one), other in zip(found[0].items(), found[1].values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("desc_act", "static_groups", "mse"), list(itertools.product((True, False), repeat=3))
)
def test_gptq_passes_its_options_on(desc_act: bool, static_groups: bool, mse: bool) -> None:
    from pytest_qlab.solvers.gptq import gptq_solve

    weight, statistics = layer()
    assert statistics.gram is not None
    method = Gptq(
        bits=3,
        group_size=16,
        desc_act=desc_act,
        static_groups=static_groups,
        mse=mse,
        damp_percent=0.05,
        block_size=24,
    )
    expected = gptq_solve(
        weight,
        statistics.gram,
        GridRule(3, mse=mse),
        group_size=16,
        desc_act=desc_act,
        static_groups=static_groups,
        damp_percent=0.05,
        block_size=24,
    )
    found = method.quantize(weight, statistics).weight
    assert torch.equal(found.dequantize(), expected.quantized.pack().dequantize())
