"""llama.cpp as an oracle: its logits and its tokens of a GGUF file, from a child process.

Run as a program, it reads a request from stdin and writes an `.npz` file; imported, it starts that
program, because a crash of llama.cpp must not be one of pytest.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

needs_llama = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("llama_cpp", "gguf")),
    reason="llama-cpp-python is not installed",
)


def llama_logits(path: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    """Float32 logits (len(ids), vocabulary) of one forward, one thread, a float32 cache."""
    return _ask(path, ids=ids)["logits"]


def llama_tokens(path: Path, texts: list[str]) -> list[list[int]]:
    """llama.cpp's own tokens of each text, with those that it puts around it."""
    answer = _ask(path, texts=texts)
    return [answer[f"tokens{index}"].tolist() for index in range(len(texts))]


def _ask(path: Path, **request: Any) -> dict[str, np.ndarray[Any, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.npz"
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps({"path": str(path), "answer": str(answer), **request}),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(answer) as arrays:
            return dict(arrays)


def _main() -> None:
    from llama_cpp import llama_cpp as lib

    request = json.loads(sys.stdin.read())
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.use_extra_bufts = False  # AMX repacking crashes on some processors
    model = lib.llama_model_load_from_file(request["path"].encode(), model_params)
    assert model, "the file does not load"
    vocabulary = lib.llama_model_get_vocab(model)
    answer: dict[str, Any] = {}
    if "ids" in request:
        answer["logits"] = _logits(lib, model, request["ids"])
    for index, text in enumerate(request.get("texts", [])):
        data, room = text.encode(), len(text.encode()) + 8
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(vocabulary, data, len(data), tokens, room, True, True)
        assert count >= 0
        answer[f"tokens{index}"] = np.array(tokens[:count], dtype=np.int64)
    np.savez(request["answer"], **answer)


def _logits(lib: Any, model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(ids))
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # F32
    params.flash_attn_type = 0
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = 1
    assert lib.llama_decode(context, batch) == 0
    rows = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    found = lib.llama_get_logits(context)
    return np.ctypeslib.as_array(found, shape=(len(ids), rows)).copy()


if __name__ == "__main__":
    _main()
