"""GGML blocks: bit for bit what the gguf package and llama.cpp read, and that they can be saved."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pytest_qlab.errors import CorruptEntryError, SpecError
from pytest_qlab.formats import load_packed
from pytest_qlab.formats.ggml import (
    GGML_TYPES,
    PLAIN_TYPES,
    GgmlBlocks,
    dequantize,
    dequantize_blocks,
    find_type,
    pack_blocks,
    row_bytes,
    unpack_blocks,
)
from tests.toy import digest, uniform

every_type = pytest.mark.parametrize("type", list(GGML_TYPES))

# The first block that llama.cpp's reference quantizer makes of `reference_weight`, and the first
# digits of the SHA-256 of all that it dequantizes to (ggml d99724f, x86-64 without FMA).
FIRST_BLOCKS = {
    "Q4_0": "6e2d9906c9f88b178695d788895ab0e88a89",
    "Q4_1": "a62d6eb98905b9f77a178695d688885aa0d88988",
    "Q5_0": "6e2915eecdf7221b73fff51e0d29ad0001a560c00301",
    "Q5_1": "78296eb915eecdf7121b73fff51e0d29ad0001a560c00301",
    "Q8_0": "791d0fda17fb2af3e7ccec000b2781ff1b080c883979f88b0014530000d02d5e0000",
    "Q2_K": (
        "a7a98bcddaffdd8abd76edba23abfd7882258726673666e552ea626784a2af6e5a746667765ca66ee7665295"
        "66d72686b8a969d95d9a981d8f5d218956b5e219dd55db101ee9564a7a5ace5a4aea7a5a9529302c"
    ),
    "Q3_K": (
        "bb9e33ff5fcfde56ca552fff6abfad7d4def7eeedf29f7dcb6df5bd7de36bff308c3c1d041e003422b080801"
        "100c0100083302043823404312086cc14301c098432cd080c91d0f0430c86f308718de10230b03ccc0730938"
        "100c24583d3001208f52b7376a508912b0d33fff0ba1"
    ),
    "Q4_K": (
        "9118f123e7f3bff7a9f3bff6b3febce5287579677a77767436b7387a7017f9f8a8707b5f47f067e97c370774"
        "7a6d774771078108671b77c773e7677772777767767d77777e73b757d977639657d638a070867676b39ca0c6"
        "efc7077558460a76c5557922c67557a67686b69697767786a99869c767868707857728854779e906e387e747"
        "46ca86809e97d27581da8f84"
    ),
    "Q5_K": (
        "3214f323e9f8fff8abf3bff8e6eec0e4c1e0498425b4a028b02b458118c1d707a3849d012cc299a7cda5a128"
        "a1c9c5a952ebd3dfe5eeedd97d6061e5d020d3f141e1e79f7fe1c0c2ea6000eae6cce080f21f2202d037ffaf"
        "f7fee0ff05fff0d0fefd00ff0ef68fb0c4f0d63dbfbd6160f12cfdfd774950adff9f1ffba18d06fdababf345"
        "adfbb05dfd2d8e4d3ffdff0d7241d2beee2d2e0e2afe502aae02f20df72efe9e9db42d203b3fe5fa22e42e27"
    ),
    "Q6_K": (
        "1407167f2a3dfa03dbe0130971102712edcf1101f2de101b9b20d0cc04b8301001df91e250800fa11d012e00"
        "e10603400300d009ec10b394100f5b70a033601c15c16f00cb6ad6df80fd0ca4f8206070e808f80022582bb0"
        "60ef138188501ac0904a800f80f7040a00bb9e002bcf7f10131f006f7190fd10e1e936721640000d8ee54ae9"
        "aaf995298916aaaa48aea2a295bb69a87a832aa128aa8e5aa918ea4a8b8649e656649711b0511dba594acd2a"
        "21a91bece2196ab64a5532a6b61a8aa6a7547b77928073617fc97e5b1c6784580a8c"
    ),
    "IQ4_NL": "621d9905caf77b0786a4e688894bc0e88a89",
    "IQ4_XS": (
        "2b0c33c0353f01d79905caf77b0786a4e688894bb0e88a894d8788b9c80898188cc3fc88889e80c071f8818a"
        "f92d8888b397286882689808888f768f798e38a218809868b718d8499e9858c88b926e888087778975886388"
        "28b688e82385b44280623f586b8c8f78c5868688984898f81a78d6aae84505c9eb89e53d35d888809896e168"
        "83e78e80"
    ),
    "MXFP4": "7c11fb427094f90a2c6a0001c34f600201",
}
# What the formats can do at best on these numbers: ||W - Q|| / ||W|| over the whole of them.
RELATIVE_ERRORS = {
    "Q4_0": 0.080288,
    "Q4_1": 0.084940,
    "Q5_0": 0.040786,
    "Q5_1": 0.040172,
    "Q8_0": 0.005212,
    "Q2_K": 0.348567,
    "Q3_K": 0.141410,
    "Q4_K": 0.072093,
    "Q5_K": 0.037890,
    "Q6_K": 0.017576,
    "IQ4_NL": 0.070936,
    "IQ4_XS": 0.071672,
    "MXFP4": 0.143473,
}
DIGESTS = {
    "Q4_0": "f228628f5dac6047",
    "Q4_1": "8d2e61989ad197a7",
    "Q5_0": "c0db991680af047f",
    "Q5_1": "28b19ac93e4725c7",
    "Q8_0": "61b4392f6d383857",
    "Q2_K": "1ecfeb062505fad3",
    "Q3_K": "589278e134e1c428",
    "Q4_K": "a44e9c9cbe0e7f2b",
    "Q5_K": "c0329e02d317f95d",
    "Q6_K": "3888765b651a674a",
    "IQ4_NL": "91501d454da174ee",
    "IQ4_XS": "49b05d402cb16fc7",
    "MXFP4": "83931b3ff1383052",
}


def reference_weight() -> Tensor:
    """float32 (4, 1024): cubes, the two products rounded to float32."""
    u = uniform(4 * 1024, 1234).astype(np.float32)
    weight = torch.from_numpy(u * u * u).view(4, 1024)
    assert digest(weight).startswith("788b1270ca4b0006")
    return weight


def random_blocks(type: str, count: int, seed: int = 0) -> Tensor:
    """Any bytes at all: scales are often huge, sometimes infinite or no number."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, GGML_TYPES[type].block_bytes)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether all bits agree, but that one NaN is as good as another."""
    assert a.dtype == b.dtype == torch.float32
    equal = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())
    return a.shape == b.shape and bool(equal.all())


def by_gguf(type: str, blocks: Tensor) -> Tensor:
    """What the gguf package says that blocks stand for."""
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[type])
    return torch.from_numpy(weights)


@pytest.fixture(scope="module")
def llama_cpp() -> ctypes.CDLL:
    """The library of llama.cpp's reference code, which is compiled without FMA on x86-64 only."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("llama.cpp fuses multiplications and additions on this processor")
    library = next(Path(spec.origin).parent.glob("lib/*ggml-base*"))
    return ctypes.CDLL(str(library))


def by_llama_cpp(library: ctypes.CDLL, type: str, blocks: Tensor) -> Tensor:
    """What llama.cpp says that blocks stand for."""
    weights = torch.empty(len(blocks), GGML_TYPES[type].block_size)
    function = getattr(library, f"dequantize_row_{type.lower().replace('_k', '_K')}")
    function(
        ctypes.c_void_p(blocks.data_ptr()),
        ctypes.c_void_p(weights.data_ptr()),
        ctypes.c_int64(weights.numel()),
    )
    return weights


def test_the_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for type in (GGML_TYPES | PLAIN_TYPES).values():
        known = gguf.GGMLQuantizationType[type.name]
        assert type.id == known.value
        assert (type.block_size, type.block_bytes) == gguf.GGML_QUANT_SIZES[known]


def test_types_are_found_in_capitals_or_not() -> None:
    assert find_type("iq4_xs") is GGML_TYPES["IQ4_XS"]
    assert find_type("bf16") is PLAIN_TYPES["BF16"]
    with pytest.raises(SpecError, match=r"'Q4_k_M'.*Did you mean 'Q4_K'"):
        find_type("Q4_k_M")


def test_bits_per_weight_and_row_sizes() -> None:
    bits = {name: type.bits_per_weight for name, type in (GGML_TYPES | PLAIN_TYPES).items()}
    assert bits == {
        "Q4_0": 4.5,
        "Q4_1": 5.0,
        "Q5_0": 5.5,
        "Q5_1": 6.0,
        "Q8_0": 8.5,
        "Q2_K": 2.625,
        "Q3_K": 3.4375,
        "Q4_K": 4.5,
        "Q5_K": 5.5,
        "Q6_K": 6.5625,
        "IQ4_NL": 4.5,
        "IQ4_XS": 4.25,
        "MXFP4": 4.25,
        "F32": 32,
        "F16": 16,
        "BF16": 16,
    }
    assert row_bytes("q6_k", 512) == row_bytes(GGML_TYPES["Q6_K"], 512) == 420
    assert row_bytes("F16", 7) == 14
    with pytest.raises(ValueError, match=r"896 weights.*Q4_K.*256"):
        row_bytes("Q4_K", 896)


@every_type
@settings(deadline=None, max_examples=30)
@given(data=st.data(), count=st.integers(1, 3))
def test_any_bytes_mean_what_the_gguf_package_says(
    type: str, data: st.DataObject, count: int
) -> None:
    size = count * GGML_TYPES[type].block_bytes
    drawn = data.draw(st.binary(min_size=size, max_size=size))
    blocks = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(count, -1)
    assert same_bits(dequantize_blocks(type, blocks), by_gguf(type, blocks))
    assert torch.equal(pack_blocks(type, unpack_blocks(type, blocks)), blocks)


@every_type
def test_many_random_blocks_mean_what_the_gguf_package_says(type: str) -> None:
    blocks = random_blocks(type, 2000)
    assert same_bits(dequantize_blocks(type, blocks), by_gguf(type, blocks))


@every_type
def test_many_random_blocks_mean_what_llama_cpp_says(type: str, llama_cpp: ctypes.CDLL) -> None:
    blocks = random_blocks(type, 2000)
    assert same_bits(dequantize_blocks(type, blocks), by_llama_cpp(llama_cpp, type, blocks))


@every_type
def test_what_llama_cpp_quantizes_has_the_published_digest(
    type: str, llama_cpp: ctypes.CDLL
) -> None:
    weight, found = reference_weight(), GGML_TYPES[type]
    blocks = torch.empty(weight.numel() // found.block_size, found.block_bytes, dtype=torch.uint8)
    written = llama_cpp.ggml_quantize_chunk(
        found.id,
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(blocks.data_ptr()),
        ctypes.c_int64(0),
        *(ctypes.c_int64(size) for size in weight.shape),
        None,
    )
    assert written == blocks.numel()
    assert bytes(blocks[0].tolist()).hex() == FIRST_BLOCKS[type]
    assert digest(dequantize_blocks(type, blocks)).startswith(DIGESTS[type])


@every_type
def test_the_first_block_of_llama_cpp_is_close_to_what_it_was_made_of(type: str) -> None:
    # Needs no other package: bits in the wrong places would be far off.
    block = torch.frombuffer(bytearray.fromhex(FIRST_BLOCKS[type]), dtype=torch.uint8)
    weight = reference_weight().view(-1)[: GGML_TYPES[type].block_size]
    error = dequantize_blocks(type, block.view(1, -1))[0] - weight
    assert float(error.norm() / weight.norm()) < 1.25 * RELATIVE_ERRORS[type]
    assert torch.equal(pack_blocks(type, unpack_blocks(type, block.view(1, -1))), block.view(1, -1))


@every_type
def test_fields_come_back_as_they_were_packed(type: str) -> None:
    limits = {"codes": {"Q2_K": 4, "Q3_K": 8, "Q5_0": 32, "Q5_1": 32, "Q5_K": 32, "Q6_K": 64}}
    limits["scales"] = {"Q2_K": 16}
    limits["mins"] = {"Q2_K": 16}
    usual = {"codes": 16, "scales": 64, "mins": 64, "e": 256}
    generator = torch.Generator().manual_seed(1)
    fields = {}
    for name, like in unpack_blocks(type, random_blocks(type, 7)).items():
        if like.dtype == torch.float16:
            fields[name] = torch.randn(7, generator=generator).half()
            continue
        limit = limits.get(name, {}).get(type, usual[name])
        low, high = (-128, 128) if like.dtype == torch.int8 else (0, limit)
        fields[name] = torch.randint(low, high, like.shape, generator=generator, dtype=like.dtype)
        assert int(like.max()) < high
    again = unpack_blocks(type, pack_blocks(type, fields))
    assert again.keys() == fields.keys()
    for name, field in fields.items():
        assert again[name].dtype == field.dtype
        assert torch.equal(again[name], field)


@every_type
def test_no_blocks_are_no_weights(type: str) -> None:
    none = random_blocks(type, 0)
    assert dequantize_blocks(type, none).shape == (0, GGML_TYPES[type].block_size)
    assert pack_blocks(type, unpack_blocks(type, none)).shape == none.shape


@every_type
def test_chunks_leave_no_seams(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(type, 11)
    whole = dequantize_blocks(type, blocks)
    monkeypatch.setattr(dequantize, "_CHUNK_CPU", 4 * GGML_TYPES[type].block_size)
    assert same_bits(dequantize_blocks(type, blocks), whole)


@every_type
def test_blocks_need_not_be_aligned_or_contiguous(type: str) -> None:
    blocks = random_blocks(type, 8)
    size = blocks.shape[1]
    storage = torch.zeros(8 * (size + 3) + 1, dtype=torch.uint8)
    scattered = storage[1:].view(8, size + 3)[:, 1 : size + 1]
    scattered.copy_(blocks)
    assert same_bits(dequantize_blocks(type, scattered), dequantize_blocks(type, blocks))
    assert same_bits(dequantize_blocks(type, scattered[:1]), dequantize_blocks(type, blocks[:1]))
    assert torch.equal(scattered, blocks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_says_the_same() -> None:
    for type in GGML_TYPES:
        blocks = random_blocks(type, 2000)
        on_gpu = dequantize_blocks(type, blocks.cuda())
        assert on_gpu.is_cuda
        assert same_bits(on_gpu.cpu(), dequantize_blocks(type, blocks))
        assert torch.equal(pack_blocks(type, unpack_blocks(type, blocks.cuda())).cpu(), blocks)


@every_type
def test_nothing_is_computed_on_another_device(type: str) -> None:
    # Tensors of the meta device have no numbers, but a look-up in a table elsewhere is refused.
    blocks = random_blocks(type, 3).to("meta")
    assert dequantize_blocks(type, blocks).is_meta
    assert all(field.is_meta for field in unpack_blocks(type, blocks).values())


def test_wrong_blocks_and_fields_are_refused() -> None:
    fields = unpack_blocks("Q4_K", random_blocks("Q4_K", 3))
    with pytest.raises(ValueError, match=r"'codes' of Q4_K holds numbers up to 15, not 16"):
        pack_blocks("Q4_K", {**fields, "codes": torch.full_like(fields["codes"], 16)})
    with pytest.raises(ValueError, match=r"'mins'.*torch.uint8 \(3, 8\), not.*\(3, 7\)"):
        pack_blocks("Q4_K", {**fields, "mins": fields["mins"][:, :7]})
    with pytest.raises(ValueError, match=r"'d'.*torch.float16 \(3,\), not torch.float32"):
        pack_blocks("Q4_K", {**fields, "d": fields["d"].float()})
    with pytest.raises(ValueError, match=r"fields d, dmin, scales, mins, codes; given were d, c"):
        pack_blocks("Q4_K", {"d": fields["d"], "codes": fields["codes"]})
    for function in (unpack_blocks, dequantize_blocks):
        with pytest.raises(ValueError, match=r"Q4_K are torch.uint8 \(B, 144\).*\(3, 143\)"):
            function("Q4_K", random_blocks("Q4_K", 3)[:, :143])
        with pytest.raises(ValueError, match=r"not torch\.int8"):
            function("Q4_K", random_blocks("Q4_K", 3).view(torch.int8))
        with pytest.raises(ValueError, match="F16 is not a quantized type"):
            function("F16", torch.zeros(3, 2, dtype=torch.uint8))


def random_matrix(type: str, rows: int, columns: int) -> GgmlBlocks:
    blocks = random_blocks(type, rows * columns // GGML_TYPES[type].block_size)
    return GgmlBlocks(type, blocks.view(rows, -1), (rows, columns))


@every_type
def test_a_matrix_survives_being_saved(type: str, tmp_path: Path) -> None:
    packed = random_matrix(type, 5, 512)
    save_file(packed.tensors(), tmp_path / "w.safetensors")
    metadata = json.loads(json.dumps(packed.metadata()))
    assert metadata == {"format": "ggml", "type": type, "shape": [5, 512]}
    again = load_packed(metadata, load_file(tmp_path / "w.safetensors"))
    assert isinstance(again, GgmlBlocks)
    assert again.shape == packed.shape == (5, 512)
    assert torch.equal(again.data, packed.data)
    assert packed.nbytes == 5 * row_bytes(type, 512)
    assert packed.bits_per_weight == GGML_TYPES[type].bits_per_weight
    size = GGML_TYPES[type].block_bytes
    rows = [dequantize_blocks(type, row.view(-1, size)) for row in packed.data]
    assert same_bits(again.dequantize(), torch.stack(rows).view(5, 512))


@pytest.mark.parametrize("type", ["Q8_0", "Q3_K"])
def test_rows_can_be_taken_in_any_order(type: str) -> None:
    packed, index = random_matrix(type, 6, 256), torch.tensor([5, 0, 0, 3])
    taken = packed.take_rows(index)
    assert taken.shape == (4, 256)
    assert same_bits(taken.dequantize(), packed.dequantize()[index])
    none = packed.take_rows(torch.tensor([], dtype=torch.int64))
    assert none.dequantize().shape == (0, 256)


def test_the_type_of_a_matrix_is_named_in_capitals_or_not() -> None:
    packed = random_matrix("IQ4_NL", 2, 32)
    assert GgmlBlocks("iq4_nl", packed.data, (2, 32)).metadata() == packed.metadata()


def test_a_matrix_of_the_wrong_size_is_refused() -> None:
    data = random_blocks("Q4_0", 4)
    with pytest.raises(ValueError, match=r"\(4, 64\) in Q4_0 is uint8 \(4, 36\).*\(4, 18\)"):
        GgmlBlocks("Q4_0", data, (4, 64))
    with pytest.raises(ValueError, match="float32"):
        GgmlBlocks("Q4_0", data.float(), (4, 32))
    with pytest.raises(ValueError, match="33 weights"):
        GgmlBlocks("Q4_0", data, (4, 33))
    with pytest.raises(ValueError, match="BF16 is not a quantized type"):
        GgmlBlocks("BF16", data, (4, 9))
    with pytest.raises(SpecError, match="Q4_9"):
        GgmlBlocks("Q4_9", data, (4, 32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: ({}, m), "blocks.*missing"),
        (lambda t, m: ({"blocks": t["blocks"][:, :-1]}, m), "blocks.*shape"),
        (lambda t, m: ({"blocks": t["blocks"].view(torch.int8)}, m), "torch.int8"),
        (lambda t, m: (t, {**m, "type": "Q9_K"}), "Q9_K.*MXFP4"),
        (lambda t, m: (t, {**m, "type": "F16"}), "F16"),
        (lambda t, m: (t, {**m, "shape": [3, 300]}), "300 columns"),
        (lambda t, m: (t, {**m, "shape": [2, 256]}), "blocks.*shape"),
    ],
)
def test_damaged_tensors_are_refused(damage: Any, message: str) -> None:
    packed = random_matrix("Q6_K", 3, 256)
    tensors, metadata = damage(packed.tensors(), packed.metadata())
    with pytest.raises(CorruptEntryError, match=message):
        load_packed(metadata, tensors)
