"""K-quants: published digests, loops over single numbers, llama.cpp's own library, corners."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pytest_qlab.formats.ggml import GGML_TYPES, unpack_blocks
from pytest_qlab.solvers.ggml import kernels, quantize_ggml
from pytest_qlab.solvers.ggml.kquants import as_stored, by_largest
from pytest_qlab.solvers.ggml.rounding import rounded_quotients
from tests.methods import ggml_kquant_loops as loops
from tests.methods.ggml_inputs import (
    Floats,
    embedded_weights,
    importance,
    vector_edges,
    vector_weight,
)
from tests.methods.ggml_reference import MISSING, library, reference_quantize
from tests.toy import digest

# First 32 digits of SHA-256 of the C reference's bytes: of the vector and of the edges, each
# without and with importance.
DIGESTS = {
    "Q2_K": (
        "ffcfd19ac03353b703df84ac41d8f72d",
        "f8525c10052adc70684c334f4c81f1f7",
        "e7b271aec9c0fd23a440f8e40172d4c7",
        "9a3d5167a4a86851a3d89e3f547367a5",
    ),
    "Q3_K": (
        "73769bac634c18e5bd7e94bf83f7dbd7",
        "1e8a6417d36523be014035e182568009",
        "0995de517fbb9bf8213fd0ef6a44ae3c",
        "8cdfeac0ce27772b161c5710f0282b01",
    ),
    "Q4_K": (
        "28050c91bd4f0ede9d5d098d97d776e4",
        "b08de3ff6a4c45b39e73b7a44ec2283b",
        "b6da244589e358743c9e8d6ddc5082d4",
        "803f1804edc9f3b1bbda510a9ae1d61c",
    ),
    "Q5_K": (
        "46cd2a8699e45543f5b204f4b058ac97",
        "f21ad9a0f84e3ae008e6f6babdd6820b",
        "97e993df7b9296dce3a2a6960e8283d7",
        "6bb7bcacfe2154fb68a1f2be450dffcb",
    ),
    "Q6_K": (
        "c1480873fee870fb0595fd8da44508dc",
        "2367965454ff6dca84322fd5992bccaa",
        "60ef9b178efba799073c6ef85422640b",
        "7ec177193bc9e1f4359247bc4db878f5",
    ),
}
TYPES = tuple(DIGESTS)
needs_library = pytest.mark.skipif(
    library() is None or platform.machine() not in ("x86_64", "AMD64"),
    reason=MISSING if library() is None else "llama.cpp fuses multiply-adds on this processor",
)


@pytest.fixture(autouse=True)
def ignore_overflow() -> Iterator[None]:
    """As the kernels' callers do."""
    with np.errstate(all="ignore"):
        yield


def quantized(name: str, x: Floats, weights: Floats | None = None) -> NDArray[np.uint8]:
    known = None if weights is None else torch.from_numpy(weights)
    found: NDArray[np.uint8] = quantize_ggml(torch.from_numpy(x), name, known).numpy()
    return found


def fields(name: str, x: Floats, weights: Floats | None = None) -> dict[str, torch.Tensor]:
    blocks = torch.from_numpy(quantized(name, x, weights))
    return unpack_blocks(name, blocks.view(-1, GGML_TYPES[name].block_bytes))


def normal(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


@pytest.mark.parametrize("name", TYPES)
def test_published_digests(name: str) -> None:
    vector, edges = vector_weight(), vector_edges()
    found = (
        quantized(name, vector),
        quantized(name, vector, importance(1024, 5678)),
        quantized(name, edges),
        quantized(name, edges, importance(256, 77)),
    )
    assert tuple(digest(torch.from_numpy(each))[:32] for each in found) == DIGESTS[name]


# Groups that reach the corners: zeros of both signs, around 1e-15, denormal, huge, constant, whole
# multiples of one step, and outliers beside which all other weights round to nothing.
GROUP = 16
corners = st.sampled_from([0.0, -0.0, 1e-15, -9e-16, 1e-40, 1e-7, -3e6, 1e15, 0.5, -1.0, 1.5])
numbers = st.floats(-4, 4, width=32) | corners.map(lambda v: float(np.float32(v)))
costs = st.floats(0, 16, width=32) | st.sampled_from([0.0, 0.0, 2.0**-90, 2.0**60])
groups = (
    arrays(np.float32, GROUP, elements=numbers)
    | arrays(np.float32, GROUP, elements=numbers, fill=st.just(np.float32(-1)))
    | arrays(np.float32, GROUP, elements=st.integers(-9, 9).map(lambda v: v / 2))
    | arrays(np.float32, GROUP, elements=st.sampled_from([0.0, -0.0, 1.5]))
    | numbers.map(lambda v: np.full(GROUP, v, np.float32))
)
# Scales of groups whose sums have overflowed are searched as well.
infinite = arrays(
    np.float32,
    GROUP,
    elements=st.sampled_from([np.inf, -np.inf, np.nan, 1.0, -0.25]),
    fill=st.just(np.float32(0.5)),
)


def several_of(groups: st.SearchStrategy[Floats]) -> st.SearchStrategy[Floats]:
    return st.lists(groups, min_size=1, max_size=3).map(lambda each: np.stack(each, axis=1))


several = several_of(groups)
many_costs = arrays(np.float32, (GROUP, 3), elements=costs)
thorough = settings(deadline=None, max_examples=60)


def same(found: Floats, expected: list[np.float32]) -> bool:
    """As bits, so that zeros of both signs differ; NaN are equal."""
    wanted = np.array(expected, np.float32)
    both_nan = np.isnan(found) & np.isnan(wanted)
    return bool((both_nan | (found.view(np.int32) == wanted.view(np.int32))).all())


def columns_of(x: Floats) -> list[list[np.float32]]:
    return [list(column) for column in x.T]


@thorough
@given(x=several_of(groups | infinite), cost=many_costs, half=st.sampled_from([4, 32]))
def test_make_qx_agrees_with_a_loop(x: Floats, cost: Floats, half: int) -> None:
    cost = np.ascontiguousarray(cost[:, : x.shape[1]])
    found = kernels.make_qx(x, half, cost)
    pairs = zip(columns_of(x), columns_of(cost), strict=True)
    expected = [loops.qx(column, half, weights) for column, weights in pairs]
    assert same(found.scale, [scale for scale, _ in expected])
    assert found.levels.T.tolist() == [levels for _, levels in expected]


@thorough
@given(x=several)
def test_make_q3_agrees_with_a_loop(x: Floats) -> None:
    found = kernels.make_q3(x)
    expected = [loops.q3(column) for column in columns_of(x)]
    assert same(found.scale, [scale for scale, _ in expected])
    assert found.levels.T.tolist() == [levels for _, levels in expected]


SEARCHES = [
    (3, -0.5, 0.1, 15, True),
    (3, -0.9, 0.05, 36, False),
    (15, -1.0, 0.1, 20, False),
    (31, -0.9, 0.05, 36, False),
]


@thorough
@given(x=several, cost=many_costs, search=st.sampled_from(SEARCHES))
def test_make_qkx_agrees_with_a_loop(
    x: Floats, cost: Floats, search: tuple[int, float, float, int, bool]
) -> None:
    cost = np.ascontiguousarray(cost[:, : x.shape[1]])
    top, first, step, steps, mad = search
    found = kernels.make_qkx(x, top, cost, first, step, steps, mad=mad)
    pairs = zip(columns_of(x), columns_of(cost), strict=True)
    expected = [loops.qkx(v, top, w, first, step, steps, mad) for v, w in pairs]
    assert same(found.scale, [scale for scale, _, _ in expected])
    assert same(found.below, [below for _, below, _ in expected])
    assert found.levels.T.tolist() == [levels for _, _, levels in expected]


@thorough
@given(x=several, cost=many_costs, top=st.sampled_from([15, 63]), negative=st.booleans())
def test_make_qp_agrees_with_a_loop(x: Floats, cost: Floats, top: int, negative: bool) -> None:
    x = x if negative else np.absolute(x)
    cost = np.ascontiguousarray(cost[:, : x.shape[1]])
    found = kernels.make_qp(x, top, cost)
    pairs = zip(columns_of(x), columns_of(cost), strict=True)
    expected = [loops.qp(column, top, weights) for column, weights in pairs]
    assert same(found.scale, [scale for scale, _ in expected])
    assert found.levels.T.tolist() == [levels for _, levels in expected]


def test_negative_scales_may_be_too_large_to_round() -> None:
    """Scales that were found where four groups of eight count; beyond 2**22 their codes are odd."""
    x = np.array([-0.2, 1.7126e-6, 1.6411e-6, 1.5537e-6, 1.2239e-6, 1.7325e-6], np.float32)
    cost = np.array([1.732, 0, 0, 1.732, 0, 1.732], np.float32)
    for size in (0.2, 0.3, 0.5, 0.7, 1.1, 5.3):
        x[0] = -size
        found = kernels.make_qp(x[:, None], 63, cost[:, None])
        scale, levels = loops.qp(list(x), 63, list(cost))
        assert same(found.scale, [scale])
        assert found.levels[:, 0].tolist() == levels


@thorough
@given(x=several, name=st.sampled_from(["Q2_K", "Q4_K"]))
def test_scales_are_quantized_as_in_a_loop(x: Floats, name: str) -> None:
    top = {"Q2_K": 15, "Q4_K": 63}[name]
    scale, levels = by_largest(x, top)
    expected = [loops.quantized_scales(name, column, top) for column in columns_of(x)]
    assert same(scale, [each for each, _ in expected])
    assert levels.T.tolist() == [each for _, each in expected]


@settings(deadline=None)
@given(
    scales=arrays(np.uint8, (8, 2), elements=st.integers(0, 255)),
    mins=arrays(np.uint8, (8, 2), elements=st.integers(0, 63)),
    name=st.sampled_from(["Q2_K", "Q4_K"]),
)
def test_levels_too_large_for_their_bits_overlap_as_in_the_bytes(
    scales: NDArray[np.uint8], mins: NDArray[np.uint8], name: str
) -> None:
    if name == "Q2_K":
        mins = mins & np.uint8(15)
    found = as_stored(scales, mins, {"Q2_K": 15, "Q4_K": 63}[name])
    for column in range(2):
        expected = loops.read_back(name, scales[:, column].tolist(), mins[:, column].tolist())
        assert tuple(each[:, column].tolist() for each in found) == expected


@thorough
@given(
    x=arrays(np.float32, (3, 2), elements=st.floats(-100, 100, width=32)),
    divisor=arrays(np.float32, 2, elements=st.floats(2.0**-24, 4, width=32)),
)
def test_quotients_are_rounded_by_their_bits(x: Floats, divisor: Floats) -> None:
    expected = [[loops.clipped(v / d, -32, 31) for v, d in zip(r, divisor, strict=True)] for r in x]
    assert rounded_quotients(x.copy(), divisor, -32, 31).tolist() == expected


def hard_cases(
    count: int, columns: int, weighted: bool
) -> Iterator[tuple[str, Floats, Floats | None]]:
    """Weights, and importance if asked for, that make searches ill-conditioned.

    With few columns that count, a least squares fit is the quotient of rounding errors: scales can
    be negative, minima pass maxima, and numbers are rounded that are far beyond all levels.
    """
    rng = np.random.default_rng(20260803)
    shape = (4, columns)
    for case in range(count):
        drawn = rng.standard_normal(shape)
        outliers = drawn * 1e-9
        outliers[np.arange(4), rng.integers(0, columns, 4)] = rng.choice([-1e4, 1.0, 1e4], 4)
        shift = rng.standard_normal(shape) * np.exp2(rng.uniform(-30, 0, (4, 1)))
        few = np.zeros(columns)
        few[rng.integers(0, columns, 3)] = 1
        weights = {
            "Gaussian": drawn,
            "outliers": outliers,
            "below zero": shift - 1,
            "above zero": shift + 1,
            "one-sided": -np.abs(drawn) * np.exp2(rng.uniform(-20, 0, (4, 1))) - 10,
            "spread": drawn * np.exp2(rng.uniform(-60, 10, shape)),
            "around 1e-15": rng.choice([0, -0.0, 1e-15, -9.9e-16, 1e-14, 1e-40], shape),
        }
        costs = {
            "few": few,
            "sparse": np.where(rng.random(columns) < 0.7, 0, rng.random(columns)),
            "spread": np.exp(rng.uniform(-60, 40, columns)),
        }
        for kind, x in weights.items():
            x = x.astype(np.float32)
            if not weighted:
                yield f"{kind} weights, case {case}", x, None
                continue
            for reach, cost in costs.items():
                label = f"{kind} weights, {reach} importance, case {case}"
                yield label, x, cost.astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_agree_with_loops(name: str, weighted: bool) -> None:
    for label, x, cost in hard_cases(1, 256, weighted):
        found = fields(name, x[:1], cost)
        (expected,) = loops.LOOPS[name](list(x[0]), None if cost is None else list(cost))
        for key, field in found.items():
            wanted = np.array([expected[key]], field.numpy().dtype)
            assert field.numpy().tobytes() == wanted.tobytes(), f"{label}: {key}"


@needs_library
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_cases_give_the_bytes_of_llama_cpp(name: str, weighted: bool) -> None:
    for label, x, cost in hard_cases(10, 512, weighted):
        assert np.array_equal(quantized(name, x, cost), reference_quantize(name, x, cost)), label


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_large_matrix_gives_the_bytes_of_llama_cpp(name: str, weighted: bool) -> None:
    """Several portions, the last one smaller; rows that do not divide them."""
    for x in (normal(300, 2816), embedded_weights(4096, 256)):
        cost = normal(1, x.shape[1], seed=1)[0] ** 2 if weighted else None
        assert np.array_equal(quantized(name, x, cost), reference_quantize(name, x, cost))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_portions_change_nothing(
    name: str, weighted: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, cost = normal(5, 768), normal(1, 768, seed=1)[0] ** 2 if weighted else None
    whole = quantized(name, x, cost)
    monkeypatch.setattr(kernels, "PORTION", 256 * blocks)
    assert np.array_equal(quantized(name, x, cost), whole)


@pytest.mark.parametrize(("name", "weighted"), [("Q3_K", True), ("Q6_K", False), ("Q6_K", True)])
def test_a_negated_weight_has_a_negated_scale_and_the_same_codes(name: str, weighted: bool) -> None:
    """Not Q3_K without importance: its coordinate search skips groups with a positive extreme."""
    x, cost = normal(4, 512), normal(1, 512, seed=1)[0] ** 2 if weighted else None
    one, other = fields(name, x, cost), fields(name, -x, cost)
    assert torch.equal(one["d"], -other["d"])
    assert torch.equal(one["scales"], other["scales"])
    assert torch.equal(one["codes"], other["codes"])


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("power", [-6, 9])
def test_only_the_proportions_of_importance_count(name: str, power: int) -> None:
    x, cost = normal(4, 512), normal(1, 512, seed=1)[0] ** 2
    assert np.array_equal(
        quantized(name, x, cost), quantized(name, x, cost * np.float32(2.0**power))
    )
