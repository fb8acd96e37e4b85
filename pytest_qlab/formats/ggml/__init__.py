"""The block formats of llama.cpp: types, where their bits lie, and what they stand for."""

from pytest_qlab.formats.ggml.blocks import GgmlBlocks
from pytest_qlab.formats.ggml.dequantize import dequantize_blocks
from pytest_qlab.formats.ggml.layouts import pack_blocks, unpack_blocks
from pytest_qlab.formats.ggml.types import (
    GGML_TYPES,
    PLAIN_TYPES,
    GgmlType,
    find_type,
    row_bytes,
)

__all__ = [
    "GGML_TYPES",
    "PLAIN_TYPES",
    "GgmlBlocks",
    "GgmlType",
    "dequantize_blocks",
    "find_type",
    "pack_blocks",
    "row_bytes",
    "unpack_blocks",
]
