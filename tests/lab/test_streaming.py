"""Quantizing block by block gives the files that quantizing in memory gives, killed or not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.streaming import block_bytes, run_child, write_model
from pytest_qlab import Lab
from pytest_qlab.checkpoint import Checkpoint, save_checkpoint
from pytest_qlab.errors import MethodError, ModelError, SpecError
from pytest_qlab.machine import available_memory
from pytest_qlab.streaming import exceeds_memory
from tests.architectures import ARCHITECTURES, character_tokenizer
from tests.lab.tiny import documents, saved_tiny_model

FEW = ("llama", "gpt2", "gemma2", "mixtral")


def lab(model: Path, store: Path, **options: Any) -> Lab:
    return Lab(
        str(model),
        evaluation=documents(2, seed=1),
        calibration=documents(6, seed=2),
        calibration_length=32,
        store=store,
        **{"threads": 1, **options},
    )


def contents(checkpoint: Checkpoint) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Every file's bytes; the index apart, without the time that it took."""
    files = {path.name: path.read_bytes() for path in checkpoint.directory.iterdir()}
    for name in ("qlab.json", "manifest.json"):
        del files[name]
    return files, {key: value for key, value in checkpoint.index.items() if key != "seconds"}


@pytest.mark.parametrize(
    "spec", ["none", "rtn", "gptq", "awq", "gptq:true_sequential=true", "gguf:Q4_K_M"]
)
@pytest.mark.parametrize("architecture", FEW)
def test_the_bits_are_the_same(tmp_path: Path, architecture: str, spec: str) -> None:
    model = saved_tiny_model(tmp_path / "model", architecture)
    whole = lab(model, tmp_path / "whole", stream="never")
    streamed = lab(model, tmp_path / "streamed", stream="always")
    method = whole.candidate(spec).method
    assert contents(streamed.checkpoint(method)) == contents(whole.checkpoint(method))
    assert not streamed.model.is_loaded
    assert streamed.forwards == whole.forwards


def test_gguf_files_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    files = []
    for stream in ("never", "always"):
        made = Lab("embedded", store=tmp_path / stream, stream=stream, threads=1)
        files.append(tmp_path / f"{stream}.gguf")
        made.candidate("rtn:symmetric=true:group_size=32").save_gguf(files[-1])
        assert made.model.is_loaded == (stream == "never")
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(FEW)))
def test_the_bits_are_the_same_everywhere(tmp_path: Path, architecture: str, spec: str) -> None:
    test_the_bits_are_the_same(tmp_path, architecture, spec)


@pytest.mark.parametrize("spec", ["gptq", "awq"])
def test_shards_threads_and_dtypes(tmp_path: Path, spec: str) -> None:
    model = tmp_path / "model"
    ARCHITECTURES["llama"]().bfloat16().save_pretrained(model, max_shard_size="10KB")
    character_tokenizer().save_pretrained(model)
    for dtype in ("float32", "bfloat16"):
        found = [
            contents(
                lab(model, tmp_path / f"{dtype}{way}", dtype=dtype, **way)
                .candidate(spec)
                .checkpoint
            )
            for way in ({"stream": "never"}, {"stream": "always", "threads": 3})
        ]
        assert found[0] == found[1]


def killed_at(line: int, make: Callable[[Callable[[str], None]], Any]) -> bool:
    """Whether `make`, in a process of its own, was killed when it said that line of progress."""

    def run() -> None:
        said = 0

        def progress(_: str) -> None:
            nonlocal said
            said += 1
            if said == line:
                os.kill(os.getpid(), signal.SIGKILL)

        make(progress)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("spec", ["rtn", "gptq", "awq"])
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, spec: str) -> None:
    model = saved_tiny_model(tmp_path / "model")
    expected = contents(lab(model, tmp_path / "whole", stream="never").candidate(spec).checkpoint)
    said: list[str] = []
    every = lab(model, tmp_path / "every", stream="always", progress=said.append)
    assert contents(every.candidate(spec).checkpoint) == expected
    for line in range(1, len(said) + 1):
        store = tmp_path / f"killed-{line}"

        def make(progress: Callable[[str], None], store: Path = store) -> None:
            _ = lab(model, store, stream="always", progress=progress).candidate(spec).checkpoint

        assert killed_at(line, make)
        again: list[str] = []
        resumed = lab(model, store, stream="always", progress=again.append)
        assert contents(resumed.candidate(spec).checkpoint) == expected
        # What had been finished before that line is not done again.
        assert [each for each in again if "going on" not in each] == said[line - 1 :]
        assert [path.name for path in store.rglob("*") if path.is_dir() and "." in path.name] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("part", [0, 1, 4])
def test_a_part_that_was_being_written_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    model = saved_tiny_model(tmp_path / "model")
    expected = contents(lab(model, tmp_path / "whole", stream="never").candidate("gptq").checkpoint)
    parts = iter(range(10))

    def die_half_way(directory: Path, *arguments: Any) -> None:
        save_checkpoint(directory, *arguments)
        if next(parts) == part:
            (directory / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    def make(_: Callable[[str], None]) -> None:
        monkeypatch.setattr("pytest_qlab.streaming.save_checkpoint", die_half_way)
        lab(model, tmp_path / "s", stream="always").candidate("gptq").checkpoint  # noqa: B018

    assert killed_at(0, make)
    resumed = lab(model, tmp_path / "s", stream="always").candidate("gptq").checkpoint
    assert contents(resumed) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_build_that_is_killed_again_and_again_ends(tmp_path: Path) -> None:
    model = saved_tiny_model(tmp_path / "model")
    expected = contents(lab(model, tmp_path / "whole", stream="never").candidate("gptq").checkpoint)

    def make(progress: Callable[[str], None]) -> None:
        _ = (
            lab(model, tmp_path / "s", stream="always", progress=progress)
            .candidate("gptq")
            .checkpoint
        )

    kills = 0
    while killed_at(3, make):  # the first line says where it goes on, the second is a block's
        kills += 1
        assert kills < 10
    assert kills >= 1
    assert contents(lab(model, tmp_path / "s").candidate("gptq").checkpoint) == expected


def test_streaming_is_automatic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved_tiny_model(tmp_path / "model")
    asked: list[int] = []

    def never_fits(nbytes: int) -> bool:
        asked.append(nbytes)
        return True

    monkeypatch.setattr("pytest_qlab.streaming.exceeds_memory", never_fits)
    large = lab(model, tmp_path / "large")
    _ = large.candidate("awq").checkpoint
    assert not large.model.is_loaded
    assert asked == [large.loaded.nbytes]
    # A model that is in memory by now is used.
    _ = large.candidate("awq:bits=3").checkpoint
    assert large.described is large.loaded
    monkeypatch.setattr("pytest_qlab.streaming.exceeds_memory", lambda nbytes: False)
    small = lab(model, tmp_path / "small")
    _ = small.candidate("awq").checkpoint
    assert small.model.is_loaded


def test_automatically_what_cannot_be_streamed_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_tiny_model(tmp_path / "model")
    said: list[str] = []
    monkeypatch.setattr("pytest_qlab.streaming.exceeds_memory", lambda nbytes: True)

    def refuse(*arguments: object, **options: object) -> None:
        raise ModelError("It is odd.")

    monkeypatch.setattr("pytest_qlab.inputs.open_lazily", refuse)
    odd = lab(model, tmp_path / "store", progress=said.append)
    _ = odd.candidate("rtn").checkpoint
    assert odd.model.is_loaded
    assert said[0] == "the whole model is loaded: It is odd."
    with pytest.raises(ModelError, match="It is odd"):
        _ = lab(model, tmp_path / "other", stream="always").candidate("rtn").checkpoint


def test_what_cannot_be_streamed_says_so(tmp_path: Path) -> None:
    memory = Lab(
        ARCHITECTURES["llama"](),
        tokenizer=character_tokenizer(),
        store=tmp_path / "store",
        stream="always",
    )
    with pytest.raises(ModelError, match="in memory already"):
        _ = memory.candidate("rtn").checkpoint
    model = saved_tiny_model(tmp_path / "model")
    with pytest.raises(MethodError, match="takes the whole model at once"):
        _ = lab(model, tmp_path / "store", stream="always").candidate("llamacpp:Q4_0").checkpoint
    with pytest.raises(SpecError, match="always"):
        lab(model, tmp_path / "store", stream="alway")


def test_models_that_two_copies_of_do_not_fit_are_large() -> None:
    assert exceeds_memory(41, available=100)
    assert not exceeds_memory(40, available=100)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_limit_on_the_process_counts() -> None:
    import resource

    def run() -> None:
        limit = 2**36
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        left = available_memory()
        os._exit(0 if left is not None and 0 < left < limit else 1)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == 0


WIDTH, INNER = 512, 1024


@pytest.mark.slow
@pytest.mark.parametrize(("work", "spec"), [("quantize", "gptq"), ("measure", "rtn")])
def test_peak_memory_does_not_grow_with_depth(tmp_path: Path, work: str, spec: str) -> None:
    """Nine more blocks: in memory they are held once or twice, block by block not even half."""
    more = 9 * block_bytes(WIDTH, INNER)
    peaks = {}
    for blocks in (3, 12):
        model = tmp_path / str(blocks)
        write_model(model, blocks, WIDTH, INNER)
        for stream in ("always", "never"):
            store = tmp_path / f"store-{blocks}-{stream}"
            found = run_child(work, model, store, spec, stream, 0, 2, 32)
            assert "error" not in found
            peaks[blocks, stream] = found["peak"] - found["idle"]
    assert peaks[12, "never"] - peaks[3, "never"] > more
    assert peaks[12, "always"] - peaks[3, "always"] < 0.5 * more


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux enforces such limits")
def test_a_model_is_measured_in_less_memory_than_it_takes(tmp_path: Path) -> None:
    model, blocks = tmp_path / "model", 24
    write_model(model, blocks, WIDTH, INNER)

    def measure(stream: str, limit: int) -> dict[str, Any]:
        store = tmp_path / f"{stream}-{limit}"
        return run_child("measure", model, store, "rtn", stream, limit, 4, 64)

    whole = measure("never", 0)
    room = whole["data"] + blocks * block_bytes(WIDTH, INNER)
    assert "error" in measure("never", room)
    found = measure("always", room)
    assert "error" not in found
    assert found["kl"]["value"] == whole["kl"]["value"] > 0
