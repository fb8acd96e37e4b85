"""The process that llama.cpp runs in: crashes, hangs, garbage, and its end."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeAlias

import pytest

from pytest_qlab.engines.llamacpp.engine import LlamaCppEngine, quantize_file
from pytest_qlab.engines.llamacpp.process import Child
from pytest_qlab.errors import EngineError, MissingExtraError
from tests.engines.llamacpp_fakes import gone, journal, tokens, wait_until

WriteModel: TypeAlias = Callable[..., Path]
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


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
def test_a_crash_is_an_error_that_says_what_to_do(
    fake_model: WriteModel, how: str, message: str
) -> None:
    engine = LlamaCppEngine(fake_model(does={"decode": how}))
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
def test_a_crash_while_opening_leaves_nothing_behind(fake_model: WriteModel) -> None:
    with pytest.raises(EngineError, match=r"killed by SIGSEGV while opening .*model\.gguf"):
        LlamaCppEngine(fake_model(does={"load": "SIGSEGV"}))
    gc.collect()


def test_refusals_come_with_the_log_and_leave_the_engine_usable(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model(does={"decode": "fail"})) as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"(?s)llama_decode returned -3.*no slot"):
                list(engine.logits(tokens(10), 0))


def test_a_context_that_cannot_be_made(fake_model: WriteModel) -> None:
    with (
        LlamaCppEngine(fake_model(does={"context": "fail"})) as engine,
        pytest.raises(EngineError, match=r"running 5 tokens: llama\.cpp could not make a"),
    ):
        engine.prefill(tokens(5))


def test_files_that_cannot_be_opened(fake_llama_cpp: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot open .*none\.gguf: No such file"):
        LlamaCppEngine(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(EngineError, match=r"(?s)could not open the file.*invalid magic"):
        LlamaCppEngine(tmp_path / "text.gguf")


def test_without_the_library_its_extra_is_named(fake_llama_cpp: Path, tmp_path: Path) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'llama_cpp'\", name='llama_cpp')"
    (fake_llama_cpp / "__init__.py").write_text(missing)
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
def test_a_broken_installation(fake_llama_cpp: Path, tmp_path: Path, source: str) -> None:
    (fake_llama_cpp / "__init__.py").write_text(source)
    with pytest.raises(EngineError, match=r"cannot be loaded: .*Install it anew: pip install"):
        LlamaCppEngine(tmp_path / "model.gguf")


@posix_only
def test_a_library_that_kills_the_process_on_import(fake_llama_cpp: Path, tmp_path: Path) -> None:
    (fake_llama_cpp / "__init__.py").write_text("import os; os.kill(os.getpid(), 4)")
    with pytest.raises(EngineError, match=r"killed by SIGILL while loading its library"):
        LlamaCppEngine(tmp_path / "model.gguf")


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


def test_closing_twice_and_asking_afterwards(fake_model: WriteModel) -> None:
    engine = LlamaCppEngine(fake_model())
    pid = engine._child.pid
    engine.close()
    engine.close()
    assert gone(pid)
    with pytest.raises(EngineError, match="closed before running 4 tokens"):
        engine.prefill(tokens(4))


def test_closing_lets_the_model_go(fake_model: WriteModel) -> None:
    path = fake_model()
    LlamaCppEngine(path).close()
    assert journal(path)[-1] == {"freed": True}


def test_an_engine_that_is_forgotten_leaves_no_process(fake_model: WriteModel) -> None:
    engine = LlamaCppEngine(fake_model())
    pid = engine._child.pid
    del engine
    gc.collect()
    assert gone(pid)


@posix_only
def test_interrupting_ends_the_process(fake_model: WriteModel) -> None:
    path = fake_model(does={"decode": "hang"})
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
def test_ctrl_c_does_not_reach_the_process(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        assert os.getpgid(engine._child.pid) != os.getpgid(0)
        os.kill(engine._child.pid, signal.SIGINT)
        engine.prefill(tokens(4))


@posix_only
@pytest.mark.parametrize("does", [{}, {"decode": "hang"}])
def test_the_process_ends_when_its_parent_is_killed(
    fake_model: WriteModel, does: dict[str, str], tmp_path: Path
) -> None:
    path = fake_model(does=does)
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
