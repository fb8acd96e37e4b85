"""The int4 kernel: every weight to the bit through the operator, and products within a bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.kernels import int4
from pytest_qlab.kernels.int4 import GROUPS, Int4CpuLinear, Int4CudaLinear
from pytest_qlab.kernels.real import has_operator
from tests.kernels.packing import Case, U, normal, random_case

pytestmark = pytest.mark.skipif(
    not has_operator("aten", "_weight_int4pack_mm_for_cpu"),
    reason="this build of torch has no packed int4 matmul for CPUs",
)


def assert_exact(case: Case) -> None:
    """Rows of the identity pick single weights, which bfloat16 holds: nothing may differ."""
    module = Int4CpuLinear(case.layer())
    expected = torch.from_numpy(case.exact).float()
    identity = torch.eye(len(case.groups), dtype=torch.bfloat16)
    for path in module.paths():
        assert torch.equal(path(identity).float().t(), expected)
    assert torch.equal(module.dequantized(), expected)
    assert torch.equal(module.weight, expected.to(torch.bfloat16))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 144])
def test_every_weight_comes_through_to_the_bit(rows: int, group_size: int) -> None:
    assert_exact(random_case(rows, 2 * group_size, group_size, exact=True))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9).map(lambda n: 16 * n),
    groups=st.integers(1, 4),
    zeros=st.sampled_from(["whole", "real", "implied"]),
    scattered=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_codes_zeros_and_column_orders(
    rows: int, groups: int, zeros: str, scattered: bool, seed: int
) -> None:
    assert_exact(
        random_case(
            rows,
            32 * groups,
            32,
            symmetric=zeros == "implied",
            real_zeros=zeros == "real",
            scattered=scattered,
            exact=True,
            seed=seed,
        )
    )


def test_tiles_of_a_wide_weight_come_through() -> None:
    """Wide enough for several tiles of whole blocks, and a shorter block after them."""
    assert_exact(random_case(64 * 7 + 32, 4096, 256, exact=True))


@pytest.mark.parametrize("real_zeros", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("count", [1, 5, 70])
def test_products_are_within_what_rounding_to_bfloat16_may_do(
    count: int, group_size: int, real_zeros: bool
) -> None:
    case = random_case(96, 128, group_size, real_zeros=real_zeros)
    module, x = Int4CpuLinear(case.layer()), normal(count, 128)
    rows = x.double().numpy()
    exact = rows @ case.exact.T
    # Scale and shift are rounded once each, and the dense path rounds the weight; sums in float32.
    shift = np.abs(8 - case.offsets) * case.each(case.scales)
    weight = U * (np.abs(case.exact) + shift * (1 + U)) + U * (1 + U) * np.abs(case.exact)
    sums = 128 * 2.0**-23 * np.abs(rows) @ (np.abs(case.exact) + 2 * shift).T
    for path in module.paths():
        off = np.abs(path(x).double().numpy() - exact)
        bound = np.abs(rows) @ weight.T + U * np.abs(exact) + sums
        assert (off <= (1 + 3 * U) * bound).all()
        assert np.linalg.norm(off) < 2 * U * np.linalg.norm(exact)


def test_few_rows_take_the_kernel_and_more_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Int4CpuLinear(random_case(16, 32, 32).layer())
    module.most_rows = 3
    taken: list[str] = []

    def watch(name: str, run: Callable[[Tensor], Tensor]) -> None:
        def watched(rows: Tensor) -> Tensor:
            taken.append(name)
            return run(rows)

        monkeypatch.setattr(module, name, watched)

    watch("packed_multiply", module.packed_multiply)
    watch("dense_multiply", module.dense_multiply)
    module(normal(3, 32))
    module(normal(4, 32).view(2, 2, 32))
    assert taken == ["packed_multiply", "dense_multiply"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shape_type_and_bias_are_a_linear_layers(dtype: torch.dtype) -> None:
    bias = torch.arange(48).to(dtype)
    case = random_case(48, 64, 32)
    with_bias, without = (Int4CpuLinear(case.layer(bias=b, dtype=dtype)) for b in (bias, None))
    x = normal(6, 64).to(dtype).view(2, 3, 64)
    assert with_bias(x).shape == (2, 3, 48)
    assert with_bias(x).dtype == dtype
    assert torch.equal(with_bias(x), without(x) + bias)


def test_the_kernel_runs_in_bfloat16_whatever_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    run = int4.multiply_cpu

    def watched(rows: Tensor, *rest: Any) -> Tensor:
        seen.append(rows.dtype)
        return run(rows, *rest)

    module = Int4CpuLinear(random_case(16, 32, 32).layer(dtype=torch.float32))
    monkeypatch.setattr(int4, "multiply_cpu", watched)
    module.packed_multiply(normal(1, 32).float())
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (random_case(17, 64, 32), "multiples of 16 outputs"),
        (random_case(16, 48, 32), "whole groups"),
        (random_case(16, 64, 16), "whole groups"),
        (random_case(16, 512, 512), "whole groups"),
        (random_case(16, 96, -1), "whole groups"),
    ],
)
def test_shapes_that_it_cannot_take(case: Case, words: str) -> None:
    assert words in Int4CpuLinear.refusal(case.layer())


def test_groups_of_unequal_sizes_are_refused() -> None:
    case = random_case(16, 64, 32, scattered=True)
    case.groups[np.flatnonzero(case.groups == 0)[0]] = 1
    assert "equal size" in Int4CpuLinear.refusal(case.layer())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scattered", [False, True])
def test_every_weight_comes_through_cuda_to_the_bit(scattered: bool) -> None:
    case = random_case(64, 256, 64, scattered=scattered, exact=True)
    layer = case.layer().cuda()
    assert Int4CudaLinear.applies(layer)
    assert Int4CudaLinear.refusal(layer) == ""
    module = Int4CudaLinear(layer)
    expected = torch.from_numpy(case.exact).float()
    for path in module.paths():
        product = path(torch.eye(256, dtype=torch.bfloat16, device="cuda"))
        assert torch.equal(product.float().cpu().t(), expected)
    assert torch.equal(module.dequantized().cpu(), expected)
