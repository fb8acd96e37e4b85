"""Where a model's files are: the embedded model, a local directory, or a snapshot from the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pytest_qlab.errors import ModelError

EMBEDDED = "embedded"
_EMBEDDED_DIRECTORY = Path(__file__).resolve().parent.parent / "embedded" / "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def resolve(source: str, revision: str | None = None) -> Path:
    """The local directory of a model given as `embedded`, a path, or a Hub id.

    A Hub id is downloaded into the Hub's cache unless it is there already.

    Raises:
        ModelError: there is no such directory or Hub model, or it cannot be downloaded.
    """
    if source == EMBEDDED:
        if not (_EMBEDDED_DIRECTORY / "config.json").is_file():
            raise ModelError(
                "The embedded model is missing from this installation of pytest-qlab. Reinstall "
                "the package from a wheel, or give a model with --qlab-model=PATH_OR_HUB_ID."
            )
        return _EMBEDDED_DIRECTORY
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"The model {source!r} is a file; a directory is expected that holds config.json, the "
            "tokenizer and the weights, as save_pretrained writes it. Give that directory."
        )
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"There is no model directory {source!r}, and it has not the form of a Hub id "
            "(NAME or OWNER/NAME). Check the path, or leave --qlab-model out to use the embedded "
            "model."
        )
    return _snapshot(source, revision)


def _snapshot(source: str, revision: str | None) -> Path:
    """The Hub's snapshot of a model in the local cache, with safetensors where there are any."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{source!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        directory = Path(
            snapshot_download(
                source, revision=revision, allow_patterns=[*_SMALL_FILES, "*.safetensors"]
            )
        )
        if not any(directory.glob("*.safetensors")):
            directory = Path(
                snapshot_download(
                    source, revision=revision, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]
                )
            )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"The Hub has no model {wanted} that you may read, and there is no local directory of "
            "that name. Check the name and the revision; for a gated or private model, accept its "
            "terms on the Hub and log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"The model {wanted} is neither a local directory nor in the Hub's cache, and the Hub "
            "cannot be reached (no network, or HF_HUB_OFFLINE is set). Download it first, where "
            f"there is a network, with `hf download {source}`, or give the path of a local "
            "directory, or leave --qlab-model out to use the embedded model."
        ) from error
    return directory


def read_config(directory: Path, source: str) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        ModelError: the file is missing, unreadable, or says the model is quantized already.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(
            f"The model directory {source!r} has no config.json. A directory as written by "
            "save_pretrained is expected: config.json, the tokenizer's files and the weights as "
            "safetensors."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The config.json of the model {source!r} cannot be read: {error}. Download or save "
            "the model again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"The config.json of the model {source!r} holds no JSON object. Download or save the "
            "model again."
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"The model {source!r} is quantized already (config.json has a quantization_config). "
            "Give the unquantized model that it was made from: it is what methods start from and "
            "are compared with."
        )
    return config


def weight_files(directory: Path, source: str) -> list[Path]:
    """The files that hold the weights: safetensors if there are any, else pytorch_model*.bin.

    Raises:
        ModelError: there are none, or a file that the index names is missing.
    """
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    for index in sorted(directory.glob("*.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"The index {index.name} of the model {source!r} cannot be read ({error}). "
                "Download the model again."
            ) from error
        if files and files[0].suffix == Path(min(names, default="")).suffix:
            missing = sorted(name for name in names if not (directory / name).is_file())
            if missing:
                raise ModelError(
                    f"The model {source!r} lacks {len(missing)} of the weight files that "
                    f"{index.name} names, the first being {missing[0]}. Download the model again."
                )
    if not files:
        raise ModelError(
            f"The model directory {source!r} has a config.json but no weights: neither "
            "*.safetensors nor pytorch_model*.bin. Download or save the model again."
        )
    return files


def checkpoint_dtypes(directory: Path, source: str) -> dict[str, torch.dtype]:
    """The dtype of every tensor in the weight files, by its name there.

    Raises:
        ModelError: a file is damaged.
    """
    dtypes: dict[str, torch.dtype] = {}
    for path in weight_files(directory, source):
        try:
            dtypes.update(_dtypes_in(path))
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
            raise ModelError(
                f"The weight file {path.name} of the model {source!r} is damaged or incomplete: "
                f"{error}. Download the model again."
            ) from error
        except Exception as error:  # unpickling raises errors of many kinds
            if path.suffix != ".bin":
                raise
            raise ModelError(
                f"The weight file {path.name} of the model {source!r} cannot be read: {error}. "
                "Save the model as safetensors."
            ) from error
    return dtypes


def _dtypes_in(path: Path) -> Iterator[tuple[str, torch.dtype]]:
    if path.suffix == ".bin":
        for name, value in torch.load(path, map_location="meta", weights_only=True).items():
            yield name, value.dtype
        return
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            dtype = SAFETENSORS_DTYPES.get(tensors.get_slice(name).get_dtype())
            if dtype is not None:
                yield name, dtype
