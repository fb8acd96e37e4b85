"""The int8 kernels: exact in whole numbers, and within rounding of float64 otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_qlab.formats import ActivationQuantizer, PerTensorAffine, PerTokenSymmetric
from pytest_qlab.kernels.int8 import Int8Linear
from pytest_qlab.kernels.real import has_operator
from pytest_qlab.kernels.w8a8 import W8A8CpuLinear, W8A8CudaLinear, W8A8Linear
from tests.kernels.packing import Case, U, normal, random_case

needs_int8pack = pytest.mark.skipif(
    not has_operator("aten", "_weight_int8pack_mm"),
    reason="this build of torch has no packed int8 matmul",
)
needs_onednn = pytest.mark.skipif(
    not has_operator("onednn", "qlinear_prepack"), reason="this build of torch has no onednn"
)
# torch._int_mm runs on a CPU, too, so that the arithmetic around it is tested without a GPU.
BOTH = pytest.mark.parametrize(
    "kind", [pytest.param(W8A8CpuLinear, marks=needs_onednn), W8A8CudaLinear]
)


def per_row(rows: int, columns: int, *, exact: bool = False, symmetric: bool = True) -> Case:
    return random_case(rows, columns, -1, bits=8, symmetric=symmetric, exact=exact)


@needs_int8pack
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_every_weight_comes_through_to_the_bit(rows: int) -> None:
    case = per_row(rows, 96, exact=True)
    module = Int8Linear(case.layer())
    expected = torch.from_numpy(case.exact).float()
    for path in module.paths():
        assert torch.equal(path(torch.eye(96, dtype=torch.bfloat16)).float().t(), expected)
    assert torch.equal(module.dequantized(), expected)
    assert torch.equal(module.weight.float(), expected)


@needs_int8pack
def test_tiles_of_a_wide_weight_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_qlab.kernels.int8.TILE_ELEMENTS", 32 * 20)
    case = per_row(50, 32, exact=True)
    product = Int8Linear(case.layer()).dense_multiply(torch.eye(32, dtype=torch.bfloat16))
    assert torch.equal(product.float().t(), torch.from_numpy(case.exact).float())


@needs_int8pack
@pytest.mark.parametrize("count", [1, 40])
def test_products_are_within_what_rounding_to_bfloat16_may_do(count: int) -> None:
    case, x = per_row(33, 64), normal(count, 64)
    bias = normal(1, 33)[0]
    module, rows = Int8Linear(case.layer(bias=bias)), x.double().numpy()
    exact = rows @ case.exact.T
    sums = 64 * 2.0**-23 * np.abs(rows) @ np.abs(case.exact).T
    for path in module.paths():
        off = np.abs(path(x).double().numpy() - exact)
        # The scale, the output, and on the dense path the output before its scale.
        assert (off <= (1 + 3 * U) * (3 * U * np.abs(exact) + sums)).all()
    assert torch.equal(module(x), module.multiply(x) + bias)


def test_weights_that_it_cannot_take() -> None:
    assert "multiples of 32 inputs" in Int8Linear.refusal(per_row(4, 40).layer())
    assert "zero points" in Int8Linear.refusal(per_row(4, 64, symmetric=False).layer())
    grouped = random_case(4, 64, 32, bits=8, symmetric=True)
    assert "one scale for each row" in Int8Linear.refusal(grouped.layer())
    assert "one scale for each row" in W8A8CpuLinear.refusal(grouped.layer())
    assert "multiples of 8" in W8A8CudaLinear.refusal(per_row(4, 64).layer())


@BOTH
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 33), (64, 128)])
def test_whole_numbers_are_multiplied_exactly(
    kind: type[W8A8Linear], rows: int, columns: int, count: int
) -> None:
    """Scales of 1 and a largest input of 127: every sum is a whole number below 2**24."""
    case = random_case(rows, columns, -1, bits=8, symmetric=True)
    case.scales.fill_(1.0)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (count, columns), generator=generator).float()
    x[:, 0] = 127
    module = kind(case.layer(activation=PerTokenSymmetric(8), dtype=torch.float32))
    expected = torch.from_numpy(x.double().numpy() @ case.exact.T).float()
    assert torch.equal(module(x), expected)
    assert torch.equal(module.dequantized(), torch.from_numpy(case.exact).float())


@BOTH
@pytest.mark.parametrize("zero_point", [0, 100, 255])
def test_a_fixed_grid_shifts_and_saturates(kind: type[W8A8Linear], zero_point: int) -> None:
    case = per_row(24, 40, exact=True)
    x = torch.arange(-300, 300).float()[: 40 * 15].view(15, 40)
    module = kind(case.layer(activation=PerTensorAffine(8, 1.0, zero_point), dtype=torch.float32))
    clipped = np.clip(x.double().numpy(), -zero_point, 255 - zero_point)
    assert torch.equal(module(x), torch.from_numpy(clipped @ case.exact.T).float())


@BOTH
@pytest.mark.parametrize(
    "activation", [PerTokenSymmetric(8), PerTensorAffine.from_range(-3.0, 2.0, 8)]
)
def test_inputs_are_rounded_as_where_it_is_simulated(
    kind: type[W8A8Linear], activation: ActivationQuantizer
) -> None:
    case, x = per_row(16, 64), normal(9, 64).float()
    layer = case.layer(activation=activation, dtype=torch.float32)
    exact = activation(x).double().numpy() @ case.exact.T
    size = np.abs(activation(x).double().numpy()) @ np.abs(case.exact).T
    assert (np.abs(kind(layer)(x).double().numpy() - exact) <= 64 * 2.0**-23 * size).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [1, 30])
def test_whole_numbers_are_multiplied_exactly_on_cuda(count: int) -> None:
    case = per_row(64, 128, exact=True)
    layer = case.layer(activation=PerTensorAffine(8, 1.0, 100), dtype=torch.float32).cuda()
    assert W8A8CudaLinear.applies(layer)
    x = torch.arange(count * 128).float().view(count, 128) % 156
    product = W8A8CudaLinear(layer)(x.cuda()).cpu()
    assert torch.equal(product, torch.from_numpy(x.double().numpy() @ case.exact.T).float())
