"""Reading GGUF files: what another writer wrote comes back; damaged ones: see test_gguf_damaged."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.engines.gguf.reader import GgufFile
from pytest_qlab.errors import DataError
from pytest_qlab.formats import PlainWeight
from pytest_qlab.formats.ggml import GGML_TYPES, PLAIN_TYPES, GgmlBlocks
from tests.engines.gguf_bytes import F32, entry, header, info, joined, one, opened, sample

# What the writer of the gguf package writes.

VALUES: dict[str, Any] = {
    "uint8": 255,
    "int8": -128,
    "uint16": 65535,
    "int16": -32768,
    "uint32": 2**32 - 1,
    "int32": -(2**31),
    "float32": -1.5,
    "uint64": 2**64 - 1,
    "int64": -(2**63),
    "float64": 0.1,
    "bool": True,
    "string": "Grüße, 世界\n",
}
ARRAYS = {
    "bools": [True, False, True],
    "integers": [1, -2, 3],
    "floats": [0.5, -0.25],
    "strings": ["a", "", "ß"],
    "nested": [[1, 2], [3]],
    "nested strings": [["a"], ["b", "c"]],
    "deep": [[[[1.5]]]],
}


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf")


def written(gguf: Any, path: Path, alignment: int | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """A file with every type of metadata and of tensor; the tensors' bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, value in VALUES.items():
        getattr(writer, f"add_{name}")(f"value.{name}", value)
    for name, array in ARRAYS.items():
        writer.add_array(f"array.{name}", array)
    generator, tensors = np.random.default_rng(1), {}
    for type, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        if type.name == "Q8_1":
            continue  # 40 bytes in this package, 36 in llama.cpp's struct, which counts.
        shape = (3, 2 * block_bytes)
        tensors[type.name] = generator.integers(0, 256, shape).astype(np.uint8)
        writer.add_tensor(type.name, tensors[type.name], shape, raw_dtype=type)
    writer.add_tensor("rank 4", np.arange(24, dtype=np.float32).reshape(2, 3, 1, 4))
    writer.add_tensor("rank 1", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("alignment", [None, 8, 16, 64, 4096])
def test_a_file_of_the_gguf_package_comes_back(
    gguf: Any, tmp_path: Path, alignment: int | None
) -> None:
    tensors = written(gguf, path := tmp_path / "m.gguf", alignment)
    file = GgufFile.open(path)
    assert file.version == 3
    expected: dict[str, Any] = {"general.architecture": "llama"}
    if alignment is not None:
        expected["general.alignment"] = alignment
    expected |= {f"value.{name}": value for name, value in VALUES.items()}
    expected |= {f"array.{name}": array for name, array in ARRAYS.items()}
    assert file.metadata == expected
    assert [type(value) for value in file.metadata.values()] == [
        type(value) for value in expected.values()
    ]
    assert list(file.tensors) == [*tensors, "rank 4", "rank 1"]
    sizes = {type.name: sizes for type, sizes in gguf.GGML_QUANT_SIZES.items()}
    for name, data in tensors.items():
        tensor = file.tensors[name]
        assert (tensor.name, tensor.type) == (name, name)
        assert tensor.shape == (3, 2 * sizes[name][0])
        assert tensor.nbytes == data.size
        assert tensor.data().numpy().tobytes() == data.tobytes()
        assert tensor.offset % (alignment or 32) == 0
    rank_4 = file.tensors["rank 4"].tensor()
    assert torch.equal(rank_4, torch.arange(24, dtype=torch.float32).reshape(2, 3, 1, 4))
    assert torch.equal(file.tensors["rank 1"].tensor(), torch.arange(5, dtype=torch.float16))
    assert file.digest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_both_readers_find_the_same_tensors(gguf: Any, tmp_path: Path) -> None:
    written(gguf, path := tmp_path / "m.gguf")
    file, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    assert [
        (tensor.name, tensor.type, list(tensor.shape[::-1]), tensor.offset, tensor.nbytes)
        for tensor in file.tensors.values()
    ] == [
        (their.name, their.tensor_type.name, their.shape.tolist(), their.data_offset, their.n_bytes)
        for their in theirs.tensors
    ]
    for their in theirs.tensors:
        assert file.tensors[their.name].data().numpy().tobytes() == their.data.tobytes()
    for key, value in file.metadata.items():
        if key.startswith("array.nested") or key == "array.deep":
            continue  # Their reader flattens these.
        assert theirs.get_field(key).contents() == value


def test_tensors_become_packed_weights(gguf: Any, tmp_path: Path) -> None:
    tensors = written(gguf, path := tmp_path / "m.gguf")
    file = GgufFile.open(path)
    for name, data in tensors.items():
        tensor = file.tensors[name]
        if name in GGML_TYPES:
            packed = tensor.packed()
            assert isinstance(packed, GgmlBlocks)
            assert (packed.type, packed.shape) == (name, tensor.shape)
            assert np.array_equal(packed.data.numpy(), data)
            with pytest.raises(DataError, match=f"'{name}' has the type {name}; expected one of F"):
                tensor.tensor()
        elif name in PLAIN_TYPES:
            plain = tensor.packed()
            assert isinstance(plain, PlainWeight)
            assert plain.shape == tensor.shape
            assert plain.weight.dtype == tensor.tensor().dtype
            assert plain.weight.view(torch.uint8).numpy().tobytes() == data.tobytes()
        else:
            with pytest.raises(DataError, match=f"'{name}' has the type {name}, .*not decoded"):
                tensor.packed()
            with pytest.raises(DataError, match=f"'{name}' has the type {name}"):
                tensor.tensor()
    with pytest.raises(DataError, match=r"'rank 4' has the shape \(2, 3, 1, 4\).*matrix"):
        file.tensors["rank 4"].packed()


def test_version_2_has_the_same_layout(gguf: Any, tmp_path: Path) -> None:
    written(gguf, path := tmp_path / "3.gguf")
    three, data = GgufFile.open(path), path.read_bytes()
    two = opened(tmp_path / "2.gguf", data[:4] + (2).to_bytes(4, "little") + data[8:])
    assert two.version == 2
    assert two.metadata == three.metadata
    assert two.tensors == three.tensors


def test_a_vocabulary_may_be_the_whole_file(gguf: Any, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path := tmp_path / "vocab.gguf", "llama")
    tokens = [f"token {index}" for index in range(5000)]
    writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file = GgufFile.open(path)
    assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert file.tensors == {}


# What is put together byte by byte.

scalars = {
    **{f"uint{bits}": st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{
        f"int{bits}": st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for bits in (8, 16, 32, 64)
    },
    "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "string": st.text(st.characters(codec="utf-8"), max_size=8),
}


@st.composite
def typed_values(draw: st.DrawFn) -> tuple[Any, Any]:
    """A type of `gguf_bytes.entry`, and a value of it."""
    name = draw(st.sampled_from(sorted(scalars)))
    type, values = name, scalars[name]
    for _ in range(draw(st.integers(0, 3))):
        type, values = [type], st.lists(values, max_size=3)  # type: ignore[assignment]
    return type, draw(values)


@settings(deadline=None)
@given(
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), typed_values()
    ),
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=4), max_size=4),
    alignment=st.sampled_from([1, 2, 8, 32, 128]),
)
def test_every_valid_file_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, tuple[Any, Any]],
    shapes: list[list[int]],
    alignment: int,
) -> None:
    entries = {"general.alignment": ("uint32", alignment), **metadata}
    infos, data = [], b""
    for index, shape in enumerate(shapes):
        data += bytes(-len(data) % alignment)
        infos.append(info(f"{index}", shape[::-1], F32, len(data)))
        data += np.full(shape, index, dtype="<f4").tobytes()
    pieces = header(
        [entry(key, *typed) for key, typed in entries.items()], infos, alignment=alignment
    )
    file = opened(tmp_path_factory.mktemp("valid") / "m.gguf", joined(pieces) + data)
    assert file.metadata == {key: value for key, (_, value) in entries.items()}
    assert len(file.tensors) == len(shapes)
    for index, shape in enumerate(shapes):
        expected = torch.full(shape, float(index))
        assert torch.equal(file.tensors[f"{index}"].tensor(), expected)


def test_the_sample_is_valid(tmp_path: Path) -> None:
    pieces, data = sample()
    file = opened(tmp_path / "m.gguf", joined(pieces) + data)
    assert file.metadata["a.nested"] == [[1, 2], [], [3]]
    assert file.metadata["a.words"] == ["one", "zwölf", ""]
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        "token_embd.weight": (2, 3),
        "blk.0.attn_q.weight": (2, 32),
        "half": (4,),
        "undecoded": (2,),
    }
    assert bytes(file.tensors["blk.0.attn_q.weight"].data().tolist()) == bytes(range(68))


def test_only_what_is_there_and_regular_is_opened(tmp_path: Path) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match=f"{re.escape(str(path))} does not exist, or is no reg"):
            GgufFile.open(path)
    with pytest.raises(DataError, match="cannot be read"):
        GgufFile.open(tmp_path / ("x" * 5000))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path, data = tmp_path / "m.gguf", one(info("a", [8], F32, 0), data=32)
    tensor = opened(path, data).tensors["a"]
    assert torch.equal(tensor.tensor(), torch.zeros(8))
    os.truncate(path, len(data) - 1)
    with pytest.raises(DataError, match=r"has changed since it was opened.*Run again"):
        tensor.tensor()
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match="has changed since it was opened"):
        tensor.data()
    path.unlink()
    with pytest.raises(DataError, match=r"No such file.*put it back"):
        tensor.data()


def test_block_sizes_that_the_gguf_package_does_not_tell(tmp_path: Path) -> None:
    # struct block_q8_1: two halves and 32 int8; struct block_q2_0: a half and 64 codes of 2 bits.
    for name, type, columns, nbytes in [("Q8_1", 9, 32, 2 * 2 + 32), ("Q2_0", 42, 64, 2 + 16)]:
        file = opened(tmp_path / "m.gguf", one(info("a", [columns], type, 0), data=nbytes))
        assert file.tensors["a"].type == name
        assert file.tensors["a"].nbytes == nbytes
