"""Writing models as GGUF files that llama.cpp loads, without rounding anything on the way."""

from __future__ import annotations

import math
import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pytest_qlab.engines.gguf.hyperparameters import ROPE_FACTORS, hyperparameters, rope_factors
from pytest_qlab.engines.gguf.names import Naming, Place, gguf_names
from pytest_qlab.engines.gguf.vocabulary import Vocabulary, vocabulary_of
from pytest_qlab.errors import MethodError, MissingExtraError, ModelError, StoreError, did_you_mean
from pytest_qlab.finite import is_finite
from pytest_qlab.formats.affine import AffineGroups, group_length
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.float4 import MicroscaledFloat4
from pytest_qlab.formats.ggml import GgmlBlocks, find_type, pack_blocks
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.models.structure import all_linears

if TYPE_CHECKING:
    from pytest_qlab.models.load import LoadedModel

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AFFINE = {4: "Q4_0", 8: "Q8_0"}
_BLOCK = 32
_FILE_TYPES = {
    "F32": "ALL_F32",
    # One type for everything has no number of its own: that of the mix with the most of it.
    "Q3_K": "MOSTLY_Q3_K_S",
    "Q4_K": "MOSTLY_Q4_K_S",
    "Q5_K": "MOSTLY_Q5_K_S",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}


@dataclass(frozen=True)
class _Entry:
    """A tensor to write; its bytes are made when they are written, and not kept."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], Tensor]


def base_tensors(
    loaded: LoadedModel, dtype: str
) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """The unquantized model as `write_gguf` takes it, all matrices in one type.

    Args:
        dtype: F32, F16 or BF16. In F32 nothing is copied.

    Returns:
        Matrices by module, other parameters by name.

    Raises:
        ModelError: the architecture is not supported, or a weight overflows in F16.
    """
    naming = gguf_names(loaded.model)
    sites = {f"{site.name}.weight": site for site in all_linears(loaded.model)}
    weights: dict[str, PackedWeight] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in loaded.model.named_parameters():
        place = naming.places[name]
        value = parameter.detach()
        if not place.packable:
            others[name] = value
            continue
        if name in sites and sites[name].transposed:
            value = value.t()
        rounded = value.to(DTYPES[dtype])
        if dtype == "F16" and not is_finite(rounded):
            raise ModelError(
                f"The weights of {place.module} have magnitudes up to {float(value.abs().max()):g}"
                f", which {dtype} cannot hold. Use F32 or BF16."
            )
        weights[place.module] = PlainWeight(rounded)
    return weights, others


def write_gguf(
    path: Path,
    loaded: LoadedModel,
    *,
    weights: Mapping[str, PackedWeight],
    others: Mapping[str, Tensor],
    file_type: str = "",
    vocabulary: bool = True,
) -> tuple[str, ...]:
    """Write a model to a GGUF file, all of it or nothing.

    Blocks of GGML types are written byte for byte, matrices in a floating-point type as they are,
    and affine grids as Q4_0 or Q8_0 where those are the same grids; all else in F32.

    Args:
        path: the file; replaced if it is there.
        loaded: the base model: names, configuration, tokenizer.
        weights: packed matrices of shape (out_features, in_features), by module.
        others: every other parameter, by name. Matrices among them keep their dtype.
        file_type: what llama.cpp is to call the file: a mix or a type, such as `Q4_K_M` or `F16`;
            by default the type that most weights have.
        vocabulary: whether to name the tokens. Without them any tokenizer will do, and llama.cpp
            takes token ids only.

    Returns:
        Sentences on what llama.cpp will do otherwise when it tokenizes text itself.

    Raises:
        MissingExtraError: the package `gguf` is not installed.
        ModelError: the architecture or the tokenizer cannot be expressed, or tensors are missing,
            too many or of wrong shapes.
        MethodError: a matrix is packed in a way that no GGML type can express.
        StoreError: the file cannot be written.
    """
    gguf = _package()
    naming = gguf_names(loaded.model)
    values = _values(naming, weights, others)
    entries = [_entry(place, values[name]) for name, place in naming.places.items()]
    factors = rope_factors(loaded.model)
    if factors is not None:
        entries.append(_plain(ROPE_FACTORS, factors))
    tokens = Vocabulary({"tokenizer.ggml.model": "none"}, ())
    if vocabulary:
        tokens = vocabulary_of(loaded.tokenizer, naming.rows)
    metadata = {
        "general.type": "model",
        "general.name": Path(loaded.name).name,
        "general.file_type": _file_type(gguf, file_type or _most_common(entries)),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        **hyperparameters(loaded.model),
        f"{naming.architecture}.vocab_size": naming.rows,
        **tokens.metadata,
    }
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _write(gguf, partial, naming.architecture, metadata, entries)
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(
            f"The GGUF file {path} cannot be written: {error.strerror or error}. Free some space, "
            "or give another place."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return tokens.notes


def expressible(model: Any) -> None:
    """Refuse what `write_gguf` could not write of a model whatever its weights; they may be meta.

    Raises:
        MissingExtraError: the package `gguf` is not installed.
        ModelError: the architecture cannot be expressed.
    """
    _package()
    gguf_names(model)
    hyperparameters(model)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("Writing a GGUF file", "gguf") from error
    return gguf


def _file_type(gguf: Any, name: str) -> int:
    known = gguf.LlamaFileType.__members__
    member = _FILE_TYPES.get(name.upper(), f"MOSTLY_{name.upper()}")
    if member not in known:
        short = [each.removeprefix("MOSTLY_") for each in known if each.startswith("MOSTLY_")]
        raise ModelError(
            f"GGUF files have no type {name!r}.{did_you_mean(name.upper(), [*_FILE_TYPES, *short])}"
        )
    return int(known[member])


def _most_common(entries: list[_Entry]) -> str:
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.type] += math.prod(entry.shape)
    return sizes.most_common(1)[0][0]


def _values(
    naming: Naming, weights: Mapping[str, PackedWeight], others: Mapping[str, Tensor]
) -> dict[str, PackedWeight | Tensor]:
    """What is to be written, by parameter: each of the model's parameters, and nothing else."""
    packed: dict[str, PackedWeight | Tensor] = {f"{name}.weight": w for name, w in weights.items()}
    given = {**others, **packed}
    unknown = next((name for name in given if name not in naming.places), None)
    if unknown is not None:
        raise ModelError(
            f"{unknown} is to be written to a GGUF file, but the base model has no such parameter. "
            "Write the model that the quantization started from."
        )
    for name, place in naming.places.items():
        if name not in given:
            raise ModelError(
                f"{name} is missing among what is to be written to a GGUF file. Give every "
                "parameter of the model, quantized or not."
            )
        if tuple(given[name].shape) != place.shape:
            raise ModelError(
                f"{name} is to be written to a GGUF file in the shape {tuple(given[name].shape)}, "
                f"but the base model's is {place.shape}. Write the model that the quantization "
                "started from."
            )
    return given


def _entry(place: Place, value: PackedWeight | Tensor) -> _Entry:
    if isinstance(value, Tensor):
        if not place.packable:
            return _plain(place.tensor, _take_rows(value, place).float())
        value = PlainWeight(value.detach())
    if not place.packable:
        raise ModelError(f"{place.parameter} is packed, but llama.cpp reads it in F32 only.")
    packed = value
    type = type_of(packed, place.module)
    rows, columns = place.shape
    found = find_type(type)
    nbytes = rows * columns // found.block_size * found.block_bytes

    def data() -> Tensor:
        index = place.file_rows()
        ordered = packed if index is None else packed.take_rows(_like(index, packed))
        if isinstance(ordered, GgmlBlocks):
            return ordered.data
        if isinstance(ordered, PlainWeight):
            return ordered.weight
        if isinstance(ordered, MicroscaledFloat4):
            return _mxfp4_blocks(ordered)
        assert isinstance(ordered, AffineGroups)
        return _blocks(ordered)

    return _Entry(place.tensor, type, place.shape, nbytes, data)


def _plain(name: str, value: Tensor) -> _Entry:
    value = value.detach().float()
    return _Entry(name, "F32", tuple(value.shape), value.numel() * 4, lambda: value)


def _take_rows(value: Tensor, place: Place) -> Tensor:
    index = place.file_rows()
    return value if index is None else value.detach().index_select(0, index.to(value.device))


def _like(index: Tensor, packed: PackedWeight) -> Tensor:
    return index.to(next(iter(packed.tensors().values())).device)


def type_of(packed: PackedWeight, name: str) -> str:
    """The GGML type that holds exactly these bits' values.

    Raises:
        MethodError: there is none.
    """
    if isinstance(packed, GgmlBlocks):
        return packed.type
    if isinstance(packed, PlainWeight) and packed.weight.dtype in _NAMES:
        return _NAMES[packed.weight.dtype]
    if isinstance(packed, MicroscaledFloat4):
        return _microscaled_type(packed, name)
    if not isinstance(packed, AffineGroups):
        raise _inexpressible(name, f"is stored as {packed.format!r}")
    length, columns = group_length(packed.shape[1], packed.group_size), packed.shape[1]
    if packed.bits not in _AFFINE:
        raise _inexpressible(name, f"has codes of {packed.bits} bits, not 4 or 8")
    if not packed.symmetric:
        raise _inexpressible(name, "has zero points")
    if packed.column_groups is not None:
        raise _inexpressible(name, "has groups of columns that are not neighbours")
    if length % _BLOCK or columns % _BLOCK:
        raise _inexpressible(
            name, f"has groups of {length} in rows of {columns}, which are no multiples of 32"
        )
    if packed.scales.dtype != torch.float16:
        raise _inexpressible(name, "has scales that float16 cannot hold")
    return _AFFINE[packed.bits]


def _microscaled_type(packed: MicroscaledFloat4, name: str) -> str:
    if packed.tensor_scale is not None:
        raise _inexpressible(name, "has a scale of the whole tensor")
    if packed.block_size != _BLOCK or packed.shape[1] % _BLOCK:
        raise _inexpressible(name, f"has rows of {packed.shape[1]}, which are no multiple of 32")
    return "MXFP4"


def _inexpressible(name: str, what: str) -> MethodError:
    return MethodError(
        f"{name} {what}, so no type of a GGUF file holds exactly its values. What can be written: "
        "methods named gguf, ggml or mxfp4, and others with symmetric=true, bits=4 or 8, groups of "
        "a multiple of 32 neighbouring columns (static_groups=true), and rows that are one, too."
    )


def _blocks(packed: AffineGroups) -> Tensor:
    """The same codes and scales in blocks of 32: uint8 (m, bytes of a row).

    Blocks of one group repeat its scale.
    """
    columns = packed.shape[1]
    repeats = group_length(columns, packed.group_size) // _BLOCK
    scales = packed.scales.repeat_interleave(repeats, 1)[:, : columns // _BLOCK]
    codes = packed.codes().reshape(-1, _BLOCK)
    if packed.bits == 8:
        codes = (codes.to(torch.int16) - 128).to(torch.int8)
    fields = {"d": scales.reshape(-1), "codes": codes}
    return pack_blocks(_AFFINE[packed.bits], fields).view(packed.shape[0], -1)


def _mxfp4_blocks(packed: MicroscaledFloat4) -> Tensor:
    """The same codes and exponents in llama.cpp's blocks: uint8 (m, bytes of a row)."""
    fields = {"e": packed.scales.reshape(-1), "codes": packed.codes().reshape(-1, _BLOCK)}
    return pack_blocks("MXFP4", fields).view(packed.shape[0], -1)


def _write(
    gguf: Any, path: Path, architecture: str, metadata: Mapping[str, Any], entries: list[_Entry]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for entry in entries:
            writer.add_tensor_info(
                entry.name,
                entry.shape,
                np.dtype(np.float32),
                entry.nbytes,
                raw_dtype=gguf.GGMLQuantizationType[entry.type],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            data = entry.data().detach().cpu().contiguous().reshape(-1)
            writer.write_tensor_data(data.view(torch.uint8).numpy())
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
