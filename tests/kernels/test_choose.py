"""A kernel is used if its products are right on the actual weight, and only then."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError, StoreError
from pytest_qlab.formats import PerTensorAffine, PerTokenSymmetric, PlainWeight
from pytest_qlab.kernels import choose as choosing
from pytest_qlab.kernels import int4, w8a8
from pytest_qlab.kernels.choose import TOLERANCE, LayerKernel, build, choose
from pytest_qlab.kernels.crossover import MOST_ROWS, most_rows, time_ratio
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import CrossedLinear, has_operator
from pytest_qlab.methods.hqq import Hqq
from tests.kernels.packing import normal, random_case

pytestmark = pytest.mark.skipif(
    not has_operator("aten", "_weight_int4pack_mm_for_cpu")
    or not has_operator("onednn", "qlinear_prepack"),
    reason="this build of torch has no int4 and int8 kernels for CPUs",
)
INT4 = random_case(64, 128, 32)
INT8 = random_case(32, 64, -1, bits=8, symmetric=True)


def kernel(source: PackedLinear) -> str:
    module = choose(source).module
    assert isinstance(module, CrossedLinear | PackedLinear | w8a8.W8A8Linear)
    return module.kernel


def test_every_format_gets_its_kernel() -> None:
    assert kernel(INT4.layer()) == "int4pack"
    assert kernel(INT8.layer()) == "int8pack"
    assert kernel(INT8.layer(activation=PerTokenSymmetric(8))) == "onednn-int8"
    assert kernel(INT8.layer(activation=PerTensorAffine.from_range(-2, 4, 8))) == "onednn-int8"


def test_hqq_runs_on_the_int4_kernel() -> None:
    weight = normal(64, 256).float()
    source = PackedLinear(Hqq().quantize(weight, None).weight, None, None, torch.bfloat16)
    choice = choose(source)
    assert isinstance(choice.module, int4.Int4CpuLinear)
    assert choice.rounding < 2.0**-7
    for rows in (1, 9):
        x = normal(rows, 256, seed=2)
        exact = x.float() @ source.packed.dequantize().t()
        off = choice.module(x).float() - exact
        assert float(off.norm()) < 2.0**-7 * float(exact.norm())


@pytest.mark.parametrize(
    "source",
    [
        random_case(64, 128, 32, bits=3).layer(),
        INT4.layer(activation=PerTokenSymmetric(8)),
        INT8.layer(activation=PerTokenSymmetric(4)),
        PackedLinear(PlainWeight(torch.ones(4, 4)), None, PerTokenSymmetric(8), torch.bfloat16),
    ],
)
def test_formats_without_a_kernel_dequantize_and_say_why(source: PackedLinear) -> None:
    choice = choose(source)
    assert choice.module is source
    assert source.wanted_kernel in choice.reason


def test_a_refused_shape_dequantizes_and_says_why() -> None:
    choice = choose(random_case(17, 64, 32).layer())
    assert isinstance(choice.module, PackedLinear)
    assert "multiples of 16" in choice.reason


def test_a_plain_weight_is_kept_in_the_type_to_compute_in() -> None:
    weight = torch.randn(4, 8)
    choice = choose(PackedLinear(PlainWeight(weight), None, None, torch.bfloat16))
    assert choice.reason == ""
    assert isinstance(choice.module, PackedLinear)
    assert not choice.module.simulated
    assert [each.dtype for each in choice.module.buffers()] == [torch.bfloat16]
    assert torch.equal(choice.module.weight, weight.to(torch.bfloat16))


@pytest.mark.parametrize(
    "source",
    [
        INT4.layer(),
        INT8.layer(),
        INT8.layer(activation=PerTokenSymmetric(8)),
        random_case(64, 128, 32, bits=3).layer(),
        PackedLinear(PlainWeight(torch.ones(4, 8)), None, None, torch.bfloat16),
    ],
)
def test_a_choice_is_built_again_without_being_checked(
    source: PackedLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "crossover", lambda module: 5)
    choice = choose(source)
    for name in ("crossover", "slowdown", "largest_error"):
        monkeypatch.delattr(choosing, name)
    again = build(source, choice.layer_kernel)
    assert type(again) is type(choice.module)
    assert getattr(again, "most_rows", 5) == 5
    for rows in (3, 9):
        x = normal(rows, source.in_features)
        assert torch.equal(again(x), choice.module(x))


def test_a_choice_that_cannot_be_built_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    source = INT4.layer()
    for wrong in (LayerKernel("int5pack"), LayerKernel("int8pack", 4), None):
        with pytest.raises(StoreError, match=r"up_proj.*not made for this format.*v1/kernels"):
            build(source, wrong, "up_proj")

    def refuses(codes: Tensor) -> Tensor:
        raise RuntimeError("not on this processor\nand more")

    monkeypatch.setattr(int4, "pack_cpu", refuses)
    with pytest.raises(StoreError, match=r"run on int4pack.*built: not on this processor\. If"):
        build(source, LayerKernel("int4pack", 4), "up_proj")


def test_rounding_is_what_the_kernel_adds_to_the_weight() -> None:
    exact = torch.from_numpy(INT4.exact)
    choice = choose(INT4.layer())
    module = choice.module
    assert isinstance(module, CrossedLinear)
    added = (module.dequantized().double() - exact).norm() / exact.norm()
    assert choice.rounding == pytest.approx(float(added), rel=1e-3)
    assert 0 < choice.rounding < 2**-8
    powers_of_two = random_case(16, 64, 32, exact=True)
    assert choose(powers_of_two.layer()).rounding == 0


def wrong_group(rows: Tensor, packed: Tensor, group: int, grids: Tensor) -> Tensor:
    """Takes the neighbour's scale and shift in one group of one row."""
    damaged = grids.clone()
    damaged[2, 11] = grids[2, 12]
    return RIGHT(rows, packed, group, damaged)


RIGHT = int4.multiply_cpu
BROKEN: dict[str, Callable[..., Tensor]] = {
    "zeros": lambda rows, *rest: RIGHT(rows, *rest) * 0,
    "nan": lambda rows, *rest: RIGHT(rows, *rest) * float("nan"),
    "five percent": lambda rows, *rest: RIGHT(rows, *rest) * 1.05,
    "one group": wrong_group,
    "only for one row": lambda rows, *rest: RIGHT(rows, *rest) * (2 if len(rows) == 1 else 1),
    "only for several": lambda rows, *rest: RIGHT(rows, *rest) * (1 if len(rows) == 1 else 2),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_kernel_that_is_wrong_is_not_used(
    broken: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4, "multiply_cpu", broken)
    source = INT4.layer()
    choice = choose(source)
    assert choice.module is source
    assert "int4pack is off by" in choice.reason
    assert f"{TOLERANCE:.2g}" in choice.reason


def test_the_dense_path_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = int4.Int4CpuLinear.dense_multiply
    monkeypatch.setattr(int4.Int4CpuLinear, "dense_multiply", lambda self, rows: -right(self, rows))
    assert "off by 2" in choose(INT4.layer()).reason


def test_an_operator_that_raises_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> Tensor:
        raise RuntimeError("not on this processor\nand more")

    monkeypatch.setattr(int4, "multiply_cpu", refuses)
    assert choose(INT4.layer()).reason == "int4pack failed: not on this processor"


def test_an_unknown_order_of_codes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = int4.pack_cpu
    monkeypatch.setattr(int4, "pack_cpu", lambda codes: right(codes).flip(0))
    assert "order of its packed codes" in choose(INT4.layer()).reason


@pytest.mark.parametrize("layout", [(32, False), (64, True), (32, True)])
def test_orders_of_other_processors_are_found(
    layout: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed by the rule that the layout stands for, row by row."""
    block, neighbours = layout

    def pack(codes: Tensor) -> Tensor:
        packed = []
        for start in range(0, len(codes), block):
            rows = codes[start : start + block].to(torch.uint8)
            half = len(rows) // 2
            pairs = neighbours or len(rows) < block
            for column in range(rows.shape[1]):
                for byte in range(half):
                    low, high = (2 * byte, 2 * byte + 1) if pairs else (byte, byte + half)
                    packed.append(int(rows[low, column]) | int(rows[high, column]) << 4)
        return torch.tensor(packed, dtype=torch.uint8).view(len(codes), -1)

    monkeypatch.setattr(int4, "pack_cpu", pack)
    case = random_case(80, 32, 32, exact=True)
    module = int4.Int4CpuLinear(case.layer())
    assert (module.block, module.neighbours) == layout
    expected = torch.from_numpy(case.exact).float()
    assert torch.equal(module.dequantized(), expected)
    assert torch.equal(module.dense_multiply(torch.eye(32)).t(), expected)


@pytest.mark.parametrize("activation", [PerTokenSymmetric(8), PerTensorAffine(8, 0.02, 128)])
def test_a_product_that_saturates_at_16_bits_is_not_used(
    activation: PerTokenSymmetric | PerTensorAffine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As processors without VNNI add pairs of products of unsigned inputs."""

    def saturating(
        codes: Tensor, scale: float, zero_point: int, prepacked: Tensor, scales: Tensor
    ) -> Tensor:
        shift = 128 if codes.dtype == torch.int8 else 0
        unsigned, weight = codes.to(torch.int32) + shift, prepacked.to_dense().to(torch.int32)
        products = unsigned.unsqueeze(-1) * weight
        pairs = products[:, ::2] + products[:, 1::2]
        total = pairs.clamp(-(2**15), 2**15 - 1).sum(1) - (shift + zero_point) * weight.sum(0)
        return total * scale * scales

    monkeypatch.setattr(w8a8, "multiply_onednn", saturating)
    assert "onednn-int8 is off by" in choose(INT8.layer(activation=activation)).reason


def test_weights_that_are_not_finite_are_an_error_that_names_the_layer() -> None:
    case = random_case(16, 32, 32)
    case.scales[3, 0] = float("nan")
    with pytest.raises(CorruptEntryError, match=r"layers\.7\.up_proj.*not finite"):
        choose(case.layer(), "layers.7.up_proj")


def test_a_product_of_nan_is_nan() -> None:
    module = choose(INT4.layer()).module
    x = normal(2, 128)
    x[0, 5] = float("nan")
    assert torch.isnan(module(x)[0]).all()
    assert torch.isfinite(module(x)[1]).all()


class Ticking:
    """A clock that moves by what calls cost."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def costing(self, cost: Callable[[int], int]) -> Callable[[int], Tensor]:
        def run(count: int) -> Tensor:
            self.now += cost(count)
            return torch.empty(0)

        return run


@pytest.mark.parametrize(
    ("a_row", "dense", "expected"),
    [(10, 100, 8), (10, 80, 8), (10, 79, 4), (10, 9, 0), (1, 10**6, MOST_ROWS)],
)
def test_the_crossover_is_where_rows_cost_as_much_as_dequantizing(
    a_row: int, dense: int, expected: int
) -> None:
    clock = Ticking()
    packed = clock.costing(lambda count: a_row * count)
    assert most_rows(packed, clock.costing(lambda count: dense), clock) == expected


def test_the_ratio_of_times_is_of_as_many_rows() -> None:
    clock = Ticking()
    slow, fast = clock.costing(lambda count: 30 * count), clock.costing(lambda count: 10 * count)
    assert time_ratio(slow, fast, 8, clock) == 3
    assert time_ratio(fast, clock.costing(lambda count: 0), 8, clock) == 80


def test_a_kernel_that_is_right_and_far_too_slow_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = w8a8.multiply_onednn

    def slowly(codes: Tensor, *rest: Any) -> Tensor:
        for _ in range(2000):
            product = right(codes, *rest)
        return product

    monkeypatch.setattr(w8a8, "multiply_onednn", slowly)
    # A shape of its own, because a shape is timed once.
    source = random_case(48, 96, -1, bits=8, symmetric=True).layer(activation=PerTokenSymmetric(8))
    choice = choose(source)
    assert choice.module is source
    assert re.fullmatch(r"onednn-int8 takes \d+ times as long as dequantizing here", choice.reason)


def test_signed_codes_never_reach_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor has no instruction for them, they take hundreds of times as long."""
    seen = set[torch.dtype]()
    right = w8a8.multiply_onednn

    def watched(codes: Tensor, *rest: Any) -> Tensor:
        seen.add(codes.dtype)
        return right(codes, *rest)

    monkeypatch.setattr(w8a8, "multiply_onednn", watched)
    for activation in (PerTokenSymmetric(8), PerTensorAffine.from_range(-2, 4, 8)):
        assert kernel(INT8.layer(activation=activation)) == "onednn-int8"
    assert seen == {torch.uint8}
