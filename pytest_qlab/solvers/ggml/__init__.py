"""llama.cpp's quantizers of the GGML types, byte for byte, in numpy.

Source: ggml-quants.c of llama.cpp, as compiled for x86-64 without fused multiply-adds, which is how
its releases are built. Each function of a type is one of two algorithms: without importance that of
`quantize_row_TYPE_ref`, with importance the weighted search that an imatrix turns on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pytest_qlab.errors import MethodError, did_you_mean
from pytest_qlab.formats.ggml import GGML_TYPES, GgmlType, pack_blocks, row_bytes
from pytest_qlab.parallel import ordered_map
from pytest_qlab.solvers.ggml.arrays import Fields, Floats
from pytest_qlab.solvers.ggml.kquants import QUANTIZERS as K_QUANTS
from pytest_qlab.solvers.ggml.legacy import QUANTIZERS as LEGACY
from pytest_qlab.solvers.ggml.nonlinear import QUANTIZERS as NONLINEAR

QUANTIZERS = {**LEGACY, **K_QUANTS, **NONLINEAR}

# Weights that are quantized and packed at a time, so that their codes are still in the cache.
PIECE = 2**19
# Beyond the reach of all scales in float16; beyond 2**40, sums overflow in float32, and llama.cpp
# stores zeros in most types, without a word.
LARGEST = np.float32(2**29)
LARGEST_IMPORTANCE = np.float32(1e20)  # beyond it, the sums of ordinary weights overflow
# A stored exponent of MXFP4 that is no number.
NO_EXPONENT = 255


def quantize_ggml(
    weight: Tensor, type: str, importance: Tensor | None = None, *, threads: int = 1
) -> Tensor:
    """The blocks that llama.cpp makes of a weight.

    Args:
        weight: (m, n), float32; n a multiple of the type's block size.
        type: a name in `GGML_TYPES`, in capitals or not.
        importance: (n,), float32, not negative: how much an error in each column costs, the mean
            square of the column's inputs in llama.cpp's imatrix. Q8_0 and MXFP4 take no notice.
        threads: rows are spread over; the bytes do not depend on it.

    Returns:
        (m, bytes of a row) uint8, on the weight's device. It is computed on the processor.

    Raises:
        MethodError: the shapes do not fit; there are weights that are not finite, or importance
            that is negative or above 1e20; the type is unknown; or a scale cannot be stored, since
            weights are too large for float16 or, in MXFP4, close to 2**-126. llama-quantize
            refuses these, too.
    """
    found = _type(type)
    _check_shapes(weight, found, importance)
    x = weight.detach().cpu().contiguous().numpy()
    columns = None
    if importance is not None:
        columns = importance.detach().cpu().contiguous().numpy()
        _check_importance(columns)
    blocks = torch.empty(len(x), row_bytes(found, x.shape[1]), dtype=torch.uint8)
    rows = max(1, PIECE // x.shape[1])

    def quantize(start: int) -> None:
        piece = x[start : start + rows]
        _check_weights(piece, found.name, start)
        # As in C, overflow and division by 0 go on as infinities; those that matter end in a scale.
        with np.errstate(all="ignore"):
            fields = QUANTIZERS[found.name](piece, columns)
        _check_scales(fields, found.name, start, piece)
        packed = pack_blocks(found.name, {k: torch.from_numpy(v) for k, v in fields.items()})
        blocks[start : start + rows] = packed.view(len(piece), -1)

    for _ in ordered_map(quantize, range(0, len(x), rows), threads):
        pass
    return blocks.to(weight.device)


def _type(name: str) -> GgmlType:
    if name.upper() not in GGML_TYPES:
        raise MethodError(
            f"There is no quantizer for the GGML type {name!r}."
            f"{did_you_mean(name.upper(), GGML_TYPES)}"
        )
    return GGML_TYPES[name.upper()]


def _check_shapes(weight: Tensor, type: GgmlType, importance: Tensor | None) -> None:
    if weight.dtype is not torch.float32 or weight.ndim != 2 or weight.shape[1] == 0:
        raise MethodError(
            f"{type.name} quantizes a float32 matrix; got {weight.dtype} of shape "
            f"{tuple(weight.shape)}."
        )
    columns = weight.shape[1]
    if columns % type.block_size:
        raise MethodError(
            f"{type.name} stores blocks of {type.block_size} weights of a row, which rows of "
            f"{columns} cannot be cut into. Take another type for this matrix."
        )
    if importance is not None and (
        importance.dtype is not torch.float32 or importance.shape != (columns,)
    ):
        raise MethodError(
            f"The importance of {columns} columns has to be float32 of shape ({columns},); got "
            f"{importance.dtype} of shape {tuple(importance.shape)}."
        )


def _check_importance(importance: Floats) -> None:
    wrong = np.flatnonzero(~((importance >= 0) & (importance <= LARGEST_IMPORTANCE)))
    if len(wrong):
        raise MethodError(
            f"The importance of a column has to be from 0 to {LARGEST_IMPORTANCE:.0e}; that of "
            f"column {wrong[0]} is {importance[wrong[0]]:.4g}."
        )


def _check_weights(piece: Floats, type: str, start: int) -> None:
    largest = np.finfo(np.float32).max if type == "MXFP4" else LARGEST
    # NaN passes neither comparison.
    if piece.min() >= -largest and piece.max() <= largest:
        return
    row, column = np.argwhere(~(np.absolute(piece) <= largest))[0]
    if np.isfinite(piece[row, column]):
        problem = f"no scale of {type} reaches that far"
    else:
        problem = "only finite weights can be quantized"
    raise MethodError(
        f"The weight at row {start + row}, column {column} is {piece[row, column]:.4g}; {problem}."
    )


def _check_scales(fields: Fields, type: str, start: int, piece: Floats) -> None:
    for name, values in fields.items():
        if name == "e":
            stored = values != NO_EXPONENT
        elif values.dtype == np.float16:
            stored = np.isfinite(values)
        else:
            continue
        if not stored.all():
            row = int(stored.argmin()) // (len(stored) // len(piece))
            raise MethodError(
                f"{type} cannot store the scale of a block in row {start + row}, whose largest "
                f"weight is {np.absolute(piece[row]).max():.4g}. llama-quantize refuses such "
                "weights, too."
            )
