"""The E4M3 kernel, on a CPU, where its operator is slow but the same; and where it is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.formats import ActivationQuantizer, PerTokenFloat8, ScaledFloat8
from pytest_qlab.kernels import fp8
from pytest_qlab.kernels.choose import choose
from pytest_qlab.kernels.fp8 import Float8CudaLinear
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import has_operator
from pytest_qlab.metrics.memory import resident_bytes
from tests.formats.test_float8 import e4m3, from_bits
from tests.kernels.packing import U, normal

needs_operator = pytest.mark.skipif(
    not has_operator("aten", "_scaled_mm"), reason="this build of torch has no scaled matmul"
)
ACTIVATION = PerTokenFloat8()


def random_layer(
    rows: int,
    columns: int,
    *,
    exact: bool = False,
    bias: Tensor | None = None,
    activation: ActivationQuantizer | None = ACTIVATION,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[PackedLinear, NDArray[np.float64]]:
    """Random bits, scales like real ones or, if `exact`, powers of 2; and the weight, float64."""
    rng = np.random.default_rng(rows + columns)
    codes = rng.integers(0, 127, (rows, columns)) + 128 * rng.integers(0, 2, (rows, columns))
    scales = 2.0 ** rng.integers(-12, -4, rows) if exact else rng.uniform(1e-4, 1e-3, rows)
    stored = torch.from_numpy(scales).float().unsqueeze(1)
    packed = ScaledFloat8(from_bits(torch.from_numpy(codes)), stored)
    elements = np.array([[e4m3(int(code)) for code in row] for row in codes])
    weight: NDArray[np.float64] = elements * stored.double().numpy()
    return PackedLinear(packed, bias, activation, dtype), weight


@needs_operator
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 64), (96, 32)])
def test_every_weight_comes_through_to_the_bit(rows: int, columns: int) -> None:
    """Inputs of 448 have the scale 1; products of 448 and E4M3 numbers are exact in bfloat16."""
    layer, weight = random_layer(rows, columns, exact=True)
    module = Float8CudaLinear(layer)
    (multiply,) = module.paths()
    found = multiply(448 * torch.eye(columns, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.double().numpy().T, 448 * weight)
    assert np.array_equal(module.dequantized().double().numpy(), weight)
    assert np.array_equal(module.weight.double().numpy(), weight)


@needs_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_products_are_those_of_dequantized_numbers_but_for_rounding_the_outputs(
    count: int, dtype: torch.dtype
) -> None:
    layer, weight = random_layer(32, 64, dtype=dtype)
    x = normal(count, 64).to(dtype)
    codes, scale = ACTIVATION.codes(x)
    inputs = codes.double().numpy() * scale.double().numpy()
    exact = inputs @ weight.T
    off = np.abs(Float8CudaLinear(layer).multiply(x).double().numpy() - exact)
    # Sums and scales are rounded in float32.
    assert (off <= U * np.abs(exact) + 66 * 2.0**-23 * np.abs(inputs) @ np.abs(weight).T).all()


@needs_operator
def test_tokens_have_scales_of_their_own() -> None:
    """Powers of 2 between tokens come out again, and a token of zeros gives zeros."""
    layer, _ = random_layer(32, 64)
    module, x = Float8CudaLinear(layer), normal(4, 64)
    powers = torch.tensor([[2.0**-60], [1.0], [2.0**60], [0.0]]).bfloat16()
    assert torch.equal(module(x * powers), module(x) * powers)


@needs_operator
def test_shape_bias_and_type_are_those_of_a_linear_layer() -> None:
    bias = normal(1, 32)[0]
    layer, _ = random_layer(32, 64, bias=bias)
    module, x = Float8CudaLinear(layer), normal(6, 64).view(2, 3, 64)
    assert module(x).shape == (2, 3, 32)
    assert torch.equal(module(x).view(6, 32), module.multiply(x.view(6, 64)) + bias)
    assert module(x.float()).dtype == torch.float32
    x[1, 2, 5] = float("nan")
    assert torch.isnan(module(x)[1, 2]).all()
    assert torch.isfinite(module(x)[0]).all()


@needs_operator
def test_the_packed_bits_alone_are_resident() -> None:
    layer, _ = random_layer(32, 64)
    assert resident_bytes(Float8CudaLinear(layer)) == layer.packed.nbytes == 32 * 64 + 4 * 32


@pytest.mark.parametrize(("rows", "columns"), [(17, 64), (32, 40), (1, 1)])
def test_shapes_that_it_cannot_take(rows: int, columns: int) -> None:
    layer, _ = random_layer(rows, columns)
    assert "multiples of 16 inputs and outputs" in Float8CudaLinear.refusal(layer)


@pytest.mark.parametrize(("capability", "reason"), [((8, 6), "8.9 or more; this GPU has 8.6")])
def test_older_processors_are_refused(
    capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = random_layer(32, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in Float8CudaLinear.refusal(layer)
    for enough in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=enough: it)
        assert Float8CudaLinear.refusal(layer) == ""


def test_on_a_cpu_it_is_not_chosen() -> None:
    layer, _ = random_layer(32, 64)
    choice = choose(layer)
    assert choice.module is layer
    assert choice.reason == "there is no W8A8 matmul on scaled-float8 kernel here"


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Float8CudaLinear, "applies", lambda source: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@needs_operator
@pytest.mark.usefixtures("as_on_cuda")
def test_where_it_is_right_it_is_chosen_and_adds_nothing_to_the_weight() -> None:
    layer, _ = random_layer(32, 64)
    choice = choose(layer)
    assert isinstance(choice.module, Float8CudaLinear)
    assert not choice.module.simulated
    assert (choice.module.kernel, choice.reason) == ("scaled_mm-cuda", "")
    assert choice.rounding == 0


def without_inputs_scale(codes: Tensor, scale: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return RIGHT(codes, torch.ones_like(scale), weight, scales)


def with_a_neighbours_scale(codes: Tensor, scale: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return RIGHT(codes, scale, weight, scales.roll(1, 0))


def refuses(*_: object) -> Tensor:
    raise RuntimeError("no rowwise scaling here\nand more")


RIGHT = fp8.multiply_scaled
BROKEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "inputs' scale": (without_inputs_scale, "scaled_mm-cuda is off by"),
    "weights' scale": (with_a_neighbours_scale, "scaled_mm-cuda is off by"),
    "nan": (lambda *given: RIGHT(*given) * float("nan"), "scaled_mm-cuda is off by nan"),
    "raises": (refuses, "scaled_mm-cuda failed: no rowwise scaling here"),
}


@needs_operator
@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(("broken", "reason"), BROKEN.values(), ids=BROKEN)
def test_where_it_is_wrong_it_is_not_used(
    broken: Callable[..., Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "multiply_scaled", broken)
    layer, _ = random_layer(32, 64)
    choice = choose(layer)
    assert choice.module is layer
    assert choice.reason.startswith(reason)


def test_weights_alone_have_no_kernel() -> None:
    layer, _ = random_layer(32, 64, activation=None)
    assert not Float8CudaLinear.applies(layer)
    assert choose(layer).reason == "there is no W8 matmul on scaled-float8 kernel here"


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.CAPABILITY,
    reason="needs a CUDA device that multiplies E4M3 numbers",
)
def test_every_weight_comes_through_on_cuda() -> None:
    layer, weight = random_layer(48, 64, exact=True)
    layer = layer.cuda()
    assert Float8CudaLinear.applies(layer)
    assert isinstance(choose(layer).module, Float8CudaLinear)
    for count in (1, 64):
        x = 448 * torch.eye(64, dtype=torch.bfloat16)[:count].cuda()
        found = Float8CudaLinear(layer).multiply(x).double().cpu().numpy()
        assert np.array_equal(found, 448 * weight.T[:count])
