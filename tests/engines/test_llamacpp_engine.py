"""llama.cpp itself, where llama-cpp-python is installed: its logits, its bits, and ours in it."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from pytest_qlab.engines.llamacpp.engine import LlamaCppEngine, time_load
from pytest_qlab.engines.llamacpp.method import LlamaCpp
from pytest_qlab.errors import EngineError, MethodError
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.methods.gguf import Gguf
from pytest_qlab.methods.mixes import MIXES
from pytest_qlab.methods.pipeline import QuantizedModel, quantize_model
from pytest_qlab.metrics.divergence import compare_logits
from pytest_qlab.models.load import LoadedModel, load_model
from tests.engines.gguf_models import tiny

if TYPE_CHECKING:
    from pytest_qlab.calibration.statistics import LayerStatistics

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
    ),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed"),
]
EMBEDDED = Path(__file__).parents[2] / "pytest_qlab" / "embedded"
QUICK = ("Q4_K_M", "Q4_0")
TOKENS = 256


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(EMBEDDED / "model"))


@pytest.fixture(scope="module")
def ids(loaded: LoadedModel) -> list[int]:
    text = (EMBEDDED / "text" / "evaluation" / "prose" / "04-lowland-rivers.txt").read_text("utf-8")
    found: list[int] = loaded.tokenizer(text)["input_ids"]
    return found[:TOKENS]


@pytest.fixture(scope="module")
def base_logits(loaded: LoadedModel, ids: list[int]) -> Tensor:
    return forward(loaded.model, ids)


def forward(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits


def imported(method: LlamaCpp, loaded: LoadedModel, directory: Path) -> QuantizedModel:
    return method.import_model(loaded, directory, lambda line: None)


def all_logits(engine: LlamaCppEngine, ids: list[int], first: int = 0) -> Tensor:
    return torch.cat(list(engine.logits(ids, first)))


def divergence(base: Tensor, other: Tensor, ids: list[int]) -> float:
    """Mean KL(base || other), nats."""
    return float(compare_logits(base, other, torch.tensor(ids[1:])).kl.mean())


def parts(quantized: QuantizedModel) -> dict[str, PackedWeight]:
    return {
        name: each.weight
        for name, each in [*quantized.layers.items(), *quantized.embeddings.items()]
    }


def assert_same_bits(found: QuantizedModel, expected: QuantizedModel) -> None:
    assert parts(found).keys() == parts(expected).keys()
    for name, weight in parts(expected).items():
        other = parts(found)[name]
        assert other.metadata() == weight.metadata(), name
        tensors = other.tensors()
        for field, tensor in weight.tensors().items():
            assert torch.equal(tensors[field], tensor), f"{name} {field}"


@pytest.fixture(scope="module")
def float_file(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("f32")
    imported(LlamaCpp(type="F32"), loaded, directory)
    return directory / "model.gguf"


def test_logits_of_a_float_file_are_the_models(
    float_file: Path, ids: list[int], base_logits: Tensor
) -> None:
    with LlamaCppEngine(float_file) as engine:
        found = all_logits(engine, ids)
    assert found.shape == base_logits.shape
    assert float((found - base_logits).abs().max()) < 1e-3
    assert divergence(base_logits, found, ids) < 1e-9


@pytest.mark.parametrize(("type", "most"), [("F16", 1e-5), ("BF16", 1e-4)])
def test_logits_of_half_precision_files_are_nearly_the_models(
    loaded: LoadedModel, ids: list[int], base_logits: Tensor, tmp_path: Path, type: Any, most: float
) -> None:
    # The weights are exact, as the checkpoint's are bfloat16; llama.cpp rounds inputs to match.
    method = LlamaCpp(type=type)
    imported(method, loaded, tmp_path)
    with LlamaCppEngine(tmp_path / "model.gguf") as engine:
        assert divergence(base_logits, all_logits(engine, ids), ids) < most


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("llama", 1e-3),
        ("llama3-scaling", 1e-3),
        ("qwen2", 1e-3),
        ("qwen3", 1e-3),
        ("gpt2", 1e-2),  # llama.cpp's GELU is a table of float16
    ],
)
def test_every_architecture_runs_as_in_transformers(name: str, most: float, tmp_path: Path) -> None:
    loaded = tiny(name)
    imported(LlamaCpp(type="F32"), loaded, tmp_path)
    ids = [(11 * n + 3) % 256 for n in range(60)]
    with LlamaCppEngine(tmp_path / "model.gguf") as engine:
        found = all_logits(engine, ids)
    torch.testing.assert_close(found, forward(loaded.model, ids), rtol=0, atol=most)


def test_results_are_the_same_bits_whatever_else_happens(
    loaded: LoadedModel, ids: list[int], tmp_path: Path
) -> None:
    imported(LlamaCpp(type="Q4_K_M"), loaded, tmp_path)
    with LlamaCppEngine(tmp_path / "model.gguf") as engine:
        once = all_logits(engine, ids)
        engine.prefill(ids[::-1])
        all_logits(engine, ids[::-1])
        again = all_logits(engine, ids)
        tail = all_logits(engine, ids, first=200)
        # A longer window gives the same predictions for the tokens that they share.
        longer = all_logits(engine, ids + ids[:200])
    with LlamaCppEngine(tmp_path / "model.gguf", threads=2) as engine:
        threaded = all_logits(engine, ids)
    assert torch.equal(once, again)
    assert torch.equal(once, threaded)
    assert torch.equal(once[200:], tail)
    assert torch.equal(once, longer[: len(once)])


def test_facts_of_a_real_file(loaded: LoadedModel, float_file: Path, ids: list[int]) -> None:
    config: Any = loaded.model.config
    with LlamaCppEngine(float_file) as engine:
        engine.prefill(ids)
        assert engine.name.startswith("llama.cpp 0.")
        assert engine.vocabulary == config.vocab_size
        assert engine.context == config.max_position_embeddings
        assert engine.weight_bytes == sum(4 * each.numel() for each in loaded.model.parameters())
        assert engine.kv_bytes_per_token == 2 * 2 * 6 * 2 * 64  # keys and values in float16
        assert engine.idle_memory + engine.weight_bytes < engine.peak_memory < 2**30
        assert engine.cpu_ns > 0


def greedy(model: Any, ids: list[int], count: int) -> tuple[int, ...]:
    """By transformers; no token ends it."""
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
    return tuple(found[0, len(ids) :].tolist())


def test_generations_are_the_models(loaded: LoadedModel, float_file: Path, ids: list[int]) -> None:
    # Ten tokens, because llama.cpp's float16 cache might turn a near tie sooner or later.
    with LlamaCppEngine(float_file) as engine:
        for start in (0, 100):
            prompt = ids[start : start + 64]
            found = engine.generate(prompt, 10)
            assert found.tokens == greedy(loaded.model, prompt, 10)
            assert found.first_ns > 0
            assert found.rest_ns > 0
            assert engine.generate(prompt, 3).tokens == found.tokens[:3]


def test_a_load_in_a_fresh_process_ends_in_the_models_token(
    loaded: LoadedModel, float_file: Path, ids: list[int]
) -> None:
    started = time.perf_counter()
    found = time_load(float_file, ids[:64], steady=2)
    assert found.token == greedy(loaded.model, ids[:64], 1)[0]
    assert len(found.steady) == 2
    assert min(found.load, found.first, *found.steady) > 0
    assert found.load + found.first + sum(found.steady) < time.perf_counter() - started


def test_a_window_beyond_the_models_context(float_file: Path, ids: list[int]) -> None:
    with LlamaCppEngine(float_file) as engine, pytest.raises(EngineError, match="context of 1024"):
        engine.logits(ids * 5, 0)


def test_a_file_that_is_cut_short(float_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "größe.gguf"
    cut.write_bytes(float_file.read_bytes()[:100_000])
    with pytest.raises(EngineError, match=r"(?s)opening .*größe\.gguf: llama.cpp could not open"):
        LlamaCppEngine(cut)


# --- the same bits as our own ------------------------------------------------------------------


@pytest.mark.parametrize(
    "type", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in MIXES]
)
def test_llama_cpp_makes_the_bits_that_gguf_makes(
    loaded: LoadedModel, tmp_path: Path, type: Any
) -> None:
    found = imported(LlamaCpp(type=type), loaded, tmp_path)
    assert_same_bits(quantize_model(loaded.model, Gguf(type=type), [], None), found)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert found.kernel == "llama.cpp"


@pytest.mark.parametrize(
    "type",
    ["Q4_0", *(pytest.param(t, marks=pytest.mark.slow) for t in ("Q4_K_M", "IQ4_NL", "Q2_K"))],
)
def test_the_importance_matrix_is_llama_cpps(
    loaded: LoadedModel, tmp_path: Path, type: Any, statistics: Any
) -> None:
    method = LlamaCpp(type=type, imatrix=True)
    found = method.import_model(loaded, tmp_path, lambda line: None, statistics)
    ours = quantize_model(loaded.model, Gguf(type=type, imatrix=True), [[1, 2]], statistics)
    assert_same_bits(ours, found)
    plain = imported(LlamaCpp(type=type), loaded, tmp_path)
    assert any(
        not torch.equal(weight.dequantize(), parts(plain)[name].dequantize())
        for name, weight in parts(found).items()
    )


@pytest.fixture(scope="module")
def statistics(loaded: LoadedModel) -> Any:
    """Made-up squares of inputs, for every linear layer."""
    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.models.structure import decoder_blocks, quantizable_linears

    blocks = decoder_blocks(loaded.model)
    generator = torch.Generator().manual_seed(0)

    def of(index: int) -> dict[str, LayerStatistics]:
        name, block = blocks[index]
        found = {}
        for number, site in enumerate(quantizable_linears(block, name)):
            generator.manual_seed(100 * index + number)
            squares = torch.rand(site.in_features, generator=generator) ** 2 + 0.01
            found[site.name] = LayerStatistics(50, 50 * squares)
        return found

    return of


def test_an_importance_matrix_needs_text(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="needs calibration text"):
        imported(LlamaCpp(type="Q4_K_M", imatrix=True), loaded, tmp_path)


@pytest.mark.parametrize("type", [*QUICK, pytest.param("IQ4_XS", marks=pytest.mark.slow)])
def test_our_files_run_in_llama_cpp_as_in_torch(
    loaded: LoadedModel, ids: list[int], base_logits: Tensor, tmp_path: Path, type: Any
) -> None:
    from pytest_qlab.checkpoint import instantiate, open_checkpoint, save_checkpoint
    from pytest_qlab.engines.gguf.writer import write_gguf

    quantized = quantize_model(loaded.model, Gguf(type=type), [], None)
    save_checkpoint(tmp_path, quantized, loaded)
    model = instantiate(open_checkpoint(tmp_path), loaded.model)
    packed = parts(quantized)
    others = {
        name: parameter
        for name, parameter in loaded.model.named_parameters()
        if name.removesuffix(".weight") not in packed
    }
    path = tmp_path / "ours.gguf"
    write_gguf(path, loaded, weights=packed, others=others, file_type=type)
    with LlamaCppEngine(path) as engine:
        found = all_logits(engine, ids)
    own = forward(model, ids)
    # llama.cpp also rounds the inputs of products to 8 bits; that is little beside the damage.
    floor, damage = divergence(own, found, ids), divergence(base_logits, own, ids)
    assert floor < 1e-3
    assert floor < damage / 5


# --- the method ----------------------------------------------------------------------------------


def test_the_method_is_named_by_its_type() -> None:
    method = LlamaCpp.model_validate({"type": "q3_k_s"})
    assert method.id == "llamacpp-Q3_K_S"
    assert not method.wanted_statistics
    assert LlamaCpp(imatrix=True).wanted_statistics == {"channels"}
    assert LlamaCpp(imatrix=True).stream == "original"
    assert not LlamaCpp.in_all


def test_the_identity_holds_the_version_of_llama_cpp(float_file: Path) -> None:
    with LlamaCppEngine(float_file) as engine:  # as the library itself says
        assert engine.name == f"llama.cpp {LlamaCpp().identity()['llama_cpp_python']}"
