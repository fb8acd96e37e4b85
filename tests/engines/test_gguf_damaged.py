"""Damaged and lying GGUF files are refused with a reason, and do no harm."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.engines.gguf import stream
from pytest_qlab.engines.gguf.reader import GgufFile
from pytest_qlab.errors import DataError
from tests.engines.gguf_bytes import (
    ARRAY,
    F32,
    Q8_0,
    Piece,
    entry,
    header,
    info,
    integers,
    joined,
    one,
    opened,
    sample,
    string,
    u32,
    u64,
)


def refusal(path: Path, data: bytes) -> str:
    """Why the file is refused; the message must name it."""
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        GgufFile.open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def value(type: int, *pieces: Piece, count: int = 1) -> bytes:
    """A file with the metadata 'k' of that type and those bytes."""
    return joined(header([[*string("k"), *u32(type), *pieces]], entry_count=count))


a = info("a", [8], F32, 0)
alignment_entry = [*string("general.alignment"), *u32(4)]
MALFORMED: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["magic", "4 bytes", "at byte 0", "download"]),
    "another file": (b"PK\x03\x04" + bytes(60), [r"PK\x03\x04", "no GGUF file", "Name a .gguf"]),
    "an older format": (b"tjgg" + bytes(60), ["tjgg", "GGJT", "converted"]),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(56), ["big-endian", "byte 4", "gguf-convert-endian"]),
    "version 0": (one(version=0), ["version 0", "byte 4", "2 or 3", "Convert"]),
    "version 1": (one(version=1), ["version 1", "2 or 3", "Convert the model again"]),
    "version 4": (one(version=4), ["version 4", "2 or 3", "update pytest-qlab"]),
    "version huge": (one(version=2**32 - 1), ["version 4294967295", "2 or 3"]),
    "entry count too large": (
        value(7, b"\1", count=2),
        ["metadata entry 1 of 2 has an empty key", "fewer", "at byte 38"],
    ),
    "entry count too large, no padding": (
        joined(header([entry("k", "bool", True)], entry_count=2, alignment=1)) + bytes(14),
        ["metadata entry 1 of 2 has an empty key", "fewer", "at byte 38"],
    ),
    "entry count 2^63": (value(7, b"\1", count=2**63), [str(2**63), "entries", "at byte 16"]),
    "entry count too small": (
        joined(header([entry("k", "bool", True), entry("l", "bool", True)], entry_count=1)),
        ["padding", "not zero", "at byte 38"],
    ),
    "entry count too small, with tensors": (
        joined(header([entry("k", "bool", True)], [a], entry_count=0)) + bytes(32),
        ["'k'", "7 dimensions", "at byte 24"],
    ),
    "tensor count too large": (
        one(a, tensor_count=2, data=32),
        ["tensor 1 has an empty name", "at byte 57", "download"],
    ),
    "tensor count too large, and no data": (
        one(a, tensor_count=2, data=0),
        ["claims 2 tensors", "24 bytes each", "left of the file's 64", "at byte 8"],
    ),
    "tensor count 2^63": (one(a, tensor_count=2**63), [str(2**63), "tensors", "at byte 8"]),
    "tensor count 2^40": (one(a, tensor_count=2**40), [str(2**40), "tensors", "at byte 8"]),
    "tensor count too small": (
        one(a, info("b", [8], F32, 32), tensor_count=1),
        ["last of 1 tensors", "not zero", "more of them", "at byte 57"],
    ),
    "tensor count too small, no padding": (
        # The first description ends at byte 96, so that nothing would be padded.
        one(*(info(24 * "a" + name + 15 * "-", [8], F32, 0) for name in "ab"), tensor_count=1),
        ["bytes belong to none of its 1 tensors"],
    ),
    "key length 2^62": (
        joined(header([[*u64(2**62), b"k"]])),
        ["the key of metadata entry 0", str(2**62), "at byte 32"],
    ),
    "key not UTF-8": (
        joined(header([entry(b"k\xff", "bool", True)])),
        ["key of metadata entry 0", "UTF-8", "at byte 33"],
    ),
    "key twice": (
        joined(header([entry("k", "bool", True)] * 2)),
        ["'k' appears twice", "at byte 38"],
    ),
    "string length": (value(8, *u64(24), b"abc"), ["'k' takes 24 bytes", "at byte 45"]),
    "string length 2^64 - 1": (value(8, *u64(2**64 - 1), b"abc"), ["'k'", str(2**64 - 1)]),
    "string not UTF-8": (value(8, *string(b"ab\xc3")), ["'k'", "UTF-8", "at byte 47"]),
    "boolean 2": (value(7, b"\2"), ["'k'", "boolean", "neither 0 nor 1", "at byte 37"]),
    "boolean 2 in an array": (value(ARRAY, *u32(7), *u64(2), b"\1\2"), ["'k'", "boolean"]),
    "value type 13": (value(13, bytes(8)), ["'k'", "unknown value type 13", "0 to 12", "update"]),
    "element type 13": (value(ARRAY, *u32(13), *u64(0)), ["'k'", "unknown value type 13"]),
    "array length 2^60": (
        value(ARRAY, *u32(10), *u64(2**60), bytes(64)),
        ["'k' takes 9223372036854775808 bytes", "at byte 49"],
    ),
    "array of strings, length 2^60": (
        value(ARRAY, *u32(8), *u64(2**60), bytes(64)),
        ["1152921504606846976 strings of the metadata 'k'", "8 bytes each", "at byte 41"],
    ),
    "array of arrays, length 2^60": (
        value(ARRAY, *u32(9), *u64(2**60), bytes(64)),
        ["1152921504606846976 arrays of the metadata 'k'", "12 bytes each", "at byte 41"],
    ),
    "array nested 5 deep": (
        value(ARRAY, *(u32(9) + u64(1)) * 4, *u32(0), *u64(0)),
        ["'k'", "nested more than 4 levels deep"],
    ),
    "array nested 10,000 deep": (
        value(ARRAY, *(u32(9) + u64(1)) * 10_000, *u32(0), *u64(0)),
        ["'k'", "nested more than 4 levels deep"],
    ),
    "array multiplying itself": (
        value(ARRAY, *(u32(9) + u64(1000)) * 4, bytes(12_000)),
        ["nested more than 4 levels deep"],
    ),
    "alignment 0": (
        joined(header([[*alignment_entry, *u32(0)]])),
        ["general.alignment is 0", "power of two", "at byte 24"],
    ),
    "alignment 24": (
        joined(header([[*alignment_entry, *u32(24)]])),
        ["general.alignment is 24", "power of two"],
    ),
    "alignment of another type": (
        joined(header([entry("general.alignment", "uint64", 32)])),
        ["general.alignment is 32", "uint32"],
    ),
    "alignment of no number": (
        joined(header([entry("general.alignment", ["string"], ["x" * 200])])),
        ["general.alignment is ['xxx", "...", "uint32"],
    ),
    "alignment beyond the file": (
        joined(header([[*alignment_entry, *u32(2**31)]], [a])) + bytes(32),
        ["'a' lies outside the file", "at byte"],
    ),
    "part of several": (
        joined(header([entry("split.count", "uint16", 3)])),
        ["one of 3 parts", "split.count", "llama-gguf-split --merge"],
    ),
    "part of no number": (
        joined(header([entry("split.count", "string", "two")])),
        ["'two' parts", "split.count", "llama-gguf-split --merge"],
    ),
    "name length 2^63": (
        one([*u64(2**63), b"a", bytes(40)]),
        ["the name of tensor 0", str(2**63), "at byte 32"],
    ),
    "name not UTF-8": (one(info(b"\xe9", [8], F32, 0)), ["name of tensor 0", "UTF-8"]),
    "name twice": (
        one(a, info("a", [8], F32, 32)),
        ["the tensor 'a' appears twice", "at byte 57"],
    ),
    "long name": (one(info("n" * 9999, [8], 99, 0)), ["nnn...nnn", "type number 99"]),
    "5 dimensions": (one(info("a", [1] * 5, F32, 0)), ["'a' has 5 dimensions", "at most 4"]),
    "2^32 - 1 dimensions": (
        one([*string("a"), *u32(2**32 - 1), bytes(40)]),
        ["'a' has 4294967295 dimensions", "at byte 24"],
    ),
    "dimension 0": (one(info("a", [8, 0], F32, 0)), ["'a' has the dimensions (0, 8)", "from 1"]),
    "dimension 2^63": (one(info("a", [2**63], F32, 0)), [f"({2**63},)", "2**63 - 1"]),
    "dimension -1": (one(info("a", [8, 2**64 - 1], F32, 0)), [f"({2**64 - 1}, 8)", "2**63 - 1"]),
    "product over 2^64": (
        one(info("a", [2**32, 2**32], F32, 0)),
        ["'a' lies outside the file", f"at byte {96 + 2**66} of 160", "at byte 24"],
    ),
    "product over 2^64, back to 8": (
        one(info("a", [2**61 + 1, 8], F32, 0)),
        ["'a' lies outside the file", "at byte 24"],
    ),
    "type 99": (one(info("a", [8], 99, 0)), ["'a'", "type number 99", "byte 24", "updating"]),
    "a removed type": (one(info("a", [32], 4, 0)), ["'a'", "unknown type number 4"]),
    "rows of 33": (
        one(info("a", [33], Q8_0, 0)),
        ["'a' has rows of 33", "block size of Q8_0, 32", "at byte 24"],
    ),
    "scalar of a quantized type": (one(info("a", [], Q8_0, 0)), ["rows of 1", "Q8_0"]),
    "offset 4": (one(info("a", [8], F32, 4)), ["offset 4 of", "'a'", "alignment, 32"]),
    "offset 320": (one(info("a", [8], F32, 320)), ["'a' lies outside", "at byte 416 of 128"]),
    "offset 2^64 - 32": (one(info("a", [8], F32, 2**64 - 32)), ["'a' lies outside the file"]),
    "overlapping": (
        one(a, info("b", [8], F32, 0)),
        ["'b' overlaps the one before it", "offset is 0; expected 32", "at byte 57"],
    ),
    "gap": (
        one(info("a", [8], F32, 32)),
        ["'a' leaves a gap", "offset is 32; expected 0", "at byte 24"],
    ),
    "more than the tensors": (
        one(a, data=33),
        ["1 bytes belong to none of its 1 tensors", "at byte 96"],
    ),
}


@pytest.mark.parametrize(("data", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused(tmp_path: Path, data: bytes, words: list[str]) -> None:
    message = refusal(tmp_path / "m.gguf", data)
    for word in words:
        assert word in message
    assert len(message) < 800
    assert message.endswith((".", "little", "MERGED.gguf"))


def test_a_file_cut_off_at_any_byte_is_refused(tmp_path: Path) -> None:
    pieces, data = sample()
    whole = joined(pieces) + data
    for length in range(len(whole)):
        message = refusal(tmp_path / "m.gguf", whole[:length])
        assert f"of the file's {length} " in message or f" of {length} (at byte" in message


def test_a_file_cut_off_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = stream.Source(tmp_path / "m.gguf", size=8, modified=0)
    with pytest.raises(DataError, match="cut off while the magic number was read"):
        stream.GgufStream(source, io.BytesIO(b"GGU")).take(4, "the magic number")


def test_a_header_may_not_take_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = joined(header([entry("k", ["uint8"], [7] * 4000)]))
    assert opened(tmp_path / "m.gguf", data).metadata["k"] == [7] * 4000
    monkeypatch.setattr(stream, "LARGEST_HEADER", 4000)
    message = refusal(tmp_path / "m.gguf", data)
    assert "'k' takes 4000 bytes" in message
    assert "of the 4000 that a header may take" in message


# Mutations of a valid file: it is refused, or all that it says is true of the file.


def read_all(path: Path, data: bytes) -> bool:
    """Read everything that the file offers; whether it was accepted."""
    try:
        file = opened(path, data)
    except DataError:
        return False
    end = 0
    for tensor in file.tensors.values():
        assert end <= tensor.offset
        end = tensor.offset + tensor.nbytes
        assert end <= len(data)
        assert bytes(tensor.data().tolist()) == data[tensor.offset : end]
        for read in (tensor.tensor, tensor.packed):
            try:
                result = read()
            except DataError:
                continue
            assert tuple(result.shape) == tensor.shape
    return True


BOUNDARIES = sorted(
    {0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 24, 31, 32, 33, 64, 255, 256, 65535, 65536}
    | {2**power + step for power in (31, 32, 60, 61, 63, 64) for step in (-1, 0, 1)}
    | {2**64 - 2, 2**64 - 32}
)


def test_no_lie_in_any_integer_does_harm(tmp_path: Path) -> None:
    pieces, data = sample()
    whole = joined(pieces) + data
    accepted = 0
    tracemalloc.start()
    try:
        for position, width in integers(pieces):
            for number in BOUNDARIES:
                if number >= 2 ** (8 * width):
                    continue
                lie = number.to_bytes(width, "little")
                mutated = whole[:position] + lie + whole[position + width :]
                accepted += read_all(tmp_path / "m.gguf", mutated) and mutated != whole
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    # Some lies cannot be told from truth: other types of one size, other shapes of one size.
    assert 0 < accepted < 40


def test_no_flipped_bit_does_harm(tmp_path: Path) -> None:
    pieces, data = sample()
    whole = joined(pieces)
    for bit in range(0, 8 * len(whole), 3):
        mutated = bytearray(whole + data)
        mutated[bit // 8] ^= 1 << bit % 8
        read_all(tmp_path / "m.gguf", bytes(mutated))


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """The sample after one to four cuts, flips, splices and lies."""
    pieces, data = sample()
    mutated = bytearray(joined(pieces) + data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(mutated)))
        to = draw(st.integers(at, min(at + 64, len(mutated))))
        match draw(st.sampled_from(["cut", "flip", "copy", "remove", "insert", "lie"])):
            case "cut":
                del mutated[at:]
            case "flip" if at < len(mutated):
                mutated[at] ^= draw(st.integers(1, 255))
            case "copy":
                where = draw(st.integers(0, len(mutated)))
                mutated[where:where] = mutated[at:to]
            case "remove":
                del mutated[at:to]
            case "insert":
                mutated[at:at] = draw(st.binary(max_size=32))
            case "lie":
                position, width = draw(st.sampled_from(integers(pieces)))
                number = draw(st.sampled_from(BOUNDARIES)) % 2 ** (8 * width)
                mutated[position : position + width] = number.to_bytes(width, "little")
    return bytes(mutated)


@settings(deadline=None, max_examples=300)
@given(mutated=mutations())
def test_no_mutation_does_harm(tmp_path_factory: pytest.TempPathFactory, mutated: bytes) -> None:
    read_all(tmp_path_factory.getbasetemp() / "mutated.gguf", mutated)
