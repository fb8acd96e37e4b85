"""The process that llama.cpp runs in, with a fake library: answers, crashes, hangs, and its end."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab.engines.llamacpp.engine import LlamaCppEngine, quantize_file
from pytest_qlab.engines.llamacpp.process import Child
from pytest_qlab.errors import EngineError, MethodError, MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the child finds a `llama_cpp`."""
    package = tmp_path / "library" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.0.fake"\n')
    (package / "llama_cpp.py").write_text("from tests.engines.fake_library import *\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(ROOT)]))
    return package


@pytest.fixture
def write_model(library: Path, tmp_path: Path) -> Any:
    def write(
        name: str = "model.gguf", *, vocabulary: int = 6, context: int = 4096, **fields: Any
    ) -> Path:
        path = tmp_path / "models" / name
        path.parent.mkdir(exist_ok=True)
        written = {"vocabulary": vocabulary, "context": context, **fields}
        path.write_text(json.dumps(written), encoding="utf-8")
        return path

    return write


def journal(path: Path) -> list[dict[str, Any]]:
    lines = (path.parent / "journal.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tokens(count: int, vocabulary: int = 6) -> list[int]:
    return [(7 * n + 3) % vocabulary for n in range(count)]


def expected_sums(ids: list[int], first: int) -> list[float]:
    """The fake's first logit: all tokens up to each position."""
    return [float(total) for total in itertools.accumulate(ids)][first : len(ids) - 1]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has, too."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# --- answers -------------------------------------------------------------------------------------


def test_facts_come_from_the_library(write_model: Any) -> None:
    with LlamaCppEngine(write_model(vocabulary=9, context=77)) as engine:
        assert engine.name == "llama.cpp 0.0.fake"
        assert (engine.vocabulary, engine.context, engine.weight_bytes) == (9, 77, 4000)
        # 3 layers, 2 heads of keys and values of 32 / 4 numbers each, 2 bytes a number.
        assert engine.kv_bytes_per_token == 3 * 2 * (8 + 8) * 2


def test_heads_may_have_widths_of_their_own(write_model: Any) -> None:
    widths = {"x.attention.key_length": "10", "x.attention.value_length": "20"}
    path = write_model(metadata={"general.architecture": "x", **widths})
    with LlamaCppEngine(path) as engine:
        assert engine.kv_bytes_per_token == 3 * 2 * (10 + 20) * 2


@pytest.mark.parametrize(
    ("count", "first"), [(2, 0), (9, 0), (9, 7), (300, 3), (1300, 0), (1300, 600), (1300, 1298)]
)
def test_logits_are_of_the_positions_asked_for(write_model: Any, count: int, first: int) -> None:
    ids = tokens(count)
    with LlamaCppEngine(write_model()) as engine:
        pieces = list(engine.logits(ids, first))
    found = torch.cat(pieces)
    assert found.dtype == torch.float32
    assert found.shape == (count - 1 - first, 6)
    assert found[:, 0].tolist() == expected_sums(ids, first)
    assert found[:, 1].tolist() == list(range(first, count - 1))


def test_long_windows_come_in_pieces_of_even_lengths(write_model: Any) -> None:
    with LlamaCppEngine(write_model()) as engine:
        pieces = list(engine.logits(tokens(1300), 0))
    # 1299 tokens, at most 512 together: no piece is a short rest, which would use other kernels.
    assert [len(piece) for piece in pieces] == [433, 433, 433]
    assert {float(rows) for piece in pieces for rows in piece[:, 2]} == {433.0}


def test_pieces_of_a_large_vocabulary_are_bounded_in_bytes(write_model: Any) -> None:
    with LlamaCppEngine(write_model(vocabulary=2**18)) as engine:
        pieces = [piece.shape for piece in engine.logits(tokens(101), 89)]
    # 64 MiB are 64 rows of this vocabulary; the second half holds what was asked for.
    assert pieces == [(11, 2**18)]


def test_what_is_not_wanted_is_not_sent(write_model: Any) -> None:
    with LlamaCppEngine(write_model()) as engine:
        pieces = list(engine.logits(tokens(1300), 1000))
    assert [len(piece) for piece in pieces] == [299]


def test_each_window_starts_afresh(write_model: Any) -> None:
    first, second = tokens(40), [5, *tokens(30)]
    with LlamaCppEngine(write_model()) as engine:
        alone = torch.cat(list(engine.logits(second, 0)))
        list(engine.logits(first, 0))
        engine.prefill(first)
        again = torch.cat(list(engine.logits(second, 0)))
    assert torch.equal(alone, again)


def test_contexts_grow_with_the_windows(write_model: Any) -> None:
    with LlamaCppEngine(write_model()) as engine:
        sizes = [
            float(next(iter(engine.logits(tokens(n), n - 2)))[0, 3]) for n in (10, 600, 300, 600)
        ]
    assert sizes == [256.0, 768.0, 768.0, 768.0]


def test_quality_is_exact_and_prefill_as_by_default(write_model: Any) -> None:
    path = write_model()
    with LlamaCppEngine(path, threads=3) as engine:
        list(engine.logits(tokens(10), 0))
        engine.prefill(tokens(10))
    exact, default = (entry for entry in journal(path) if "context" in entry)
    assert exact["model"]["use_extra_bufts"] is False
    assert (exact["context"]["type_k"], exact["context"]["type_v"]) == (0, 0)
    assert exact["context"]["flash_attn_type"] == 0
    assert default["model"]["use_extra_bufts"] is True
    assert (default["context"]["type_k"], default["context"]["type_v"]) == (1, 1)
    assert default["context"]["flash_attn_type"] == -1
    for entry in (exact, default):
        assert entry["model"]["n_gpu_layers"] == 0
        assert entry["context"]["op_offload"] is False
        assert entry["context"]["n_threads"] == entry["context"]["n_threads_batch"] == 3


def test_amx_is_never_used(write_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SYSTEM", "CPU : AVX512 = 1 | AMX_INT8 = 1 | ")
    path = write_model()
    with LlamaCppEngine(path) as engine:
        engine.prefill(tokens(10))
    (entry,) = (entry for entry in journal(path) if "context" in entry)
    assert entry["model"]["use_extra_bufts"] is False


def test_prefill_takes_prompts_longer_than_a_batch(write_model: Any) -> None:
    with LlamaCppEngine(write_model()) as engine:
        engine.prefill(tokens(3000))
        assert torch.cat(list(engine.logits(tokens(20), 0))).shape == (19, 6)


def test_counters_grow_and_memory_is_the_childs_own(write_model: Any) -> None:
    with LlamaCppEngine(write_model()) as engine:
        before = engine.cpu_ns
        list(engine.logits(tokens(2000), 0))
        assert 0 < before < engine.cpu_ns < 60e9
        assert engine.switches >= 0
        assert 0 < engine.idle_memory <= engine.peak_memory
        # This process has torch loaded, which a count inherited from it would show.
        assert engine.peak_memory < 100 * 2**20


def test_paths_may_hold_any_characters(write_model: Any) -> None:
    with LlamaCppEngine(write_model("größe 模型 '\".gguf")) as engine:
        assert torch.cat(list(engine.logits(tokens(5), 0))).shape == (4, 6)


def test_what_a_library_prints_does_not_get_into_the_answers(write_model: Any) -> None:
    with LlamaCppEngine(write_model(does={"decode": "chatter"})) as engine:
        assert torch.cat(list(engine.logits(tokens(5), 0))).shape == (4, 6)


def test_several_engines_run_beside_each_other(write_model: Any) -> None:
    engines = [LlamaCppEngine(write_model(f"{n}.gguf", vocabulary=4 + n)) for n in range(3)]
    try:
        iterators: list[Iterator[Tensor]] = [
            engine.logits(tokens(1300, vocabulary=4), 0) for engine in engines
        ]
        for pieces in zip(*iterators, strict=True):
            assert [piece.shape[1] for piece in pieces] == [4, 5, 6]
    finally:
        for engine in engines:
            engine.close()


def test_threads_take_turns(write_model: Any) -> None:
    windows = [tokens(n) for n in (20, 1300, 35, 700)]
    found: dict[int, list[float]] = {}
    with LlamaCppEngine(write_model()) as engine:

        def run(number: int) -> None:
            pieces = torch.cat(list(engine.logits(windows[number], 0)))
            found[number] = pieces[:, 0].tolist()

        threads = [threading.Thread(target=run, args=(n,)) for n in range(len(windows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {n: expected_sums(ids, 0) for n, ids in enumerate(windows)}


def test_an_iterator_that_is_given_up_leaves_the_engine_usable(write_model: Any) -> None:
    with LlamaCppEngine(write_model()) as engine:
        iterator = engine.logits(tokens(1300), 0)
        next(iterator)
        with pytest.raises(RuntimeError, match="not exhausted"):
            engine.prefill(tokens(4))
        del iterator
        found = torch.cat(list(engine.logits(tokens(8), 0)))
    assert found[:, 0].tolist() == expected_sums(tokens(8), 0)


# --- what cannot be asked ------------------------------------------------------------------------


def test_a_window_beyond_the_context_is_refused(write_model: Any) -> None:
    with LlamaCppEngine(write_model(context=64)) as engine:
        for run in (engine.prefill, lambda ids: engine.logits(ids, 0)):
            with pytest.raises(EngineError, match=r"65 tokens.*context of 64.*window-length=64"):
                run(tokens(65))
        assert torch.cat(list(engine.logits(tokens(64), 0))).shape == (63, 6)


@pytest.mark.parametrize("ids", [[], [1], [1, 6], [1, -1], [1, 2**31]])
def test_tokens_outside_the_vocabulary_are_refused(write_model: Any, ids: list[int]) -> None:
    with (
        LlamaCppEngine(write_model()) as engine,
        pytest.raises(EngineError, match="at least 2 tokens from 0 to 5"),
    ):
        engine.logits(ids, 0)


@pytest.mark.parametrize("first", [-1, 3, 4])
def test_positions_that_predict_nothing_are_refused(write_model: Any, first: int) -> None:
    with LlamaCppEngine(write_model()) as engine, pytest.raises(ValueError, match="first must be"):
        engine.logits([1, 2, 3, 4], first)


# --- what goes wrong -----------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("SIGSEGV", r"killed by SIGSEGV .*AMX.*-mno-amx-tile.*--no-binary"),
        ("SIGILL", r"killed by SIGILL .*another processor.*--no-binary"),
        ("SIGKILL", r"killed by SIGKILL .*out of memory.*fewer workers"),
        ("SIGABRT", r"killed by SIGABRT .*last lines"),
        ("exit", r"exited with status 7 "),
        ("garbage", r"something else than an answer: '\\x00garbage'"),
    ],
)
def test_a_crash_is_an_error_that_says_what_to_do(write_model: Any, how: str, message: str) -> None:
    engine = LlamaCppEngine(write_model(does={"decode": how}))
    pid = engine._child.pid
    with pytest.raises(EngineError, match=f"(?s){message}") as raised:
        list(engine.logits(tokens(10), 0))
    assert "computing logits of 9 tokens" in str(raised.value)
    if how != "garbage":
        assert f"about to {how}" in str(raised.value)
    assert gone(pid)
    with pytest.raises(EngineError, match=f"(?s){message}"):  # and stays so
        engine.prefill(tokens(10))
    engine.close()


@posix_only
def test_a_crash_while_opening_leaves_nothing_behind(write_model: Any) -> None:
    with pytest.raises(EngineError, match=r"killed by SIGSEGV while opening .*model\.gguf"):
        LlamaCppEngine(write_model(does={"load": "SIGSEGV"}))
    gc.collect()


def test_refusals_come_with_the_log_and_leave_the_engine_usable(write_model: Any) -> None:
    with LlamaCppEngine(write_model(does={"decode": "fail"})) as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"(?s)llama_decode returned -3.*no slot"):
                list(engine.logits(tokens(10), 0))


def test_a_context_that_cannot_be_made(write_model: Any) -> None:
    with (
        LlamaCppEngine(write_model(does={"context": "fail"})) as engine,
        pytest.raises(EngineError, match=r"running 5 tokens: llama\.cpp could not make a"),
    ):
        engine.prefill(tokens(5))


def test_files_that_cannot_be_opened(library: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot open .*none\.gguf: No such file"):
        LlamaCppEngine(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(EngineError, match=r"(?s)could not open the file.*invalid magic"):
        LlamaCppEngine(tmp_path / "text.gguf")


def test_without_the_library_its_extra_is_named(library: Path, tmp_path: Path) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'llama_cpp'\", name='llama_cpp')"
    (library / "__init__.py").write_text(missing)
    with pytest.raises(MissingExtraError, match=r"pytest-qlab\[llamacpp\]"):
        LlamaCppEngine(tmp_path / "model.gguf")
    with pytest.raises(MissingExtraError, match=r"pytest-qlab\[llamacpp\]"):
        quantize_file(tmp_path / "a", tmp_path / "b", "MOSTLY_Q4_K_M", weights=1)


@pytest.mark.parametrize(
    "source",
    [
        "raise OSError('libllama.so: cannot open shared object file')",
        "import a_module_that_is_not_there",
        "syntax error",
        "",  # no __version__
    ],
)
def test_a_broken_installation(library: Path, tmp_path: Path, source: str) -> None:
    (library / "__init__.py").write_text(source)
    with pytest.raises(EngineError, match=r"cannot be loaded: .*Install it anew: pip install"):
        LlamaCppEngine(tmp_path / "model.gguf")


@posix_only
def test_a_library_that_kills_the_process_on_import(library: Path, tmp_path: Path) -> None:
    (library / "__init__.py").write_text("import os; os.kill(os.getpid(), 4)")
    with pytest.raises(EngineError, match=r"killed by SIGILL while loading its library"):
        LlamaCppEngine(tmp_path / "model.gguf")


def test_engine_errors_are_method_errors() -> None:
    assert issubclass(EngineError, MethodError)


# --- an unreliable process, without the program --------------------------------------------------


def child_that(source: str, patience: float = 1.0) -> Child:
    body = "import sys, os, time, json\nout = sys.stdout.buffer\n" + textwrap.dedent(source)
    return Child([sys.executable, "-S", "-E", "-c", body], patience=patience)


GOOD = {"number": 1, "bytes": 0, "cpu_ns": 1, "switches": 0}


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b"\n",
        b"\xff\xfe\x00\n",
        b"[1, 2]\n",
        b"7\n",
        b"null\n",
        b"[" * 60_000 + b"\n",
        b"x" * 70_000,
        json.dumps({**GOOD, "number": 2}).encode() + b"\n",
        json.dumps({**GOOD, "bytes": -1}).encode() + b"\n",
        json.dumps({**GOOD, "bytes": 10**18}).encode() + b"\n",
        json.dumps({**GOOD, "bytes": "9"}).encode() + b"\n",
        json.dumps({**GOOD, "cpu_ns": None}).encode() + b"\n",
        json.dumps({"bytes": 0}).encode() + b"\n",
    ],
)
def test_garbage_is_refused(line: bytes) -> None:
    child = child_that(f"out.write({line!r}); out.flush(); time.sleep(60)")
    with pytest.raises(EngineError, match="something else than an answer"):
        child.ask("testing", {"do": "start"})
    assert gone(child.pid)
    child.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b'{"number": 1', json.dumps({**GOOD, "bytes": 100}).encode() + b"\n" + b"0123456789"],
)
def test_an_answer_that_breaks_off(answer: bytes) -> None:
    child = child_that(f"out.write({answer!r}); out.flush(); os.write(2, b'bye'); os._exit(0)")
    with pytest.raises(EngineError, match=r"(?s)exited with status 0 while testing.*bye"):
        child.ask("testing", {"do": "start"})
    child.close()


@posix_only
def test_a_process_that_closes_its_output_but_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait

    def impatient(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        return wait(process, None if timeout is None else 0.05)

    monkeypatch.setattr(subprocess.Popen, "wait", impatient)
    child = child_that("os.close(1); time.sleep(60)")
    with pytest.raises(EngineError, match="stopped answering while testing"):
        child.ask("testing", {"do": "start"})
    assert gone(child.pid)
    child.close()


@pytest.mark.parametrize("reads", [True, False])
def test_a_hang_is_ended(reads: bool) -> None:
    read = "sys.stdin.buffer.read(10**7)" if reads else "pass"
    child = child_that(f"sys.stderr.write('thinking'); {read}; time.sleep(600)", patience=0.005)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 1 s while testing"):
        child.ask("testing", {"do": "start"}, bytes(10**7))
    assert time.monotonic() - started < 20
    assert gone(child.pid)
    with pytest.raises(EngineError, match="no answer"):
        child.ask("testing", {"do": "start"})
    child.close()


def test_time_limits_grow_with_the_work() -> None:
    child = child_that(
        f"time.sleep(0.6); out.write({json.dumps(GOOD).encode()!r} + b'\\n'); out.flush()",
        patience=0.001,
    )
    assert child.ask("testing", {"do": "start"}, seconds=60_000)["number"] == 1
    child.close()


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="could not be started"):
        Child([str(tmp_path / "none")])


# --- the end -------------------------------------------------------------------------------------


def test_closing_twice_and_asking_afterwards(write_model: Any) -> None:
    engine = LlamaCppEngine(write_model())
    pid = engine._child.pid
    engine.close()
    engine.close()
    assert gone(pid)
    with pytest.raises(EngineError, match="closed before running 4 tokens"):
        engine.prefill(tokens(4))


def test_closing_lets_the_model_go(write_model: Any) -> None:
    path = write_model()
    LlamaCppEngine(path).close()
    assert journal(path)[-1] == {"freed": True}


def test_an_engine_that_is_forgotten_leaves_no_process(write_model: Any) -> None:
    engine = LlamaCppEngine(write_model())
    pid = engine._child.pid
    del engine
    gc.collect()
    assert gone(pid)


@posix_only
def test_interrupting_ends_the_process(write_model: Any) -> None:
    path = write_model(does={"decode": "hang"})
    engine = LlamaCppEngine(path)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            list(engine.logits(tokens(10), 0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert gone(engine._child.pid)
    with pytest.raises(EngineError, match="interrupted while computing logits"):
        engine.prefill(tokens(4))


@posix_only
def test_ctrl_c_does_not_reach_the_process(write_model: Any) -> None:
    with LlamaCppEngine(write_model()) as engine:
        assert os.getpgid(engine._child.pid) != os.getpgid(0)
        os.kill(engine._child.pid, signal.SIGINT)
        engine.prefill(tokens(4))


@posix_only
@pytest.mark.parametrize("does", [{}, {"decode": "hang"}])
def test_the_process_ends_when_its_parent_is_killed(
    write_model: Any, does: dict[str, str], tmp_path: Path
) -> None:
    path = write_model(does=does)
    source = f"""
        from pytest_qlab.engines.llamacpp.process import Child
        child = Child()
        child.ask("", {{"do": "start"}})
        child.ask("", {{"do": "open", "file": {str(path)!r}, "threads": 1}})
        child.send("", {{"do": "prefill"}}, bytes(16))
        print(child.pid, flush=True)
        child.receive("")
        print("done", flush=True)
        import time
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if does:
            wait_until((path.parent / "hanging").exists)
        else:
            assert parent.stdout.readline() == "done\n"
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid))


# --- quantizing ----------------------------------------------------------------------------------


def test_the_quantizer_gets_types_and_importance(write_model: Any, tmp_path: Path) -> None:
    source, target = write_model(), tmp_path / "größe.gguf"
    importance = {
        "blk.0.attn_q.weight": torch.tensor([1.0, 0.5, 0.25]),
        "blk.1.ffn_down.weight": torch.tensor([3.0, 4.0], dtype=torch.float64),
    }
    version = quantize_file(
        source, target, "MOSTLY_Q4_K_M", weights=10, importance=importance, threads=2
    )
    assert version == "0.0.fake"
    assert target.read_bytes() == source.read_bytes()
    assert journal(source) == [
        {
            "ftype": 15,
            "threads": 2,
            "pure": False,
            "importance": {
                "blk.0.attn_q.weight": [1.0, 0.5, 0.25],
                "blk.1.ffn_down.weight": [3.0, 4.0],
            },
        }
    ]


def test_without_importance_there_is_none(write_model: Any, tmp_path: Path) -> None:
    source = write_model()
    quantize_file(source, tmp_path / "out.gguf", "MOSTLY_Q4_K_M", weights=10, pure=True)
    (entry,) = journal(source)
    assert (entry["importance"], entry["pure"]) == ({}, True)


def test_a_quantizer_that_fails(write_model: Any, tmp_path: Path) -> None:
    source = write_model(does={"quantize": "fail"})
    with pytest.raises(
        EngineError, match=r"(?s)quantizing to Q4_K_M: .*returned 1.*unknown tensor"
    ):
        quantize_file(source, tmp_path / "out.gguf", "MOSTLY_Q4_K_M", weights=10)


def test_a_type_that_this_llama_cpp_does_not_know(write_model: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="LLAMA_FTYPE_MOSTLY_Q9"):
        quantize_file(write_model(), tmp_path / "out.gguf", "MOSTLY_Q9", weights=10)
