"""The program that runs llama.cpp; `pytest_qlab.engines.llamacpp.process` starts it by its path.

It imports nothing of this package, so it starts fast and holds little memory of its own. Requests
come in on standard input, answers go out on what was standard output: a line of JSON each, and as
many bytes after it as its `bytes` says. Whatever llama.cpp or a library prints goes to standard
error.

Logits are made as exactly as llama.cpp's own kernels can, so that they tell the damage of
quantization and nothing else: keys and values in float32, no flash attention (which rounds both to
float16), weights not repacked. Prefill for timing runs on llama.cpp's defaults.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeAlias

Fields: TypeAlias = dict[str, Any]
Answer: TypeAlias = tuple[Fields, memoryview]

PIECE_BYTES = 64 * 2**20
"""Logits that are held and sent at a time."""
FEWEST_ROWS, MOST_ROWS = 32, 512
"""Tokens that run together. From 8 rows on, llama.cpp's CPU kernels give a row the same bits
however many run beside it; fewer rows go through other kernels."""
CELLS = 256
"""Contexts grow by this many tokens."""
NOTHING = memoryview(b"")


class Refused(Exception):
    """Something that llama.cpp said no to; the text and the last lines of its log go to people."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.log = list(_log)


_log: deque[str] = deque(maxlen=8)


class Model:
    """One file, opened one way at a time: `exact` for logits, or as llama.cpp does by default."""

    def __init__(
        self, api: Any, path: str, threads: int, repack: bool, *, exact: bool = True
    ) -> None:
        self.api, self.path, self.threads, self.repack = api, path, threads, repack
        self._model: Any = None
        self._context: Any = None
        self._repacked: bool | None = None
        self._exact: bool | None = None
        self._cells = 0
        self._held = b""  # the tokens that `fill` has put into the cache
        self._load(repacked=repack and not exact)

    def close(self) -> None:
        self._drop_context()
        if self._model is not None:
            self.api.llama_model_free(self._model)
            self._model = None

    def facts(self) -> Fields:
        """What the parent wants to know about the model."""
        api, model = self.api, self._model
        layers, heads = api.llama_model_n_layer(model), api.llama_model_n_head_kv(model)
        width = api.llama_model_n_embd(model) // max(api.llama_model_n_head(model), 1)
        kind = self._metadata("general.architecture") or ""
        keys = int(self._metadata(f"{kind}.attention.key_length") or width)
        values = int(self._metadata(f"{kind}.attention.value_length") or width)
        return {
            "vocabulary": api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)),
            "context": api.llama_model_n_ctx_train(model),
            "parameters": api.llama_model_n_params(model),
            "weight_bytes": api.llama_model_size(model),
            "kv_bytes_per_token": layers * heads * (keys + values) * 2,  # float16 by default
        }

    def logits(self, ids: memoryview, first: int, columns: int) -> Iterator[tuple[int, memoryview]]:
        """Float32 logits of the positions from `first` on, some rows at a time."""
        api, total = self.api, len(ids) // 4
        rows = max(FEWEST_ROWS, min(MOST_ROWS, PIECE_BYTES // (4 * columns)))
        context = self._ready(exact=True, tokens=total, batch=rows)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        tokens = (ctypes.c_int32 * total).from_buffer_copy(ids)
        pieces = -(-total // rows)
        for piece in range(pieces):
            # Of even lengths: a short rest would go through other kernels. And all rows of a piece
            # are put out where one is wanted, because the last layer runs only those.
            start, stop = total * piece // pieces, total * (piece + 1) // pieces
            wanted = stop > first
            marks = (ctypes.c_int8 * (stop - start))(*[int(wanted)] * (stop - start))
            batch = api.llama_batch(
                n_tokens=stop - start,
                token=ctypes.cast(ctypes.byref(tokens, 4 * start), ctypes.POINTER(ctypes.c_int32)),
                logits=ctypes.cast(marks, ctypes.POINTER(ctypes.c_int8)),
            )
            self._decode(batch)
            if not wanted:
                continue
            skipped = max(first - start, 0)
            found = api.llama_get_logits(context)
            if not found:
                raise Refused("llama_get_logits gave nothing")
            count = (stop - start) * columns
            array = ctypes.cast(found, ctypes.POINTER(ctypes.c_float * count)).contents
            values = memoryview(array).cast("B")
            yield stop - start - skipped, values[4 * columns * skipped :]

    def fill(self, ids: memoryview) -> None:
        """Have the cache hold these tokens, with room for one more."""
        if self._held == bytes(ids):
            memory = self.api.llama_get_memory(self._context)
            if self.api.llama_memory_seq_rm(memory, 0, len(ids) // 4, -1):
                return
        self.prefill(ids, room=1)
        self._held = bytes(ids)

    def decode(self, token: memoryview) -> None:
        """Run one token after those of `fill` up to the logits after it."""
        if not self._held:
            raise Refused("the cache is not filled")
        one = (ctypes.c_int32 * 1).from_buffer_copy(token)
        self._decode(self.api.llama_batch_get_one(one, 1))
        if not self.api.llama_get_logits_ith(self._context, -1):
            raise Refused("llama_get_logits_ith gave nothing")

    def prefill(self, ids: memoryview, room: int = 0) -> None:
        """Run tokens from an empty cache up to the logits after the last."""
        api, total = self.api, len(ids) // 4
        context = self.ready_for(total + room)
        batch = api.llama_context_default_params().n_batch
        api.llama_memory_clear(api.llama_get_memory(context), False)
        tokens = (ctypes.c_int32 * total).from_buffer_copy(ids)
        for start in range(0, total, batch):
            part = ctypes.cast(ctypes.byref(tokens, 4 * start), ctypes.POINTER(ctypes.c_int32))
            self._decode(api.llama_batch_get_one(part, min(batch, total - start)))
        if not api.llama_get_logits_ith(context, -1):
            raise Refused("llama_get_logits_ith gave nothing")

    def ready_for(self, tokens: int) -> Any:
        """A context that holds so many tokens, as llama.cpp makes it by default."""
        batch = self.api.llama_context_default_params().n_batch
        return self._ready(exact=False, tokens=tokens, batch=batch)

    def generate(self, ids: memoryview, tokens: int) -> tuple[list[int], int, int]:
        """Greedy tokens after `ids`; nanoseconds to the first, and from there to the last."""
        api = self.api
        sampler = api.llama_sampler_init_greedy()
        try:
            started = time.perf_counter_ns()
            self.prefill(ids, room=tokens)
            found = [api.llama_sampler_sample(sampler, self._context, -1)]
            first = time.perf_counter_ns()
            while len(found) < tokens:
                one = (ctypes.c_int32 * 1)(found[-1])
                self._decode(api.llama_batch_get_one(one, 1))
                found.append(api.llama_sampler_sample(sampler, self._context, -1))
            return found, first - started, time.perf_counter_ns() - first
        finally:
            api.llama_sampler_free(sampler)

    def _decode(self, batch: Any) -> None:
        status = self.api.llama_decode(self._context, batch)
        if status != 0:
            raise Refused(f"llama_decode returned {status}")

    def _ready(self, *, exact: bool, tokens: int, batch: int) -> Any:
        self._held = b""
        self._load(repacked=self.repack and not exact)
        if self._context is None or exact is not self._exact or tokens > self._cells:
            self._drop_context()
            self._cells = -(-tokens // CELLS) * CELLS
            self._context = self._new_context(exact, batch)
            self._exact = exact
        return self._context

    def _new_context(self, exact: bool, batch: int) -> Any:
        api = self.api
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = self._cells, 1
        params.n_threads = params.n_threads_batch = self.threads
        # On the CPU only, whatever the library could use besides.
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        if exact:
            params.n_batch = params.n_ubatch = batch
            params.type_k = params.type_v = api.GGML_TYPE_F32
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = api.llama_init_from_model(self._model, params)
        if not context:
            raise Refused("llama.cpp could not make a context")
        return context

    def _load(self, *, repacked: bool) -> None:
        if self._model is not None and repacked is self._repacked:
            return
        self.close()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = repacked
        self._model = self.api.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise Refused("llama.cpp could not open the file")
        self._repacked = repacked

    def _drop_context(self) -> None:
        if self._context is not None:
            self.api.llama_free(self._context)
            self._context = None

    def _metadata(self, key: str) -> str | None:
        text = ctypes.create_string_buffer(256)
        size = self.api.llama_model_meta_val_str(self._model, key.encode(), text, len(text))
        return text.value.decode() if size >= 0 else None


class Program:
    """Answers requests, one after the other."""

    def __init__(self, api: Any, version: str) -> None:
        self.api, self.version = api, version
        # Kept, because llama.cpp calls it for as long as it runs.
        self._callback = api.llama_log_callback(self._note)
        api.llama_log_set(self._callback, None)
        api.llama_backend_init()
        self.idle = _peak_memory()
        self.model: Model | None = None
        self.commands: dict[str, Callable[[Fields, memoryview], Iterator[Answer]]] = {
            "start": self.start,
            "quantize": self.quantize,
            "open": self.open,
            "load": self.load,
            "logits": self.logits,
            "prefill": self.prefill,
            "fill": self.fill,
            "decode": self.decode,
            "generate": self.generate,
            "memory": self.memory,
        }

    def _note(self, level: int, text: bytes, data: Any) -> None:
        _log.append(text.decode(errors="replace").strip())
        os.write(2, text)

    def _system(self) -> str:
        return str(self.api.llama_print_system_info().decode(errors="replace"))

    def start(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        yield {"version": self.version, "system": self._system(), "idle_memory": self.idle}, NOTHING

    def quantize(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        """Write a quantized file, with the payload's importance values if there are any."""
        api = self.api
        params = api.llama_model_quantize_default_params()
        params.ftype = getattr(api, request["ftype"])
        params.nthread = request["threads"]
        params.pure = request["pure"]
        sizes: list[tuple[str, int]] = request["importance"]
        values = (ctypes.c_float * (len(payload) // 4)).from_buffer_copy(payload)
        # The entry after the last has no name, and ends the list.
        entries = (api.llama_model_imatrix_data * (len(sizes) + 1))()
        start = 0
        for entry, (name, size) in zip(entries, sizes, strict=False):
            entry.name, entry.size = name.encode(), size
            entry.data = ctypes.cast(
                ctypes.byref(values, 4 * start), ctypes.POINTER(ctypes.c_float)
            )
            start += size
        if sizes:
            params.imatrix = entries
        source, target = os.fsencode(request["source"]), os.fsencode(request["target"])
        status = api.llama_model_quantize(source, target, ctypes.byref(params))
        if status != 0:
            raise Refused(f"llama_model_quantize returned {status}")
        yield {}, NOTHING

    def _repacks(self) -> bool:
        # The AMX kernels that repacked weights go through crash (ggml-org/llama.cpp#20824).
        return "AMX_INT8 = 1" not in self._system()

    def open(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        self.model = Model(self.api, request["file"], request["threads"], self._repacks())
        yield self.model.facts(), NOTHING

    def load(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        """Open a file as llama.cpp does by default; time that, and the payload's next token."""
        file, repacks = request["file"], self._repacks()
        started = time.perf_counter()
        self.model = Model(self.api, file, request["threads"], repacks, exact=False)
        self.model.ready_for(len(payload) // 4 + 1)
        _touch(file)
        loaded = time.perf_counter()
        times, found = [], [-1]
        for _ in range(1 + request["steady"]):
            before = time.perf_counter()
            found, _, _ = self.model.generate(payload, 1)
            times.append(time.perf_counter() - before)
        fields = {"load": loaded - started, "first": times[0], "steady": times[1:]}
        yield {**fields, "token": found[0]}, NOTHING

    def logits(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        assert self.model is not None
        left = len(payload) // 4 - request["first"]
        pieces = self.model.logits(payload, request["first"], request["columns"])
        for rows, values in pieces:
            left -= rows
            yield {"rows": rows, "left": left}, values

    def prefill(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        assert self.model is not None
        self.model.prefill(payload)
        yield {}, NOTHING

    def fill(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        assert self.model is not None
        self.model.fill(payload)
        yield {}, NOTHING

    def decode(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        assert self.model is not None
        self.model.decode(payload)
        yield {}, NOTHING

    def generate(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        assert self.model is not None
        found, first, rest = self.model.generate(payload, request["tokens"])
        yield {"tokens": found, "first_ns": first, "rest_ns": rest}, NOTHING

    def memory(self, request: Fields, payload: memoryview) -> Iterator[Answer]:
        yield {"peak": _peak_memory()}, NOTHING


def _touch(path: str) -> None:
    """Read a byte of every page, because a file that is mapped need not be read before its use."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        view[:: mmap.PAGESIZE]


def _peak_memory() -> int:
    """The most bytes this program has had resident; 0 where the system does not say."""
    try:
        # Linux's ru_maxrss also counts what the parent held when it started this process.
        with open("/proc/self/status", encoding="ascii") as status:
            return next(1024 * int(line.split()[1]) for line in status if "VmHWM" in line)
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _counters() -> Fields:
    try:
        import resource
    except ImportError:
        return {"cpu_ns": time.process_time_ns(), "switches": 0}
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return {"cpu_ns": time.process_time_ns(), "switches": switches}


def _die_with_the_parent() -> None:
    """Exit at once when the other end of standard input closes, in the middle of work, too."""
    import select

    if not hasattr(select, "poll"):
        return  # Windows: the end of standard input is seen after the work.
    hung_up = select.poll()
    hung_up.register(0, 0)

    def wait() -> None:
        hung_up.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _load_library() -> Program:
    import llama_cpp  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from llama_cpp import llama_cpp as api

    return Program(api, str(llama_cpp.__version__))


def _prepare() -> BinaryIO:
    """Set the process up; returns where answers go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _die_with_the_parent()
    return answers


def main() -> None:
    """Answer requests until one says `close`, or standard input ends."""
    answers = _prepare()
    requests = sys.stdin.buffer
    program: Program | None = None

    def send(number: int, fields: Fields, data: memoryview = NOTHING) -> None:
        header = {"number": number, **fields, **_counters(), "bytes": len(data)}
        answers.write(json.dumps(header).encode() + b"\n")
        answers.write(data)
        answers.flush()

    for line in requests:
        request: Fields = json.loads(line)
        payload = memoryview(requests.read(request["bytes"]))
        if request["do"] == "close":
            break
        number = request["number"]
        try:
            if program is None:
                program = _load_library()
            for fields, data in program.commands[request["do"]](request, payload):
                send(number, fields, data)
        except BrokenPipeError:
            return
        except Refused as refusal:
            send(number, {"error": str(refusal), "loaded": True, "log": refusal.log})
        except Exception as error:  # whatever a bad build raises: the parent says so to people
            missing = isinstance(error, ModuleNotFoundError) and error.name == "llama_cpp"
            text = f"{type(error).__name__}: {error}"
            send(number, {"error": text, "loaded": program is not None, "missing": missing})
    if program is not None and program.model is not None:
        program.model.close()


if __name__ == "__main__":
    main()
