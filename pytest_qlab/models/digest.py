"""Digests that say which model it is: of files without loading them, and of a model in memory."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytest_qlab.models.source import read_config, weight_files
from pytest_qlab.store import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HASHED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.py", "*.safetensors", "*.bin")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def digest_of_directory(directory: Path, source: str) -> str:
    """Hex SHA-256 over configuration, tokenizer and weight files; README and the like left out."""
    read_config(directory, source)
    weights = set(weight_files(directory, source))
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _HASHED for path in directory.glob(pattern)}):
        if path.suffix in (".safetensors", ".bin") and path not in weights:
            continue
        # In the Hub's cache large files are links to blobs that are named after their SHA-256.
        blob = path.resolve().name
        content = blob if _SHA256.fullmatch(blob) else file_digest(path)
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def digest_of(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of a model in memory: configuration, every tensor, and the tokenizer.

    Without a model (None), of the tokenizer alone.
    """
    digest = hashlib.sha256()
    if model is not None:
        config = model.config.to_dict()
        for key in ("_name_or_path", "transformers_version", "dtype"):
            config.pop(key, None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(model.state_dict().items()):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(str(backend.to_str()).encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps(special, sort_keys=True).encode())
    return digest.hexdigest()
