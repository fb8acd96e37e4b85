"""The same weights through hqq, bitsandbytes and torchao, where they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab.formats import (
    BlockwiseTable,
    MicroscaledFloat4,
    PerBlockMxfp4,
    PerBlockNvfp4,
)
from pytest_qlab.kernels.fp4 import tiled, untiled
from pytest_qlab.methods.blockwise import Fp4, Nf4
from pytest_qlab.methods.hqq import Hqq
from pytest_qlab.methods.microscaled import Mxfp4, Nvfp4
from pytest_qlab.solvers.hqq import HqqRule
from tests.toy import toy_weight

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def weights() -> dict[str, Tensor]:
    """Bell-shaped, heavy-tailed, small, and the toy weight; widths that every library takes."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(96, 512, generator=generator)
    return {
        "normal": normal,
        "heavy": normal**3,
        "like a model's": 0.02 * normal + 0.001,
        "bfloat16": normal.bfloat16().float(),  # often halfway between two points
        "toy": toy_weight(),
    }


WEIGHTS = weights()
named = pytest.mark.parametrize("name", WEIGHTS)


@named
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (3, 64), (2, 16), (4, 128)])
def test_hqq(name: str, bits: int, group_size: int, optimize: bool) -> None:
    """Grids and codes before storage, equal but for sums in another order; then what is stored."""
    quantize = pytest.importorskip(
        "hqq.core.quantize", reason="hqq is no dependency: pip install hqq==0.2.8.post1"
    )
    weight = WEIGHTS[name]
    theirs, meta = quantize.Quantizer.quantize(
        weight,
        nbits=bits,
        channel_wise=True,
        group_size=group_size,
        optimize=optimize,
        round_zero=bits == 4,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    rule = HqqRule(bits, group_size, optimize=optimize)
    grid = rule.solve(weight)
    groups = (len(weight), -1, 1)
    scale, zero = meta["scale"].float().view(groups), meta["zero"].float().view(groups)
    assert torch.allclose(1 / grid.inverse, scale[..., 0], rtol=1e-6)
    assert torch.allclose(grid.zero, zero[..., 0], rtol=0, atol=2e-5 * 2**bits)
    codes = theirs.float().view(len(weight), -1, group_size)
    ours = weight.view_as(codes) * grid.inverse.unsqueeze(-1) + grid.zero.unsqueeze(-1)
    ours = ours.round().clamp(0, 2**bits - 1)
    assert float((ours != codes).float().mean()) < 1e-4
    whole: Any = bits
    method = Hqq(bits=whole, group_size=group_size, optimize=optimize)
    stored = method.quantize(weight, None).weight.dequantize()
    exact = ((codes - zero) * scale).view_as(weight)
    off, ours_off = (float((each - weight).norm()) for each in (exact, stored))
    assert ours_off == pytest.approx(off, rel=2e-3 if bits < 8 else 0.05)


@named
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", [Nf4, Fp4])
def test_bitsandbytes(
    name: str, kind: type[Nf4 | Fp4], block_size: int, double_quant: bool
) -> None:
    """Every byte of codes, absmax and their scales; 8-bit absmax but for a few.

    On the CPU, bitsandbytes finds those by a table of rounded values: some are not the nearest.
    """
    functional = pytest.importorskip(
        "bitsandbytes.functional",
        reason="bitsandbytes is no dependency: pip install bitsandbytes==0.50.2",
    )
    weight = WEIGHTS[name]
    codes, state = functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind.name, compress_statistics=double_quant
    )
    method = kind(block_size=block_size, double_quant=double_quant)
    ours = method.quantize(weight, None).weight
    assert isinstance(ours, BlockwiseTable)
    assert torch.equal(ours.packed_codes, codes.flatten())
    stored = ours.tensors()
    theirs = functional.dequantize_4bit(codes, state).view(-1, block_size)
    found = ours.dequantize().view(-1, block_size)
    if double_quant:
        off = stored["absmax_codes"].int() - state.absmax.int()
        assert int(off.abs().max()) <= 1
        assert float((off != 0).float().mean()) < 0.02
        assert torch.equal(stored["absmax_scales"], state.state2.absmax)
        assert torch.equal(stored["absmax_offset"], state.offset.reshape(1))
        assert torch.equal(found[off == 0], theirs[off == 0])
    else:
        assert torch.equal(stored["absmax"], state.absmax)
        assert torch.equal(found, theirs)


@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (1, 1), (5, 33), (7, 130)])
@pytest.mark.parametrize("kind", [Nf4, Fp4])
def test_bitsandbytes_odd_sizes(kind: type[Nf4 | Fp4], rows: int, columns: int) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional",
        reason="bitsandbytes is no dependency: pip install bitsandbytes==0.50.2",
    )
    weight = WEIGHTS["normal"][:rows, :columns].contiguous()
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind.name)
    ours = kind().quantize(weight, None).weight
    assert isinstance(ours, BlockwiseTable)
    assert torch.equal(ours.packed_codes, codes.flatten())
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(codes, state))


@named
@pytest.mark.parametrize(
    ("rule", "mode"), [("floor", "FLOOR"), ("ceil", "RCEIL"), ("even", "EVEN")]
)
def test_torchao_mxfp4(name: str, rule: Any, mode: str) -> None:
    mx = pytest.importorskip(
        "torchao.prototype.mx_formats.mx_tensor",
        reason="torchao is no dependency: pip install torchao==0.18.0",
    )
    weight = WEIGHTS[name]
    scales, data = mx.to_mx(
        weight, torch.float4_e2m1fn_x2, 32, scaling_mode=mx.ScaleCalculationMode[mode]
    )
    ours = Mxfp4(scale=rule).quantize(weight, None).weight
    assert isinstance(ours, MicroscaledFloat4)
    assert torch.equal(ours.scales, scales.view(torch.uint8).view_as(ours.scales))
    assert torch.equal(ours.tensors()["codes"], data.view(torch.uint8).view(len(weight), -1))


@named
def test_torchao_nvfp4(name: str) -> None:
    """Quotients are rounded in another order there: codes may differ halfway between two points."""
    nv = pytest.importorskip(
        "torchao.prototype.mx_formats.nvfp4_tensor",
        reason="torchao is no dependency: pip install torchao==0.18.0",
    )
    weight = WEIGHTS[name]
    tensor_scale = nv.per_tensor_amax_to_scale(weight.abs().max())
    scales, data = nv.nvfp4_quantize(weight, per_tensor_scale=tensor_scale)
    ours = Nvfp4().quantize(weight, None).weight
    assert isinstance(ours, MicroscaledFloat4)
    assert ours.tensor_scale is not None
    assert float(ours.tensor_scale) == pytest.approx(float(tensor_scale), rel=1e-6)
    same = ours.scales.view(torch.uint8) == scales.view(torch.uint8).view(len(weight), -1)
    # torchao has no scales below 2**-6; where the tensor's spread is that wide, blocks differ.
    ordinary = scales.float().view(len(weight), -1) > 2.0**-6
    assert bool(same[ordinary].all())
    unequal = ours.tensors()["codes"] != data.view(torch.uint8).view(len(weight), -1)
    inside = ordinary.repeat_interleave(8, 1)
    assert float(unequal[inside].float().mean()) < 1e-4


@named
@pytest.mark.parametrize(
    ("rule", "mode"), [("floor", "FLOOR"), ("ceil", "RCEIL"), ("even", "EVEN")]
)
def test_torchao_mxfp4_inputs(name: str, rule: Any, mode: str) -> None:
    mx = pytest.importorskip(
        "torchao.prototype.mx_formats.mx_tensor",
        reason="torchao is no dependency: pip install torchao==0.18.0",
    )
    x = WEIGHTS[name]
    theirs = mx.MXTensor.to_mx(
        x, torch.float4_e2m1fn_x2, 32, scaling_mode=mx.ScaleCalculationMode[mode]
    )
    assert torch.equal(PerBlockMxfp4(rule)(x), theirs.dequantize(torch.float32))


@named
@pytest.mark.parametrize("share", [None, 1.0, 0.25])
def test_torchao_nvfp4_inputs(name: str, share: float | None) -> None:
    """With a range found at run time, which is of all tokens there: of one, here. And calibrated.

    Halfway between two numbers, and where torchao's scales end, they may differ.
    """
    nv = pytest.importorskip(
        "torchao.prototype.mx_formats.nvfp4_tensor",
        reason="torchao is no dependency: pip install torchao==0.18.0",
    )
    for start in range(16):
        token = WEIGHTS[name][start : start + 1]
        seen = (share or 1.0) * token.abs().max()
        ours = PerBlockNvfp4() if share is None else PerBlockNvfp4.from_largest(float(seen))
        theirs = nv.NVFP4Tensor.to_nvfp4(token, per_tensor_scale=nv.per_tensor_amax_to_scale(seen))
        expected, found = theirs.dequantize(torch.float32), ours(token)
        ordinary = (theirs.scale.float() > 2.0**-6).repeat_interleave(16, 1)
        off = ~torch.isclose(found, expected, rtol=1e-6, atol=0)
        assert int(off[ordinary].sum()) <= 2
        assert float(ordinary.float().mean()) > 0.9


def test_torchaos_order_of_block_scales() -> None:
    utils = pytest.importorskip(
        "torchao.prototype.mx_formats.utils",
        reason="torchao is no dependency: pip install torchao==0.18.0",
    )
    generator = torch.Generator().manual_seed(0)
    for rows, blocks in ((7, 3), (128, 4), (200, 9), (300, 16)):
        scales = torch.randint(0, 255, (rows, blocks), generator=generator).to(torch.uint8)
        theirs = utils.to_blocked(scales).flatten()
        assert torch.equal(tiled(scales), theirs)
        assert torch.equal(untiled(theirs, rows, blocks), scales)
