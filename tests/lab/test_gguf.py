"""GGUF in the lab: candidates written, opened again, and run by a runtime of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from pytest_qlab import Lab
from pytest_qlab.cli import main
from pytest_qlab.engines.gguf.method import GgufFile
from pytest_qlab.errors import DataError, EngineError, MethodError, MetricError, ModelError
from pytest_qlab.measuring import speed
from pytest_qlab.methods.gguf import Gguf
from pytest_qlab.methods.pipeline import QuantizedModel
from pytest_qlab.metrics import latency
from tests.engines.gguf_models import tiny
from tests.lab.tiny import documents, tiny_lab


def lab_of(store: Path, model: str = "llama", **options: Any) -> Lab:
    """A tiny lab on a model that GGUF files know."""
    return Lab(
        tiny(model),
        evaluation=documents(3, seed=1),
        calibration=documents(3, seed=2),
        window_length=48,
        calibration_length=32,
        threads=1,
        store=store,
        **options,
    )


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "spec",
    ["gguf:Q5_1", "gguf:Q8_0", "ggml:IQ4_NL", "gptq:group_size=32:symmetric", "mxfp4", "none"],
)
def test_what_is_written_and_opened_again_is_the_same_candidate(
    spec: str, model: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    lab = lab_of(tmp_path, model)
    candidate = lab.candidate(spec)
    file = tmp_path / "model.gguf"
    assert candidate.save_gguf(file) == ()
    opened = lab.candidate(GgufFile(path=str(file)))
    assert opened.kl.mean == candidate.kl.mean
    assert opened.perplexity == candidate.perplexity
    assert opened.layer_error == candidate.layer_error
    if spec.startswith("gguf"):
        assert opened.size == candidate.size
        assert opened.bits_per_weight == candidate.bits_per_weight
    assert opened.id == "gguf_file-model"


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    lab = lab_of(tmp_path)
    first, moved = tmp_path / "a.gguf", tmp_path / "elsewhere.gguf"
    lab.candidate("gguf:Q8_0").save_gguf(first)
    float(lab.candidate(GgufFile(path=str(first))).kl.mean)
    shutil.copy(first, moved)
    built = dict(lab.store.built)
    float(lab.candidate(GgufFile(path=str(moved))).kl.mean)
    assert lab.store.built == built
    lab.candidate("gguf:Q4_0").save_gguf(first)
    changed = lab_of(tmp_path).candidate(GgufFile(path=str(first)))
    assert changed.kl.mean == lab.candidate("gguf:Q4_0").kl.mean


def test_a_file_of_another_model_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    lab_of(tmp_path).candidate("gguf:Q8_0").save_gguf(file)
    with pytest.raises(ModelError, match="of the architecture 'llama', but the base model is"):
        float(lab_of(tmp_path, "qwen2").candidate(GgufFile(path=str(file))).kl.mean)
    with pytest.raises(DataError, match="No such file"):
        float(lab_of(tmp_path).candidate(GgufFile(path=str(tmp_path / "none.gguf"))).kl.mean)


def test_what_a_file_cannot_hold_is_not_written_and_not_even_quantized(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    lab = lab_of(tmp_path)
    for spec, message in (
        ("dynamic", "quantizes the inputs"),
        ("static", "quantizes the inputs"),
        ("mxfp4:activations", "quantizes the inputs"),
        ("gptq", "has zero points"),
        ("awq", "has zero points"),
        ("gptq:symmetric:static_groups=false:group_size=32", "not neighbours"),
        ("rtn:bits=3:symmetric", "codes of 3 bits"),
        ("rtn:symmetric:group_size=48", "no multiples of 32"),
        ("squeezellm", "is stored as"),
        ("nvfp4", "a scale of the whole tensor"),
        ("quarot+rtn:symmetric:group_size=32", "rotates hidden states"),
    ):
        with pytest.raises(MethodError, match=message):
            lab.candidate(spec).save_gguf(tmp_path / "model.gguf")
    assert not any(lab.store.built.values())
    assert lab.forwards == 0
    with pytest.raises(ModelError, match="Supported are LlamaForCausalLM"):
        tiny_lab(tmp_path, "phi").candidate("gguf:Q8_0").save_gguf(tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_the_console_script_writes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    loaded = tiny("llama")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "out.gguf"
    arguments = ["--model", str(tmp_path / "model"), "--store", str(tmp_path / "store")]
    assert main(["quantize", "gguf:Q8_0", "-o", str(file), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{file}: gguf-Q8_0, {file.stat().st_size:,} bytes" in printed
    lab = Lab(str(tmp_path / "model"), evaluation=documents(3, seed=1), store=tmp_path / "store")
    assert 0 < lab.candidate(GgufFile(path=str(file))).kl.mean < 0.01
    assert main(["quantize", "gptq", "-o", str(file), *arguments]) == 2
    assert "qlab: error:" in capsys.readouterr().err


class Recording:
    """An engine in this process: a model of the lab's, and what it was asked for."""

    name = "recorded"
    vocabulary = context = 512
    kv_bytes_per_token, weight_bytes, peak_memory, idle_memory = 10, 2000, 9000, 4000
    cpu_ns = switches = 0
    opened: ClassVar[list[int]] = []

    def __init__(self, model: Any, threads: int, lose: int) -> None:
        self.model, self.lose = model, lose
        self.opened.append(threads)

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Tensor]:
        with torch.no_grad():
            found = self.model(input_ids=torch.tensor([list(ids)])).logits[0, first:-1].float()
        yield from found[self.lose :].split(5)

    def prefill(self, ids: Sequence[int]) -> None:
        with torch.no_grad():
            self.model(input_ids=torch.tensor([list(ids)]))

    def fill(self, ids: Sequence[int]) -> None:
        self.filled = list(ids)

    def decode(self, token: int) -> None:
        self.prefill([*self.filled, token])

    def close(self) -> None:
        self.opened.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Elsewhere(Gguf):
    """Quantized as `gguf`, and run by an engine."""

    name: ClassVar[str] = "elsewhere"
    models: ClassVar[list[Any]] = []

    lose: int = 0

    def import_model(
        self, loaded: Any, directory: Path, progress: Any, statistics: Any = None
    ) -> QuantizedModel:
        from pytest_qlab.methods.pipeline import quantize_model

        (directory / "mine.bin").write_bytes(b"kept")
        found = quantize_model(loaded.model, Gguf(type=self.type), (), statistics)
        found.kernel = "recorded"
        return found

    def engine(self, directory: Path, *, threads: int = 1) -> Recording:
        assert (directory / "mine.bin").read_bytes() == b"kept"
        return Recording(self.models[0], threads, self.lose)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Lab:
    lab = lab_of(tmp_path)
    Elsewhere.models[:] = [lab.candidate("gguf:Q4_0").model]
    Recording.opened.clear()
    return lab


def test_quality_is_that_of_the_engines_logits(elsewhere: Lab) -> None:
    elsewhere.threads = 3
    ours, candidate = elsewhere.candidate("gguf:Q4_0"), elsewhere.candidate(Elsewhere(type="Q4_0"))
    assert candidate.kl.mean == pytest.approx(float(ours.kl.mean), rel=1e-4)
    assert candidate.perplexity == pytest.approx(float(ours.perplexity), rel=1e-6)
    assert candidate.top1_agreement == ours.top1_agreement
    assert candidate.layer_error == ours.layer_error
    assert not candidate.checkpoint.simulated
    assert candidate.checkpoint.kernel == "recorded"
    with pytest.raises(MetricError, match="hidden states"):
        float(candidate.snr_db)
    assert Recording.opened == [], "an engine was left open"


def test_latency_and_memory_are_the_engines(
    elsewhere: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 3)
    monkeypatch.setattr(latency, "QUIET_CPU_SHARE", 0.0)
    candidate = elsewhere.candidate(Elsewhere(type="Q4_0"))
    assert candidate.latency.p50 > 0
    assert not candidate.latency.p50.simulated
    assert candidate.latency.decode.p50 > 0
    assert candidate.latency.decode.ratio.convention.startswith("decode after ")
    assert candidate.memory.resident == 2000
    assert candidate.memory.peak == 5000
    assert candidate.memory.kv_per_token == 10
    assert candidate.memory.rss_peak == 9000
    with pytest.raises(MetricError, match=r"decode_peak .* engine that runs it"):
        candidate.memory.decode_peak  # noqa: B018
    assert not candidate.memory.peak.simulated
    assert Recording.opened == []


def test_an_engine_that_loses_tokens_is_an_error(elsewhere: Lab) -> None:
    with pytest.raises(EngineError, match="gave predictions for"):
        float(elsewhere.candidate(Elsewhere(type="Q4_0", lose=2)).kl.mean)
    assert Recording.opened == []


def test_statistics_reach_a_method_that_brings_its_own_bits(tmp_path: Path) -> None:
    seen = []

    class Asking(Elsewhere):
        name: ClassVar[str] = "asking"

        def import_model(
            self, loaded: Any, directory: Path, progress: Any, statistics: Any = None
        ) -> QuantizedModel:
            seen.append(statistics and set(statistics(0)))
            return super().import_model(loaded, directory, progress, statistics)

    lab = lab_of(tmp_path)
    _ = lab.candidate(Asking(type="Q4_0", imatrix=True)).size
    _ = lab.candidate(Asking(type="Q4_0")).size
    names = {"self_attn.q_proj", "mlp.down_proj"}
    assert names <= {name.removeprefix("model.layers.0.") for name in seen[0]}
    assert seen[1] is None
