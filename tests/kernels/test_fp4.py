"""The E2M1 kernels with an operator written from its documentation, for want of a GPU to run it.

`torch.nn.functional.scaled_mm` has FP4 on CUDA only. The one here checks what the real one checks,
finds each scale by cuBLAS's formula, each number in a table, and multiplies in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_qlab.formats import (
    ActivationQuantizer,
    MicroscaledFloat4,
    PerBlockMxfp4,
    PerBlockNvfp4,
    PerTokenFloat8,
)
from pytest_qlab.formats.bits import pack
from pytest_qlab.kernels import fp4
from pytest_qlab.kernels.choose import choose
from pytest_qlab.kernels.fp4 import Float4CudaLinear, Mxfp4CudaLinear, Nvfp4CudaLinear
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.metrics.memory import resident_bytes
from tests.formats.test_block_activations import POINTS
from tests.formats.test_float4 import e4m3
from tests.kernels.packing import U, normal

needs_operator = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "scaled_mm"), reason="this torch has no scaled_mm of blocks"
)
E4M3 = np.array([e4m3(code) for code in range(127)] + [np.nan])
E8M0 = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan])
MX, NV, NV_TOKEN = PerBlockMxfp4("even"), PerBlockNvfp4.from_largest(4.0), PerBlockNvfp4()
KINDS: dict[str, ActivationQuantizer] = {"mxfp4": MX, "nvfp4": NV, "nvfp4-token": NV_TOKEN}
each_kind = pytest.mark.parametrize("activation", KINDS.values(), ids=KINDS)


# The operator


def offsets(rows: int, blocks: int) -> NDArray[np.int64]:
    """Where the scale of each block of each row is: cuBLAS, "1D Block Scaling Factors Layout"."""
    found = np.empty((rows, blocks), dtype=np.int64)
    for outer in range(rows):
        for inner in range(blocks):
            tile = outer // 128 * -(-blocks // 4) + inner // 4
            within = outer % 32 * 16 + outer % 128 // 32 * 4 + inner % 4
            found[outer, inner] = 512 * tile + within
    return found


def numbers(matrix: Tensor, scales: list[Tensor], recipe: list[Any]) -> NDArray[np.float64]:
    """What packed E2M1 pairs (r, n / 2) with tiles of scales stand for: float64 (r, n)."""
    kind = torch.nn.functional.ScalingType
    rows, columns = matrix.shape[0], 2 * matrix.shape[1]
    if recipe == [kind.BlockWise1x32]:
        size, dtype, table, above = 32, torch.float8_e8m0fnu, E8M0, 1.0
    elif recipe == [kind.BlockWise1x16, kind.TensorWise]:
        size, dtype, table = 16, torch.float8_e4m3fn, E4M3
        require(scales[1].dtype == torch.float32 and scales[1].numel() == 1, "one scale above")
        above = float(scales[1])
    else:
        raise ValueError(f"no such recipe for FP4: {recipe}")
    blocks = columns // size
    padded = -(-rows // 128) * 128 * -(-blocks // 4) * 4
    require(scales[0].dtype == dtype, f"scales are {dtype}")
    require(scales[0].numel() == padded and scales[0].is_contiguous(), f"{padded} scales")
    flat = table[scales[0].view(torch.uint8).flatten().numpy()]
    data = matrix.contiguous().view(torch.uint8).numpy()
    elements = np.stack([POINTS[data & 15], POINTS[data >> 4]], -1).reshape(rows, columns)
    each: NDArray[np.float64] = flat[offsets(rows, blocks)].repeat(size, 1) * above
    return elements * each


def require(held: bool, what: str) -> None:
    if not held:
        raise ValueError(f"expected {what}\nand more")


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Any,
    scale_recipe_a: Any,
    scale_b: Any,
    scale_recipe_b: Any,
    swizzle_a: Any = None,
    swizzle_b: Any = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`torch.nn.functional.scaled_mm` of E2M1 numbers, as on CUDA."""
    order = torch.nn.functional.SwizzleType
    given = (scale_a, scale_b, scale_recipe_a, scale_recipe_b, swizzle_a, swizzle_b)
    listed = [each if isinstance(each, list) else [each] for each in given]
    for matrix, stride in ((mat_a, mat_a.stride()), (mat_b, mat_b.stride()[::-1])):
        require(matrix.dtype == torch.float4_e2m1fn_x2, "E2M1 numbers")
        require(stride[0] > stride[1] == 1, "rows by rows and columns by columns")
    require(mat_a.shape[1] % 16 == 0, "multiples of 16 bytes")
    require(all(size % 16 == 0 for size in mat_b.shape), "multiples of 16")
    for swizzle in listed[4:]:
        expected = [order.SWIZZLE_32_4_4, order.NO_SWIZZLE][: len(listed[0])]
        require(swizzle == expected, "tiles of scales")
    require(bias is None, "no bias beside scales of tensors")
    left = numbers(mat_a, listed[0], listed[2])
    right = numbers(mat_b.t(), listed[1], listed[3])
    return torch.from_numpy(left @ right.T).to(output_dtype)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)


@pytest.fixture
def as_on_cuda(operator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that has the operator, and is as fast as dequantizing: the one here is not."""
    for kind in (Mxfp4CudaLinear, Nvfp4CudaLinear):
        right = kind.rounds
        monkeypatch.setattr(
            kind, "applies", lambda source, right=right: isinstance(source.activation, right)
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr("pytest_qlab.kernels.choose.slowdown", lambda *_: 1.0)


# Layers


def random_layer(
    rows: int,
    columns: int,
    activation: ActivationQuantizer | None,
    *,
    mx: bool = False,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[PackedLinear, NDArray[np.float64]]:
    """Random bits, scales like real ones; and the weight, float64."""
    rng = np.random.default_rng(rows + columns)
    codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    mx = mx or isinstance(activation, PerBlockMxfp4)
    size = 32 if mx else 16
    bits = rng.integers(118, 124, (rows, columns // size)) if mx else None
    if bits is None:
        bits = rng.integers(0x38, 0x7F, (rows, columns // size))
    stored = torch.from_numpy(bits.astype(np.uint8))
    above = None if mx else torch.tensor([2.0**-12])
    packed = MicroscaledFloat4.pack(
        torch.from_numpy(codes),
        stored if mx else stored.view(torch.float8_e4m3fn),
        above,
        block_size=size,
    )
    scales = E8M0[bits] if mx else E4M3[bits] * 2.0**-12
    weight: NDArray[np.float64] = POINTS[codes] * scales.repeat(size, 1)
    return PackedLinear(packed, bias, activation, dtype), weight


def kernel_of(layer: PackedLinear) -> Float4CudaLinear:
    mx = isinstance(layer.activation, PerBlockMxfp4)
    return Mxfp4CudaLinear(layer) if mx else Nvfp4CudaLinear(layer)


def exact_inputs(activation: ActivationQuantizer, x: Tensor) -> NDArray[np.float64]:
    """Rounded inputs before they are rounded to the type of `x`."""
    return activation(x.float()).double().numpy()


# The order of scales


@pytest.mark.parametrize(
    ("rows", "blocks"), [(0, 4), (1, 1), (128, 4), (129, 5), (300, 10), (32, 2), (33, 3), (128, 8)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_scales_are_where_the_formula_says(rows: int, blocks: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    scales = torch.randint(1, 127, (rows, blocks), generator=generator).to(torch.uint8)
    tiles = fp4.tiled(scales.view(dtype))
    assert tiles.dtype == dtype
    found = tiles.view(torch.uint8).numpy()
    expected = np.zeros(-(-rows // 128) * 128 * -(-blocks // 4) * 4, dtype=np.uint8)
    expected[offsets(rows, blocks)] = scales.numpy()
    assert np.array_equal(found, expected)
    back = fp4.untiled(tiles, rows, blocks)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), scales)


def test_pairs_are_packed_as_in_the_format() -> None:
    codes = torch.randint(0, 16, (5, 32)).to(torch.uint8)
    assert torch.equal(fp4.pairs(codes), pack(codes, 4))


# Products


@needs_operator
@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("activation", [MX, PerBlockNvfp4(1.0)], ids=["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 64), (144, 160)])
def test_every_weight_comes_through_to_the_bit(
    activation: ActivationQuantizer, rows: int, columns: int
) -> None:
    """Inputs of 6 have the scale 1; products with them are exact in bfloat16."""
    layer, weight = random_layer(rows, columns, activation)
    module = kernel_of(layer)
    (multiply,) = module.paths()
    found = multiply(6 * torch.eye(columns, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.double().numpy().T, 6 * weight)
    assert np.array_equal(module.dequantized().double().numpy(), weight)
    assert np.array_equal(module.weight.double().numpy(), weight)


@needs_operator
@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 5, 130])
@each_kind
def test_products_are_those_of_dequantized_numbers_but_for_rounding_the_outputs(
    activation: ActivationQuantizer, count: int, dtype: torch.dtype
) -> None:
    layer, weight = random_layer(32, 96, activation, dtype=dtype)
    x = normal(count, 96).to(dtype)
    inputs = exact_inputs(activation, x)
    exact = inputs @ weight.T
    off = np.abs(kernel_of(layer).multiply(x).double().numpy() - exact)
    # Scales of inputs are rounded in float32.
    assert (off <= U * np.abs(exact) + 2.0**-22 * np.abs(inputs) @ np.abs(weight).T).all()


@needs_operator
@pytest.mark.usefixtures("operator")
def test_tokens_have_scales_of_their_own_where_calibration_gave_none() -> None:
    layer, _ = random_layer(32, 64, NV_TOKEN)
    module, x = kernel_of(layer), normal(4, 64)
    powers = torch.tensor([[2.0**-40], [1.0], [2.0**40], [0.0]]).bfloat16()
    assert torch.equal(module(x * powers), module(x) * powers)


@needs_operator
@pytest.mark.usefixtures("operator")
@each_kind
def test_shape_bias_and_type_are_those_of_a_linear_layer(activation: ActivationQuantizer) -> None:
    bias = normal(1, 32)[0]
    layer, _ = random_layer(32, 64, activation, bias=bias)
    module, x = kernel_of(layer), normal(6, 64).view(2, 3, 64)
    assert module(x).shape == (2, 3, 32)
    assert module(x[:0]).shape == (0, 3, 32)
    product = module.multiply(x.view(6, 64)).bfloat16()
    assert torch.equal(module(x).view(6, 32), product + bias)
    assert module(x.float()).dtype == torch.float32
    x[1, 2, 5] = float("nan")
    assert torch.isnan(module(x)[1, 2]).all()
    assert torch.isfinite(module(x)[0]).all()


@pytest.mark.parametrize(("activation", "scales"), [(MX, 2 * 2 * 512), (NV, 2 * 3 * 512 + 4)])
def test_the_packed_bits_and_whole_tiles_of_scales_are_resident(
    activation: ActivationQuantizer, scales: int
) -> None:
    """208 rows need two tiles of 128; 192 inputs, 6 or 12 blocks, two or three of 4."""
    layer, _ = random_layer(208, 192, activation)
    assert resident_bytes(kernel_of(layer)) == 208 * 192 // 2 + scales


@needs_operator
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 16, 32), (5, 144, 128), (130, 256, 96)])
def test_torch_itself_takes_the_types_sizes_and_orders(count: int, rows: int, columns: int) -> None:
    """By its own checks of arguments on CUDA, which need no card, as they run without any data."""

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        pairs = [empty(each, columns // 2) for each in (count, rows)]
        powers = [fp4.tiled(empty(each, columns // 32)) for each in (count, rows)]
        above = empty(1, dtype=torch.float32)
        scales = [
            (fp4.tiled(empty(each, columns // 16, dtype=torch.float8_e4m3fn)), above)
            for each in (count, rows)
        ]
        products = [
            fp4.multiply_mxfp4(pairs[0], powers[0], pairs[1], powers[1]),
            fp4.multiply_nvfp4(pairs[0], scales[0], pairs[1], scales[1]),
        ]
        for product in products:
            assert (product.shape, product.dtype) == ((count, rows), torch.bfloat16)
        too_few = empty(powers[0].numel() - 1)
        with pytest.raises(RuntimeError, match="MX scaling"):
            fp4.multiply_mxfp4(pairs[0], too_few, pairs[1], powers[1])
        swapped = (above, scales[0][0])
        with pytest.raises(RuntimeError, match="NV scaling"):
            fp4.multiply_nvfp4(pairs[0], swapped, pairs[1], scales[1])


# Where it is used


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (32, 48), (1, 16)])
def test_shapes_that_it_cannot_take(rows: int, columns: int) -> None:
    layer, _ = random_layer(rows, columns, NV)
    assert "multiples of 32 inputs and 16 outputs" in Nvfp4CudaLinear.refusal(layer)


@each_kind
def test_older_processors_are_refused(
    activation: ActivationQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = random_layer(32, 64, activation)
    kind = type(kernel_of(layer))
    for capability in ((8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        has = ".".join(map(str, capability))
        assert f"capability 10.0 or more; this GPU has {has}" in kind.refusal(layer)
    for enough in ((10, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=enough: it)
        assert kind.refusal(layer) == ""


@each_kind
def test_on_a_cpu_it_is_not_chosen(activation: ActivationQuantizer) -> None:
    layer, _ = random_layer(32, 64, activation)
    choice = choose(layer)
    assert choice.module is layer
    assert choice.reason == "there is no W4A4 matmul on microscaled-float4 kernel here"


@needs_operator
@pytest.mark.parametrize(
    ("activation", "mx"), [(None, True), (None, False), (MX, False), (NV, True)]
)
def test_only_weights_and_inputs_of_one_kind_have_a_kernel(
    activation: ActivationQuantizer | None, mx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedLinear, "device", torch.device("cuda"))
    for kind, own in ((Mxfp4CudaLinear, MX), (Nvfp4CudaLinear, NV)):
        assert kind.applies(random_layer(32, 64, own)[0])
        assert not kind.applies(random_layer(32, 64, PerTokenFloat8(), mx=own is MX)[0])
    layer = PackedLinear(
        random_layer(32, 64, None, mx=mx)[0].packed, None, activation, torch.bfloat16
    )
    assert not Mxfp4CudaLinear.applies(layer)
    assert not Nvfp4CudaLinear.applies(layer)


@needs_operator
@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(
    "activation",
    [*KINDS.values(), PerBlockNvfp4.from_largest(1e-3), PerBlockNvfp4.from_largest(1e4)],
)
def test_where_it_is_right_it_is_chosen_and_adds_nothing_to_the_weight(
    activation: ActivationQuantizer,
) -> None:
    layer, _ = random_layer(32, 128, activation)
    choice = choose(layer)
    assert choice.reason == ""
    assert isinstance(choice.module, Float4CudaLinear)
    assert not choice.module.simulated
    kind = "mxfp4" if activation is MX else "nvfp4"
    assert choice.module.kernel == f"scaled_mm-{kind}-cuda"
    assert choice.rounding == 0


def row_by_row(scales: Tensor) -> Tensor:
    """Not in tiles, but as many."""
    found = torch.zeros_like(RIGHT_ORDER(scales).view(torch.uint8))
    found[: scales.numel()] = scales.view(torch.uint8).flatten()
    return found.view(scales.dtype)


def tiles_column_by_column(scales: Tensor) -> Tensor:
    tiles = RIGHT_ORDER(scales).view(torch.uint8).view(-(-len(scales) // 128), -1, 512)
    return tiles.transpose(0, 1).flatten().view(scales.dtype)


def refuses(*_: object, **__: object) -> Tensor:
    raise NotImplementedError("MXFP4 scaling only supported on others\nand more")


def is_nan(*given: Any, **named: Any) -> Tensor:
    return scaled_mm(*given, **named) * float("nan")


RIGHT_ORDER = fp4.tiled
OFF, FAILED = " is off by ", " failed: expected "
BROKEN: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "scales row by row": ("tiled", row_by_row, OFF),
    "tiles column by column": ("tiled", tiles_column_by_column, OFF),
    "no padding": ("tiled", lambda scales: scales.flatten(), FAILED),
    "pairs swapped": ("pairs", lambda codes: codes[:, 1::2] | codes[:, ::2] << 4, OFF),
    "nan": ("scaled_mm", is_nan, " is off by nan"),
    "raises": ("scaled_mm", refuses, " failed: MXFP4 scaling only supported on others"),
}


@needs_operator
@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(("what", "broken", "reason"), BROKEN.values(), ids=BROKEN)
@each_kind
def test_where_it_is_wrong_it_is_not_used(
    activation: ActivationQuantizer,
    what: str,
    broken: Callable[..., Tensor],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, _ = random_layer(144, 256, activation)
    monkeypatch.setattr(torch.nn.functional if what == "scaled_mm" else fp4, what, broken)
    choice = choose(layer)
    assert choice.module is layer
    assert f"cuda{reason}" in choice.reason
    assert "\n" not in choice.reason


@needs_operator
@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("which", [1, 3])
@pytest.mark.parametrize("activation", [NV, PerBlockNvfp4.from_largest(1e-3)])
def test_a_scale_above_that_is_forgotten_is_noticed(
    which: int, activation: ActivationQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fp4.multiply_nvfp4

    def forgets(*given: Any) -> Tensor:
        parts = list(given)
        parts[which] = (parts[which][0], torch.ones(1))
        return right(*parts)

    monkeypatch.setattr(fp4, "multiply_nvfp4", forgets)
    layer, _ = random_layer(32, 128, activation)
    assert " is off by " in choose(layer).reason


@needs_operator
@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e4])
def test_probes_fill_the_calibrated_range(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far beyond or below it, all blocks would have one scale, and one for another go unnoticed."""
    right = fp4.multiply_nvfp4

    def takes_the_neighbours(codes: Tensor, scales: tuple[Tensor, Tensor], *rest: Any) -> Tensor:
        blocks = fp4.untiled(scales[0], len(codes), 8).view(torch.uint8).roll(1, 1)
        return right(codes, (fp4.tiled(blocks.view(torch.float8_e4m3fn)), scales[1]), *rest)

    monkeypatch.setattr(fp4, "multiply_nvfp4", takes_the_neighbours)
    layer, _ = random_layer(32, 128, PerBlockNvfp4.from_largest(largest))
    assert " is off by " in choose(layer).reason


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp4.CAPABILITY,
    reason="needs a CUDA device that multiplies E2M1 numbers",
)
@pytest.mark.parametrize("activation", [MX, PerBlockNvfp4(1.0)], ids=["mxfp4", "nvfp4"])
def test_every_weight_comes_through_on_cuda(activation: ActivationQuantizer) -> None:
    layer, weight = random_layer(144, 160, activation)
    layer = layer.cuda()
    kind = Mxfp4CudaLinear if activation is MX else Nvfp4CudaLinear
    assert kind.applies(layer)
    choice = choose(layer)
    if "MXFP4 scaling" in choice.reason:  # torch has it on some of these processors
        pytest.skip(choice.reason)
    assert isinstance(choice.module, kind)
    for count in (1, 160):
        x = 6 * torch.eye(160, dtype=torch.bfloat16)[:count].cuda()
        found = choice.module.multiply(x).double().cpu().numpy()
        assert np.array_equal(found, 6 * weight.T[:count])
