"""llama.cpp's own quantizers, called through ctypes: the oracle of all GGML types.

They live in `libggml-base`, which the wheel of llama-cpp-python carries. The functions are those of
ggml-quants.c; without an importance matrix `quantize_TYPE` calls the `_ref` code of the type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.formats.ggml import GGML_TYPES, row_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MISSING = "llama-cpp-python is not installed"
FLOATS = ctypes.POINTER(ctypes.c_float)


@cache
def library() -> ctypes.CDLL | None:
    """`libggml-base`, or None where llama-cpp-python is not installed.

    The package itself is not imported: that would load its engine.
    """
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    for place in spec.submodule_search_locations:
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            path = Path(place, "lib", name)
            if path.exists():
                return ctypes.CDLL(str(path))
    return None


def quantizer(name: str) -> Callable[[Floats, Floats | None], Bytes]:
    """llama.cpp's `quantize_TYPE` of contiguous float32 (m, n) and importance (n,) or None.

    The function returns uint8 (m, bytes of a row).
    """
    function = _function(
        f"quantize_{_c_name(name)}",
        ctypes.c_size_t,
        [FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, FLOATS],
    )

    def run(x: Floats, importance: Floats | None) -> Bytes:
        rows, columns = x.shape
        target = np.empty((rows, row_bytes(name, columns)), dtype=np.uint8)
        weights = None if importance is None else _floats(importance)
        written = function(_floats(x), _address(target), rows, columns, weights)
        if written != target.nbytes:
            raise RuntimeError(f"{name}: {written} bytes were written, not {target.nbytes}")
        return target

    return run


def dequantizer(name: str) -> Callable[[Bytes, int], Floats]:
    """llama.cpp's `dequantize_row_TYPE` of uint8 (m, bytes of a row) and n: float32 (m, n)."""
    function = _function(
        f"dequantize_row_{_c_name(name)}", None, [ctypes.c_void_p, FLOATS, ctypes.c_int64]
    )

    def run(blocks: Bytes, columns: int) -> Floats:
        target = np.empty((len(blocks), columns), dtype=np.float32)
        function(_address(blocks), _floats(target), target.size)
        return target

    return run


def reference_quantize(name: str, x: Floats, importance: Floats | None = None) -> Bytes:
    """What llama.cpp makes of float32 (m, n): uint8 (m, bytes of a row)."""
    weights = None if importance is None else np.ascontiguousarray(importance)
    return quantizer(name)(np.ascontiguousarray(x), weights)


def reference_dequantize(name: str, blocks: Bytes, columns: int) -> Floats:
    """What llama.cpp reads from uint8 (m, bytes of a row): float32 (m, columns)."""
    return dequantizer(name)(np.ascontiguousarray(blocks), columns)


def reference_accepts(name: str, blocks: Bytes) -> bool:
    """Whether `ggml_validate_row_data` lets the blocks pass; llama-quantize asks it of its own."""
    function = _function(
        "ggml_validate_row_data", ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    )
    blocks = np.ascontiguousarray(blocks)
    return bool(function(GGML_TYPES[name].id, _address(blocks), blocks.nbytes))


def _function(name: str, result: Any, arguments: list[Any]) -> Any:
    loaded = library()
    if loaded is None:
        raise RuntimeError(MISSING)
    function = getattr(loaded, name)
    function.restype, function.argtypes = result, arguments
    return function


def _floats(array: Floats) -> Any:
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        raise TypeError(f"expected contiguous float32; got {array.dtype}")
    return array.ctypes.data_as(FLOATS)


def _address(array: Bytes) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p)


def _c_name(name: str) -> str:
    """`Q4_K` -> `q4_K`, `IQ4_NL` -> `iq4_nl`: as ggml spells its functions."""
    return name[:-1].lower() + "K" if name.endswith("_K") else name.lower()
