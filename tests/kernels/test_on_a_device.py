"""Packed layers and the kernels that run them, on the stand-in for a CUDA device.

Operators that a CPU has not are those of `tests.standin`, made from their documentation.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pytest_qlab.formats.activations import PerTensorAffine, PerTokenFloat8, PerTokenSymmetric
from pytest_qlab.formats.affine import AffineGroups
from pytest_qlab.kernels import crossover
from pytest_qlab.kernels.choose import choose
from pytest_qlab.kernels.embedding import PackedEmbedding
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import KernelLinear, has_operator
from pytest_qlab.methods.base import QuantizedLayer
from pytest_qlab.specs import parse_specs
from pytest_qlab.testing import gaussian_weight
from pytest_qlab.testing.conformance import quantize
from tests.kernels.packing import U, random_case
from tests.standin import StandInDevice

FORMATS = ("rtn", "nf4", "mxfp4", "nvfp4", "ggml:Q4_K", "fp8", "dynamic", "static", "spqr", "quip")


def quantized(spec: str, rows: int = 16, columns: int = 64) -> QuantizedLayer:
    method = parse_specs([spec])[0].method
    return quantize(method, gaussian_weight(rows, columns), gaussian_weight(40, columns, seed=1))


@pytest.fixture
def always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is refused for its time, which a CPU's says nothing about."""
    monkeypatch.setattr(crossover, "_known", {})
    monkeypatch.setattr(crossover, "_slowdowns", {})

    def least(run: Callable[[int], Tensor], count: int, clock: Callable[[], int]) -> int:
        run(count)
        return 0

    monkeypatch.setattr(crossover, "_least", least)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("spec", FORMATS)
def test_a_packed_layer_that_is_moved(spec: str) -> None:
    """It multiplies as on the CPU, keeps its weight there, and moves back."""
    layer, bias = quantized(spec), gaussian_weight(1, 16, seed=2)[0]
    made = [PackedLinear(layer.weight, bias, layer.activation, torch.float32) for _ in range(2)]
    here, there = made[0], made[1].to("cuda:0")
    x = gaussian_weight(3, 64, seed=3)
    expected = here(x)
    assert not there.materialized
    for _ in range(2):
        found = there(x.cuda())
        assert found.is_cuda
        assert torch.equal(found.cpu(), expected)
        there.materialize()
        assert there.materialized
    there.to("cpu")
    assert not there.materialized
    assert torch.equal(there(x), expected)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("spec", ["rtn", "nf4:double_quant", "ggml:Q4_K"])
def test_a_packed_embedding_that_is_moved(spec: str) -> None:
    weight = quantized(spec).weight
    ids = torch.tensor([[3, 0], [15, 3]])
    found = PackedEmbedding(weight, torch.float32).to("cuda:0")(ids.cuda())
    assert found.is_cuda
    assert torch.equal(found.cpu(), weight.dequantize()[ids])


@pytest.mark.usefixtures("always_fast", "cuda")
@pytest.mark.parametrize("scattered", [False, True])
def test_int4_weights_come_through_to_the_bit(scattered: bool) -> None:
    """Rows of the identity pick single weights, which bfloat16 holds: nothing may differ."""
    case = random_case(64, 256, 64, scattered=scattered, exact=True)
    choice = choose(case.layer().to("cuda:0"))
    assert choice.reason == ""
    module = choice.module
    assert isinstance(module, KernelLinear)
    assert module.kernel == "int4pack-cuda"
    expected = torch.from_numpy(case.exact).float()
    for path in module.paths():
        product = path(torch.eye(256, dtype=torch.bfloat16, device="cuda:0"))
        assert torch.equal(product.float().cpu().t(), expected)
    assert torch.equal(module.dequantized().cpu(), expected)


@pytest.mark.usefixtures("always_fast", "cuda")
@pytest.mark.parametrize(
    "activation", [PerTokenSymmetric(8), PerTensorAffine(8, 0.03, 117)], ids=["token", "tensor"]
)
@pytest.mark.parametrize("count", [1, 17, 40])
def test_int8_products_are_those_of_dequantized_numbers(
    activation: PerTokenSymmetric | PerTensorAffine, count: int
) -> None:
    codes = torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(0))
    scales = (0.01 + gaussian_weight(24, 1).abs() / 100).half()
    packed = AffineGroups.pack(codes, scales, None, bits=8, group_size=-1)
    source = PackedLinear(packed, None, activation, torch.bfloat16)
    choice = choose(source.to("cuda:0"))
    assert isinstance(choice.module, KernelLinear)
    assert choice.module.kernel == "int_mm-cuda"
    x = gaussian_weight(count, 64, seed=1).bfloat16()
    found = choice.module.multiply(x.cuda()).cpu()
    assert torch.allclose(found.double(), exact(activation, x, packed), rtol=1e-5, atol=1e-5)


def exact(
    activation: PerTokenSymmetric | PerTensorAffine, x: Tensor, packed: AffineGroups
) -> Tensor:
    """Of codes and scales in float64, which rounds none of them."""
    weight = (packed.codes().double() - 128) * packed.scales.double()
    if isinstance(activation, PerTensorAffine):
        inputs = (activation.codes(x).double() - activation.zero_point) * activation.scale
    else:
        codes, scale = activation.codes(x)
        inputs = codes.double() * scale.double()
    return inputs @ weight.T


@pytest.mark.skipif(
    not has_operator("aten", "_scaled_mm"), reason="this build of torch has no scaled matmul"
)
@pytest.mark.usefixtures("always_fast")
def test_e4m3_products_and_the_card_they_take(cuda: StandInDevice) -> None:
    layer = quantized("fp8")
    assert isinstance(layer.activation, PerTokenFloat8)
    source = PackedLinear(layer.weight, None, layer.activation, torch.bfloat16).to("cuda:0")
    module = choose(source).module
    assert isinstance(module, KernelLinear)
    assert module.kernel == "scaled_mm-cuda"
    x = gaussian_weight(5, 64, seed=1).bfloat16()
    expected = layer.activation(x.double()) @ layer.weight.dequantize().double().T
    off = (module.multiply(x.cuda()).cpu().double() - expected).abs()
    assert bool((off <= U * expected.abs() + 1e-5).all())
    cuda.capability = (8, 6)
    choice = choose(source)
    assert choice.module is source
    assert choice.reason.endswith("takes compute capability 8.9 or more; this GPU has 8.6")


@pytest.mark.usefixtures("cuda")
def test_kernels_of_the_cpu_are_not_for_the_device() -> None:
    """int8 weights alone have one there and none on CUDA: they dequantize."""
    source = PackedLinear(
        quantized("rtn:bits=8:group_size=-1:symmetric").weight, None, None, torch.bfloat16
    )
    assert (
        choose(source.to("cuda:0")).reason == "there is no W8 matmul on affine-groups kernel here"
    )


def test_times_are_taken_when_the_device_is_done(cuda: StandInDevice) -> None:
    clock = crossover._clock(torch.device("cuda:0"))
    first, second = clock(), clock()
    assert second >= first
    assert cuda.synchronized == 2
