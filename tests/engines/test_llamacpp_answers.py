"""What the engine answers and what it refuses, with a fake library in its process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from pytest_qlab.engines.llamacpp.engine import LlamaCppEngine, quantize_file, time_load
from pytest_qlab.errors import EngineError
from tests.engines.llamacpp_fakes import expected_sums, expected_tokens, journal, tokens

WriteModel: TypeAlias = Callable[..., Path]


def test_facts_come_from_the_library(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model(vocabulary=9, context=77)) as engine:
        assert engine.name == "llama.cpp 0.0.fake"
        assert (engine.vocabulary, engine.context, engine.weight_bytes) == (9, 77, 4000)
        # 3 layers, 2 heads of keys and values of 32 / 4 numbers each, 2 bytes a number.
        assert engine.kv_bytes_per_token == 3 * 2 * (8 + 8) * 2


def test_heads_may_have_widths_of_their_own(fake_model: WriteModel) -> None:
    widths = {"x.attention.key_length": "10", "x.attention.value_length": "20"}
    path = fake_model(metadata={"general.architecture": "x", **widths})
    with LlamaCppEngine(path) as engine:
        assert engine.kv_bytes_per_token == 3 * 2 * (10 + 20) * 2


@pytest.mark.parametrize(
    ("count", "first"), [(2, 0), (9, 0), (9, 7), (300, 3), (1300, 0), (1300, 600), (1300, 1298)]
)
def test_logits_are_of_the_positions_asked_for(
    fake_model: WriteModel, count: int, first: int
) -> None:
    ids = tokens(count)
    with LlamaCppEngine(fake_model()) as engine:
        pieces = list(engine.logits(ids, first))
    found = torch.cat(pieces)
    assert found.dtype == torch.float32
    assert found.shape == (count - 1 - first, 6)
    assert found[:, 0].tolist() == expected_sums(ids, first)
    assert found[:, 1].tolist() == list(range(first, count - 1))


def test_long_windows_come_in_pieces_of_even_lengths(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        pieces = list(engine.logits(tokens(1300), 0))
    # 1299 tokens, at most 512 together: no piece is a short rest, which would use other kernels.
    assert [len(piece) for piece in pieces] == [433, 433, 433]
    assert {float(rows) for piece in pieces for rows in piece[:, 2]} == {433.0}


def test_pieces_of_a_large_vocabulary_are_bounded_in_bytes(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model(vocabulary=2**18)) as engine:
        pieces = [piece.shape for piece in engine.logits(tokens(101), 89)]
    # 64 MiB are 64 rows of this vocabulary; the second half holds what was asked for.
    assert pieces == [(11, 2**18)]


def test_what_is_not_wanted_is_not_sent(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        pieces = list(engine.logits(tokens(1300), 1000))
    assert [len(piece) for piece in pieces] == [299]


def test_each_window_starts_afresh(fake_model: WriteModel) -> None:
    first, second = tokens(40), [5, *tokens(30)]
    with LlamaCppEngine(fake_model()) as engine:
        alone = torch.cat(list(engine.logits(second, 0)))
        list(engine.logits(first, 0))
        engine.prefill(first)
        again = torch.cat(list(engine.logits(second, 0)))
    assert torch.equal(alone, again)


def test_contexts_grow_with_the_windows(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        sizes = [
            float(next(iter(engine.logits(tokens(n), n - 2)))[0, 3]) for n in (10, 600, 300, 600)
        ]
    assert sizes == [256.0, 768.0, 768.0, 768.0]


def test_quality_is_exact_and_prefill_as_by_default(fake_model: WriteModel) -> None:
    path = fake_model()
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


def test_amx_is_never_used(fake_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SYSTEM", "CPU : AVX512 = 1 | AMX_INT8 = 1 | ")
    path = fake_model()
    with LlamaCppEngine(path) as engine:
        engine.prefill(tokens(10))
    (entry,) = (entry for entry in journal(path) if "context" in entry)
    assert entry["model"]["use_extra_bufts"] is False


def test_prefill_takes_prompts_longer_than_a_batch(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        engine.prefill(tokens(3000))
        assert torch.cat(list(engine.logits(tokens(20), 0))).shape == (19, 6)


@pytest.mark.parametrize("forgets", [True, False])
def test_a_token_runs_after_those_that_fill_the_cache(
    fake_model: WriteModel, forgets: bool
) -> None:
    """Filled again, the cache forgets that token; where it cannot, it is filled from the start."""
    path = fake_model(forgets=forgets)
    with LlamaCppEngine(path) as engine:
        with pytest.raises(EngineError, match="the cache is not filled"):
            engine.decode(7)
        for ids in (tokens(256), tokens(256), tokens(40)):
            engine.fill(ids)
            engine.decode(7)
        engine.prefill(tokens(5))
        with pytest.raises(EngineError, match="the cache is not filled"):
            engine.decode(7)
    runs = [(entry["rows"], entry["held"]) for entry in journal(path) if "rows" in entry]
    again = [] if forgets else [(256, 0)]
    assert runs == [(256, 0), (1, 256), *again, (1, 256), (40, 0), (1, 40), (5, 0)]
    (context,) = (entry["context"] for entry in journal(path) if "context" in entry)
    assert context["n_ctx"] >= 257


def test_counters_grow_and_memory_is_the_childs_own(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        before = engine.cpu_ns
        list(engine.logits(tokens(2000), 0))
        assert 0 < before < engine.cpu_ns < 60e9
        assert engine.switches >= 0
        assert 0 < engine.idle_memory <= engine.peak_memory
        # This process has torch loaded, which a count inherited from it would show.
        assert engine.peak_memory < 100 * 2**20


def test_paths_may_hold_any_characters(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model("größe 模型 '\".gguf")) as engine:
        assert torch.cat(list(engine.logits(tokens(5), 0))).shape == (4, 6)


def test_what_a_library_prints_does_not_get_into_the_answers(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model(does={"decode": "chatter"})) as engine:
        assert torch.cat(list(engine.logits(tokens(5), 0))).shape == (4, 6)


def test_several_engines_run_beside_each_other(fake_model: WriteModel) -> None:
    engines = [LlamaCppEngine(fake_model(f"{n}.gguf", vocabulary=4 + n)) for n in range(3)]
    try:
        iterators: list[Iterator[Tensor]] = [
            engine.logits(tokens(1300, vocabulary=4), 0) for engine in engines
        ]
        for pieces in zip(*iterators, strict=True):
            assert [piece.shape[1] for piece in pieces] == [4, 5, 6]
    finally:
        for engine in engines:
            engine.close()


def test_threads_take_turns(fake_model: WriteModel) -> None:
    windows = [tokens(n) for n in (20, 1300, 35, 700)]
    found: dict[int, list[float]] = {}
    with LlamaCppEngine(fake_model()) as engine:

        def run(number: int) -> None:
            pieces = torch.cat(list(engine.logits(windows[number], 0)))
            found[number] = pieces[:, 0].tolist()

        threads = [threading.Thread(target=run, args=(n,)) for n in range(len(windows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {n: expected_sums(ids, 0) for n, ids in enumerate(windows)}


def test_an_iterator_that_is_given_up_leaves_the_engine_usable(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        iterator = engine.logits(tokens(1300), 0)
        next(iterator)
        with pytest.raises(RuntimeError, match="not exhausted"):
            engine.prefill(tokens(4))
        del iterator
        found = torch.cat(list(engine.logits(tokens(8), 0)))
    assert found[:, 0].tolist() == expected_sums(tokens(8), 0)


# --- generating and loading ----------------------------------------------------------------------


def test_a_generation_has_the_tokens_asked_for_and_begins_anew(fake_model: WriteModel) -> None:
    path, ids = fake_model(), tokens(40)
    with LlamaCppEngine(path) as engine:
        engine.prefill(tokens(7))
        for count in (5, 1, 300):
            found = engine.generate(ids, count)
            assert list(found.tokens) == expected_tokens(ids, count)
            assert found.first_ns > 0
            assert found.rest_ns >= 0
        engine.fill(ids)
        engine.generate(ids, 2)
        with pytest.raises(EngineError, match="cache is not filled"):
            engine.decode(1)
    rows = [entry["rows"] for entry in journal(path) if "rows" in entry]
    # Each prompt at once, then one token at a time; the last token is not run.
    assert rows == [7, 40, *[1] * 4, 40, 40, *[1] * 299, 40, 40, 1]


def test_times_are_the_engines_and_not_those_of_asking(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model()) as engine:
        started = time.perf_counter_ns()
        found = engine.generate(tokens(9), 50)
        assert 0 < found.first_ns + found.rest_ns < time.perf_counter_ns() - started


def test_a_generation_beyond_the_context_is_refused(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model(context=64)) as engine:
        with pytest.raises(EngineError, match=r"65 tokens.*context of 64"):
            engine.generate(tokens(60), 5)
        assert len(engine.generate(tokens(60), 4).tokens) == 4
        with pytest.raises(ValueError, match="at least 1"):
            engine.generate(tokens(60), 0)


@pytest.mark.parametrize("system", ["AVX2 = 1", "AMX_INT8 = 1"])
def test_a_load_is_as_llama_cpp_does_it_and_then_the_same_token_again(
    fake_model: WriteModel, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setenv("FAKE_SYSTEM", system)
    path, ids = fake_model(), tokens(300)
    started = time.perf_counter()
    found = time_load(path, ids, steady=3)
    wall = time.perf_counter() - started
    assert found.token == expected_tokens(ids, 1)[0]
    assert len(found.steady) == 3
    assert min(found.load, found.first, *found.steady) > 0
    assert found.load + found.first + sum(found.steady) < wall
    opened, *runs, freed = journal(path)
    # One model and one context, with room for the prompt and a token.
    assert opened["model"]["use_extra_bufts"] is (system != "AMX_INT8 = 1")
    assert opened["context"]["n_ctx"] == 512
    assert opened["context"]["flash_attn_type"] == -1
    assert [(each["rows"], each["held"]) for each in runs] == [(300, 0)] * 4
    assert freed == {"freed": True}


def test_a_load_that_fails_says_what_was_being_done(fake_model: WriteModel, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)killed by SIGSEGV while loading .*model\.gguf"):
        time_load(fake_model(does={"load": "SIGSEGV"}), tokens(9), steady=1)
    with pytest.raises(EngineError, match="No such file"):
        time_load(tmp_path / "none.gguf", tokens(9), steady=1)


# --- what cannot be asked ------------------------------------------------------------------------


def test_a_window_beyond_the_context_is_refused(fake_model: WriteModel) -> None:
    with LlamaCppEngine(fake_model(context=64)) as engine:
        for run in (engine.prefill, lambda ids: engine.logits(ids, 0)):
            with pytest.raises(EngineError, match=r"65 tokens.*context of 64.*window-length=64"):
                run(tokens(65))
        assert torch.cat(list(engine.logits(tokens(64), 0))).shape == (63, 6)


@pytest.mark.parametrize("ids", [[], [1], [1, 6], [1, -1], [1, 2**31]])
def test_tokens_outside_the_vocabulary_are_refused(fake_model: WriteModel, ids: list[int]) -> None:
    with (
        LlamaCppEngine(fake_model()) as engine,
        pytest.raises(EngineError, match="at least 2 tokens from 0 to 5"),
    ):
        engine.logits(ids, 0)


@pytest.mark.parametrize("first", [-1, 3, 4])
def test_positions_that_predict_nothing_are_refused(fake_model: WriteModel, first: int) -> None:
    with LlamaCppEngine(fake_model()) as engine, pytest.raises(ValueError, match="first must be"):
        engine.logits([1, 2, 3, 4], first)


# --- quantizing ----------------------------------------------------------------------------------


def test_the_quantizer_gets_types_and_importance(fake_model: WriteModel, tmp_path: Path) -> None:
    source, target = fake_model(), tmp_path / "größe.gguf"
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


def test_without_importance_there_is_none(fake_model: WriteModel, tmp_path: Path) -> None:
    source = fake_model()
    quantize_file(source, tmp_path / "out.gguf", "MOSTLY_Q4_K_M", weights=10, pure=True)
    (entry,) = journal(source)
    assert (entry["importance"], entry["pure"]) == ({}, True)


def test_a_quantizer_that_fails(fake_model: WriteModel, tmp_path: Path) -> None:
    source = fake_model(does={"quantize": "fail"})
    with pytest.raises(
        EngineError, match=r"(?s)quantizing to Q4_K_M: .*returned 1.*unknown tensor"
    ):
        quantize_file(source, tmp_path / "out.gguf", "MOSTLY_Q4_K_M", weights=10)


def test_a_type_that_this_llama_cpp_does_not_know(fake_model: WriteModel, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="LLAMA_FTYPE_MOSTLY_Q9"):
        quantize_file(fake_model(), tmp_path / "out.gguf", "MOSTLY_Q9", weights=10)
