"""The types a matrix can have in a GGUF file: their numbers, and how many bytes a block takes.

Rows are stored one after the other, each as whole blocks of consecutive inputs. Source: `ggml.h`
and `ggml-common.h` of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_qlab.errors import SpecError, did_you_mean


@dataclass(frozen=True)
class GgmlType:
    """One type of tensor.

    Args:
        name: as llama.cpp prints it, in capitals.
        id: its number in GGUF files.
        block_size: weights of a block.
        block_bytes: bytes of a block, scales and all.
    """

    name: str
    id: int
    block_size: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.block_bytes / self.block_size


GGML_TYPES = {
    type.name: type
    for type in (
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q4_1", 3, 32, 20),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q5_1", 7, 32, 24),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("IQ4_XS", 23, 256, 136),
        GgmlType("MXFP4", 39, 32, 17),
    )
}
"""The quantized types, by name."""

PLAIN_TYPES = {
    type.name: type
    for type in (GgmlType("F32", 0, 1, 4), GgmlType("F16", 1, 1, 2), GgmlType("BF16", 30, 1, 2))
}
"""The floating-point types, by name."""


def find_type(name: str) -> GgmlType:
    """The quantized or floating-point type of that name, in capitals or not.

    Raises:
        SpecError: there is none.
    """
    types = GGML_TYPES | PLAIN_TYPES
    if name.upper() not in types:
        raise SpecError(f"Unknown GGML type {name!r}.{did_you_mean(name.upper(), types)}")
    return types[name.upper()]


def row_bytes(type: GgmlType | str, columns: int) -> int:
    """Bytes that a row of `columns` weights takes.

    Raises:
        SpecError: there is no type of that name.
        ValueError: `columns` is not a multiple of the type's block size.
    """
    found = find_type(type) if isinstance(type, str) else type
    blocks, rest = divmod(columns, found.block_size)
    if rest:
        raise ValueError(
            f"a row of {columns} weights cannot be stored as {found.name}, whose blocks hold "
            f"{found.block_size}"
        )
    return blocks * found.block_bytes
