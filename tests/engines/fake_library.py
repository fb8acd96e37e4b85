"""Stands in for `llama_cpp.llama_cpp` in the child process: the same calls, made-up logits.

A "model" is a JSON file: `vocabulary`, `context`, and under `does` what goes wrong and where. The
logits of a position are: the sum of all tokens since the cache was emptied, the position, how many
rows ran together, the size of the context, then zeros. What was asked of the library is appended to
`journal.jsonl` beside the model.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GGML_TYPE_F32 = 0
LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
LLAMA_FTYPE_MOSTLY_Q4_K_M = 15
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_log: list[Callable[[int, bytes, None], None]] = []


class Params:
    """Parameters of any kind; whatever is set is kept."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class llama_batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class llama_model_imatrix_data(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]


class llama_model_quantize_params(ctypes.Structure):
    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("pure", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(llama_model_imatrix_data)),
    ]


class Model:
    def __init__(self, path: Path, params: Any) -> None:
        self.path, self.params = path, params
        self.fields: dict[str, Any] = json.loads(path.read_text("utf-8"))

    def misbehave(self, where: str) -> Any:
        kind = self.fields.get("does", {}).get(where)
        if kind is None:
            return None
        os.write(2, f"about to {kind}\n".encode())
        if kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == "exit":
            os._exit(7)
        elif kind == "hang":
            (self.path.parent / "hanging").touch()
            time.sleep(600)
        elif kind == "chatter":
            print("llama.cpp says hello", flush=True)
        elif kind == "garbage":
            _write_into_pipes(b"\x00garbage\n")
        return kind

    def journal(self, **fields: Any) -> None:
        with (self.path.parent / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


class Context:
    def __init__(self, model: Model, params: Any) -> None:
        self.model, self.params = model, params
        self.tokens: list[int] = []
        self.logits: Any = None


def _write_into_pipes(data: bytes) -> None:
    for descriptor in range(3, 20):
        try:
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, data)
        except OSError:
            continue


def llama_log_set(callback: Callable[[int, bytes, None], None], data: None) -> None:
    _log[:] = [callback]


def llama_backend_init() -> None:
    _log[0](1, b"backend: fake\n", None)


def llama_print_system_info() -> bytes:
    return os.environ.get("FAKE_SYSTEM", "CPU : AVX2 = 1 | ").encode()


def llama_model_default_params() -> Params:
    return Params(n_gpu_layers=-1, use_extra_bufts=True)


def llama_context_default_params() -> Params:
    return Params(n_batch=2048, n_ubatch=512, type_k=1, type_v=1, flash_attn_type=-1)


def llama_model_quantize_default_params() -> llama_model_quantize_params:
    return llama_model_quantize_params()


def llama_model_load_from_file(path: bytes, params: Params) -> Model | None:
    try:
        model = Model(Path(os.fsdecode(path)), params)
    except ValueError:
        _log[0](4, b"gguf: invalid magic\n", None)
        return None
    model.misbehave("load")
    return model


def llama_model_free(model: Model) -> None:
    model.journal(freed=True)


def llama_init_from_model(model: Model, params: Params) -> Context | None:
    model.journal(model=vars(model.params), context=vars(params))
    return None if model.misbehave("context") else Context(model, params)


def llama_free(context: Context) -> None:
    pass


def llama_model_get_vocab(model: Model) -> Model:
    return model


def llama_vocab_n_tokens(model: Model) -> int:
    return int(model.fields["vocabulary"])


def llama_model_n_ctx_train(model: Model) -> int:
    return int(model.fields["context"])


def llama_model_n_params(model: Model) -> int:
    return 1000


def llama_model_size(model: Model) -> int:
    return 4000


def llama_model_n_layer(model: Model) -> int:
    return 3


def llama_model_n_head(model: Model) -> int:
    return 4


def llama_model_n_head_kv(model: Model) -> int:
    return 2


def llama_model_n_embd(model: Model) -> int:
    return 32


def llama_model_meta_val_str(model: Model, key: bytes, text: Any, size: int) -> int:
    value: str | None = model.fields.get("metadata", {}).get(key.decode())
    if value is None:
        return -1
    text.value = value.encode()
    return len(value)


def llama_get_memory(context: Context) -> Context:
    return context


def llama_memory_clear(context: Context, data: bool) -> None:
    context.tokens.clear()


def llama_memory_seq_rm(context: Context, sequence: int, start: int, stop: int) -> bool:
    if context.model.fields.get("forgets", True):
        del context.tokens[start:]
    return bool(context.model.fields.get("forgets", True))


def llama_batch_get_one(tokens: Any, count: int) -> llama_batch:
    return llama_batch(n_tokens=count, token=tokens)


def llama_decode(context: Context, batch: llama_batch) -> int:
    if context.model.misbehave("decode") == "fail":
        _log[0](4, b"decode: no slot\n", None)
        return -3
    vocabulary, rows = llama_vocab_n_tokens(context.model), batch.n_tokens
    context.model.journal(rows=rows, held=len(context.tokens))
    context.logits = (ctypes.c_float * (rows * vocabulary))()
    count = 0
    for row in range(rows):
        context.tokens.append(batch.token[row])
        if not batch.logits or batch.logits[row]:
            known = [sum(context.tokens), len(context.tokens) - 1, rows, context.params.n_ctx]
            context.logits[count * vocabulary : count * vocabulary + 4] = known
            count += 1
    return 0


def llama_get_logits(context: Context) -> Any:
    return ctypes.cast(context.logits, ctypes.POINTER(ctypes.c_float))


def llama_get_logits_ith(context: Context, index: int) -> Any:
    return llama_get_logits(context)


def llama_sampler_init_greedy() -> str:
    return "greedy"


def llama_sampler_sample(sampler: str, context: Context, index: int) -> int:
    """The sum of all tokens, modulo the vocabulary."""
    assert (sampler, index) == ("greedy", -1)
    return sum(context.tokens) % llama_vocab_n_tokens(context.model)


def llama_sampler_free(sampler: str) -> None:
    pass


def llama_model_quantize(source: bytes, target: bytes, reference: Any) -> int:
    params = reference._obj
    model = Model(Path(os.fsdecode(source)), params)
    if model.misbehave("quantize") == "fail":
        _log[0](4, b"quantize: unknown tensor\n", None)
        return 1
    importance, index = {}, 0
    while params.imatrix and params.imatrix[index].name is not None:
        entry = params.imatrix[index]
        importance[entry.name.decode()] = entry.data[: entry.size]
        index += 1
    model.journal(
        ftype=params.ftype, threads=params.nthread, pure=params.pure, importance=importance
    )
    shutil.copy(os.fsdecode(source), os.fsdecode(target))
    return 0


if "FAKE_IMPORT" in os.environ:
    sys.stderr.write("loading the fake\n")
    raise OSError(os.environ["FAKE_IMPORT"])
