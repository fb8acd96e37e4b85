"""GGML quantizers: published digests, loops over single numbers, llama.cpp's own library."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from benchmarks.ggml import (
    END,
    START,
    benchmark_ggml,
    identical_blocks,
    identical_section,
    main,
    percent,
)
from benchmarks.peers import PeerError
from benchmarks.settings import Benchmark
from pytest_qlab.errors import MethodError
from pytest_qlab.formats.ggml import GGML_TYPES, dequantize_blocks, unpack_blocks
from pytest_qlab.solvers.ggml import quantize_ggml
from tests.methods.ggml_inputs import (
    Floats,
    embedded_weights,
    huge,
    importance,
    kinds,
    of_kinds,
    vector_edges,
    vector_weight,
)
from tests.methods.ggml_loops import LOOPS
from tests.methods.ggml_reference import (
    MISSING,
    library,
    reference_accepts,
    reference_dequantize,
    reference_quantize,
)
from tests.toy import digest

TYPES = tuple(GGML_TYPES)
SEARCHED = tuple(name for name in TYPES if name not in ("Q8_0", "MXFP4"))
# First 32 digits of SHA-256 of the C reference's bytes: of the vector and of the edges, each
# without and with importance.
DIGESTS = {
    "Q4_0": (
        "5884a0a49a5cdf323e10a73c97dfd4d2",
        "a9332a8cc80d533e77f2590242ce3f85",
        "879a04c5be44f7a4d60963f8756dc3b0",
        "a1816a4cb1cd986897ebbb6b8778daef",
    ),
    "Q4_1": (
        "de5acdbc52d460eb69857781bb4f0762",
        "4cb51bc72fecff29b39c5c0f6f39eb47",
        "c3679b975b9f41cf84ac47d291d7ef13",
        "5c2f5b090f55c0cfe1f40e493ddf265a",
    ),
    "Q5_0": (
        "b56e294f5fff2a8d66bd40ce1be80231",
        "48d954fff7c8bc0026f85838e1216f64",
        "d26bb13754b30a8b08f928cc004887a3",
        "a381ce350233ccf9cf314dce1a87923a",
    ),
    "Q5_1": (
        "9e7dbe7289f53ab97fb61491497f4119",
        "54ca53c0492fbad281f46be15d63bb8d",
        "0aa39916b650d79ebb415b7b42e57486",
        "8050b74a77d9c091165b81430aaf72cb",
    ),
    "Q8_0": (
        "f634b26a228ee8df7863b38e01a9f071",
        "f634b26a228ee8df7863b38e01a9f071",
        "b239175c6cdceee104c5dc3487103a8f",
        "b239175c6cdceee104c5dc3487103a8f",
    ),
    "IQ4_NL": (
        "b9c124dd219046246465c80cba850a45",
        "f2410ae47f4c3b5693df213ef7c1654b",
        "a6abf0bacbed3f9198290c8c115105ea",
        "ddfc9b9588c52d298891015f64927375",
    ),
    "IQ4_XS": (
        "a90afc936376c5ada329e0b0bebfaacb",
        "f93930c8cb98c54274017b075c38f4e4",
        "20b2cc4a40a11bd9e9e2cd410b77f727",
        "dfc5a3fbd82cc1ef48292bfc6ccc5bf6",
    ),
    "MXFP4": (
        "8ce7ca93fdd45be13f2011f79b915c0e",
        "8ce7ca93fdd45be13f2011f79b915c0e",
        "e6f381bd4ce257c540965a6576406a13",
        "e6f381bd4ce257c540965a6576406a13",
    ),
}
needs_library = pytest.mark.skipif(
    library() is None or platform.machine() not in ("x86_64", "AMD64"),
    reason=MISSING if library() is None else "llama.cpp fuses multiply-adds on this processor",
)


def quantized(name: str, x: Floats, weights: Floats | None = None) -> Tensor:
    known = None if weights is None else torch.from_numpy(weights)
    return quantize_ggml(torch.from_numpy(x), name, known)


def blocks(name: str, x: Floats, weights: Floats | None = None) -> Tensor:
    return quantized(name, x, weights).view(-1, GGML_TYPES[name].block_bytes)


def dequantized(name: str, x: Floats, weights: Floats | None = None) -> Floats:
    values: Floats = dequantize_blocks(name, blocks(name, x, weights)).numpy()
    return values.reshape(x.shape)


def normal(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


@pytest.mark.parametrize("name", DIGESTS)
def test_published_digests(name: str) -> None:
    vector, edges = vector_weight(), vector_edges()
    found = (
        quantized(name, vector),
        quantized(name, vector, importance(1024, 5678)),
        quantized(name, edges),
        quantized(name, edges, importance(256, 77)),
    )
    assert tuple(digest(each)[:32] for each in found) == DIGESTS[name]


def test_the_inputs_are_the_published_ones() -> None:
    given = (vector_weight(), vector_edges(), importance(1024, 5678), importance(256, 77))
    assert [digest(torch.from_numpy(each))[:16] for each in given] == [
        "788b1270ca4b0006",
        "4252acff9fc6cb6f",
        "8c46bee97da9be32",
        "7abf31c55b9cc790",
    ]


def assert_like_the_loop(name: str, x: Floats, weights: Floats | None) -> None:
    known = None if weights is None else list(weights)
    expected = [block for row in x for block in LOOPS[name](list(row), known)]
    fields = unpack_blocks(name, blocks(name, x, weights))
    for key, found in fields.items():
        wanted = np.array([block[key] for block in expected], found.numpy().dtype)
        # As bits, so that zeros of different signs differ.
        assert found.numpy().tobytes() == wanted.tobytes(), key


small = st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-12)


@pytest.mark.parametrize("name", LOOPS)
@settings(deadline=None, max_examples=10)
@given(data=st.data(), weighted=st.booleans())
def test_codes_agree_with_a_loop(name: str, data: st.DataObject, weighted: bool) -> None:
    columns = max(GGML_TYPES[name].block_size, 64)
    x = data.draw(arrays(np.float32, (1, columns), elements=small))
    cost = data.draw(arrays(np.float32, (columns,), elements=st.floats(0, 16, width=32)))
    with np.errstate(all="ignore"):
        assert_like_the_loop(name, x, cost if weighted else None)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("weighted", [False, True])
def test_codes_of_random_rows_agree_with_a_loop(name: str, weighted: bool) -> None:
    assert_like_the_loop(name, normal(2, 256), of_kinds(256) if weighted else None)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str, weighted: bool) -> None:
    """One block alone, too: numpy adds a lone column in another order."""
    size = GGML_TYPES[name].block_size
    x, weights = normal(37, size), of_kinds(size) if weighted else None
    together = quantized(name, x, weights)
    alone = [quantized(name, x[i : i + 1], weights) for i in range(len(x))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", TYPES)
def test_without_importance_blocks_do_not_depend_on_each_other(name: str) -> None:
    size = GGML_TYPES[name].block_size
    x = normal(2, 6 * size)
    assert torch.equal(blocks(name, x), blocks(name, x.reshape(-1, size)))


@pytest.mark.parametrize("name", TYPES)
def test_threads_and_pieces_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = torch.from_numpy(normal(11, 512)), torch.from_numpy(of_kinds(512))
    whole = quantize_ggml(x, name, weights)
    monkeypatch.setattr("pytest_qlab.solvers.ggml.PIECE", 1024)
    for threads in (1, 2):
        assert torch.equal(quantize_ggml(x, name.lower(), weights, threads=threads), whole)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("power", [-4, 5])
def test_powers_of_two_scale_the_scales_and_keep_the_codes(name: str, power: int) -> None:
    x = 16 * normal(4, 512)  # so that no scale is a denormal float16
    one, other = (
        unpack_blocks(name, blocks(name, each)) for each in (x, x * np.float32(2.0**power))
    )
    for key, field in one.items():
        if field.dtype == torch.float16:
            assert torch.equal(field.float() * 2.0**power, other[key].float())
        elif key == "e":
            assert torch.equal(field.int() + power, other[key].int())
        else:
            assert torch.equal(field, other[key])


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_a_negated_weight_is_a_negated_scale(name: str) -> None:
    x = normal(4, 512)
    assert np.array_equal(dequantized(name, -x), -dequantized(name, x))


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_is_used(name: str) -> None:
    """Even the same importance everywhere turns another algorithm on."""
    x = normal(4, 512)
    assert not torch.equal(quantized(name, x), quantized(name, x, np.ones(512, np.float32)))


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4"])
def test_types_without_a_search_take_no_notice_of_importance(name: str) -> None:
    x = normal(4, 512)
    assert torch.equal(quantized(name, x), quantized(name, x, of_kinds(512)))


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_that_it_weights(name: str) -> None:
    x, weights = vector_weight(), importance(1024, 5678)

    def loss(found: Floats) -> float:
        return float((weights * np.square(found - x, dtype=np.float64)).sum())

    assert loss(dequantized(name, x, weights)) < loss(dequantized(name, x))


@pytest.mark.parametrize(
    ("weight", "type", "cost", "message"),
    [
        (torch.ones(2, 48), "Q4_0", None, "blocks of 32 weights of a row, which rows of 48"),
        (torch.ones(2, 128), "q4_k", None, "Q4_K stores blocks of 256"),
        (torch.ones(64), "Q4_0", None, r"float32 matrix; got torch.float32 of shape \(64,\)"),
        (torch.ones(2, 64).double(), "Q4_0", None, "got torch.float64"),
        (torch.ones(2, 64), "Q4_2", None, "no quantizer for the GGML type 'Q4_2'. Did you mean"),
        (torch.ones(2, 64), "F16", None, "no quantizer for the GGML type 'F16'"),
        (torch.ones(2, 64), "Q4_0", torch.ones(32), r"has to be float32 of shape \(64,\)"),
        (torch.ones(2, 64), "Q4_0", torch.ones(64).half(), "got torch.float16"),
        (torch.ones(2, 64), "Q8_0", torch.full((64,), -1.0), "column 0 is -1"),
        (torch.ones(2, 64), "Q8_0", torch.full((64,), torch.nan), "column 0 is nan"),
        (torch.ones(2, 64), "Q8_0", torch.full((64,), torch.inf), "column 0 is inf"),
        (torch.ones(2, 64), "Q8_0", torch.full((64,), 1e21), "from 0 to 1e.20; that of column 0"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    weight: Tensor, type: str, cost: Tensor | None, message: str
) -> None:
    with pytest.raises(MethodError, match=message):
        quantize_ggml(weight, type, cost)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    weight = torch.ones(9, 256)
    weight[7, 200] = value
    with pytest.raises(MethodError, match=f"row 7, column 200 is {value}"):
        quantize_ggml(weight, name)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "MXFP4"])
@pytest.mark.parametrize("size", [4e8, 5e8])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_that_float16_cannot_hold_are_refused(
    name: str, size: float, weighted: bool
) -> None:
    x = normal(3, 256)
    x[1] *= np.float32(size / np.abs(x[1]).max())
    with pytest.raises(MethodError, match=f"{name} cannot store the scale of a block in row 1"):
        quantized(name, x, of_kinds(256) if weighted else None)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "MXFP4"])
def test_weights_that_no_scale_reaches_are_refused(name: str) -> None:
    """In llama.cpp, sums of such weights can overflow, and zeros be stored."""
    weight = torch.ones(2, 256)
    weight[1, 100] = -1e30
    with pytest.raises(MethodError, match=f"column 100 is -1e.30; no scale of {name} reaches"):
        quantize_ggml(weight, name)


def test_an_exponent_that_is_no_number_is_refused() -> None:
    with pytest.raises(MethodError, match="MXFP4 cannot store the scale of a block in row 0"):
        quantize_ggml(torch.full((1, 32), 2.0**-126), "MXFP4")


def test_any_size_of_weights_fits_mxfp4() -> None:
    for power in (-120, -30, 0, 60, 127):
        x = normal(1, 64) * np.float32(2.0**-3)
        one, other = (
            unpack_blocks("MXFP4", blocks("MXFP4", each))
            for each in (x, np.ldexp(x, power).astype(np.float32))
        )
        assert torch.equal(one["codes"], other["codes"])
        assert torch.equal(one["e"].int() + power, other["e"].int())


def accepted(name: str, x: Floats) -> Floats:
    """Without the rows that have the one magnitude that MXFP4 cannot store."""
    largest = np.abs(x.reshape(len(x), -1, 32)).max(2)
    lost = (largest >= 2.0**-126 * (1 - 2e-5)) & (largest < 2.0**-125)
    return x[~lost.any(1)] if name == "MXFP4" else x


def assert_identical(x: Floats, name: str, weights: Floats | None, kind: str) -> None:
    expected = reference_quantize(name, x, weights)
    found = quantized(name, x, weights).numpy()
    wrong = np.flatnonzero((found != expected).any(1))
    assert not len(wrong), f"{kind}: {len(wrong)} of {len(x)} rows differ"


@needs_library
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_those_of_llama_cpp(name: str, weighted: bool) -> None:
    weights = of_kinds(256) if weighted else None
    for kind, x in (kinds(4, 256) | {"embedded": embedded_weights(1, 256)}).items():
        assert_identical(accepted(name, x), name, weights, kind)


@needs_library
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_llama_quantize_refuses_is_refused(name: str, weighted: bool) -> None:
    weights = of_kinds(256) if weighted else None
    for row in np.concatenate([huge(20, 256), huge(8, 256, 40, 127)]):
        expected = reference_quantize(name, row[None], weights)
        try:
            found = quantized(name, row[None], weights).numpy()
        except MethodError:
            # Beyond that, llama.cpp stores zeros where a sum has overflowed.
            assert np.abs(row).max() > 1e12 or not reference_accepts(name, expected)
        else:
            assert reference_accepts(name, expected)
            assert np.array_equal(found, expected)


@needs_library
@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20 / 100])
def test_any_size_of_importance(name: str, size: float) -> None:
    assert_identical(normal(4, 256), name, of_kinds(256) * np.float32(size), "Gaussian")


@needs_library
@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_reads_the_same_numbers(name: str) -> None:
    x = normal(4, 512)
    found = quantized(name, x)
    assert np.array_equal(reference_dequantize(name, found.numpy(), 512), dequantized(name, x))


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_those_of_llama_cpp_at_length(name: str, weighted: bool) -> None:
    for kind, x in (kinds(64, 1024) | {"embedded": embedded_weights(4096, 256)}).items():
        x = accepted(name, x)
        assert_identical(x, name, of_kinds(x.shape[1]) if weighted else None, kind)


@needs_library
@pytest.mark.slow
def test_the_table_in_the_documentation_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "gguf.md"
    if not page.exists():
        pytest.skip("there is no such page")
    text = page.read_text(encoding="utf-8")
    shown = text[text.index(START) + len(START) : text.index(END)].strip()
    assert shown == identical_section(identical_blocks()).strip()


@needs_library
def test_the_benchmark_times_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ggml.ROWS", 2)
    monkeypatch.setattr("benchmarks.ggml.COLUMNS", 256)
    section = benchmark_ggml(Benchmark("embedded", 2, 1, 1, 1, 24, ("none",), None))
    assert len(section.rows) == 3 * len(TYPES) - 2
    assert {row[-1] for row in section.rows} == {"100 %"}
    assert len(section.raw["Q4_K"]["with importance"]["theirs"]) == 2


def test_without_the_library_the_benchmark_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.ggml.library", lambda: None)
    with pytest.raises(PeerError, match=r"not installed. Install it with: .*\[llamacpp\]"):
        benchmark_ggml(Benchmark("embedded", 1, 1, 1, 1, 24, ("none",), None))
    assert main(["--identical"]) == 1
    assert "not installed" in capsys.readouterr().err


def test_only_everything_is_100_percent() -> None:
    assert [percent(share) for share in (1.0, 0.99999, 0.25)] == ["100 %", "99.9 %", "25.0 %"]
