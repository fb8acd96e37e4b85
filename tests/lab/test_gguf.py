"""GGUF in the lab: candidates written, opened again, and run by a runtime of their own."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from pytest_qlab import Lab
from pytest_qlab.cli import main
from pytest_qlab.engines.base import EngineLoad, Generated
from pytest_qlab.engines.gguf.method import GgufFile
from pytest_qlab.errors import DataError, EngineError, MethodError, MetricError, ModelError
from pytest_qlab.measuring import endtoend, loading, loadtimes, speed
from pytest_qlab.measuring.speed import text_tokens
from pytest_qlab.methods.gguf import Gguf
from pytest_qlab.methods.pipeline import QuantizedModel
from pytest_qlab.metrics import latency, throughput
from tests.engines.gguf_models import tiny
from tests.engines.llama_oracle import needs_llama
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
    generated: ClassVar[list[tuple[int, int]]] = []

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

    def generate(self, ids: Sequence[int], tokens: int) -> Generated:
        self.generated.append((len(ids), tokens))
        return Generated((1,) * (tokens - self.lose), 2_000_000, 4_000_000)

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
    loads: ClassVar[list[float]] = []

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

    def time_load(
        self, directory: Path, ids: Sequence[int], *, steady: int, threads: int = 1
    ) -> EngineLoad | None:
        if not self.loads:
            return None
        assert (directory / "mine.bin").read_bytes() == b"kept"
        load = self.loads.pop(0)
        return EngineLoad(load, load / 8, (0.001,) * steady, len(ids))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Lab:
    lab = lab_of(tmp_path)
    Elsewhere.models[:] = [lab.candidate("gguf:Q4_0").model]
    Recording.opened.clear()
    Recording.generated.clear()
    Elsewhere.loads.clear()
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


def test_throughput_is_that_of_the_engines_own_times(
    elsewhere: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endtoend, "ROUNDS", 6)
    monkeypatch.setattr(throughput, "QUIET_CPU_SHARE", 0.0)
    candidate = elsewhere.candidate(Elsewhere(type="Q4_0"))
    found = candidate.throughput
    prompt, tokens = endtoend._lengths(elsewhere, 128, 32)
    assert Recording.generated == [(prompt, tokens)] * 7  # a warm-up, and six rounds
    assert found.prefill == pytest.approx(prompt / 0.002)
    assert found.decode == pytest.approx((tokens - 1) / 0.004)
    for phase, place, ours in (("prefill", 0, 2e6), ("decode", 1, 4e6)):
        theirs = [each.baseline[place] for each in found.paired.rounds]
        ratio = found.estimates[f"throughput.{phase}_ratio"]
        assert ratio == pytest.approx(statistics.median(theirs) / ours)
        assert ratio.lower is not None
    assert not found.decode.simulated
    assert Recording.opened == []
    with pytest.raises(MetricError, match=r"brought .* recorded ends generations by itself"):
        elsewhere.candidate(Elsewhere(type="Q4_0", lose=1)).throughput  # noqa: B018


def test_load_times_are_those_of_the_engines_processes(
    elsewhere: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []

    def make_cold(files: list[Path]) -> str:
        dropped.extend(each.name for each in files)
        return ""

    monkeypatch.setattr(loadtimes, "make_cold", make_cold)
    # Cold and warm in turn: 2, 4 .. 12 and 1, 3 .. 11 seconds.
    Elsewhere.loads[:] = [2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11]
    candidate = elsewhere.candidate(Elsewhere(type="Q4_0"))
    found = candidate.load
    assert (found.cold, found.cold.lower, found.cold.upper) == (6.0, 2.0, 12.0)
    assert (found.warm, found.warm.lower, found.warm.upper) == (5.0, 1.0, 11.0)
    assert found.first_generation == 6 / 8
    assert "steady state 1 ms" in found.first_generation.detail
    assert not found.warm.simulated
    assert "mine.bin" in dropped
    assert not {"model.safetensors", "qlab.json"} & set(dropped)
    assert Recording.opened == [], "an engine was open while another process loaded"


@needs_llama
@pytest.mark.slow
def test_llama_cpp_is_measured_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endtoend, "ROUNDS", 6)
    monkeypatch.setattr(throughput, "QUIET_CPU_SHARE", 0.0)
    monkeypatch.setattr(loadtimes, "REPEATS", 1)
    monkeypatch.setattr(loadtimes, "MEDIAN_SAMPLES", 1)
    lab = lab_of(tmp_path)
    candidate = lab.candidate("llamacpp:F32")
    rates = candidate.throughput
    assert min(rates.prefill, rates.decode, rates.prefill_ratio, rates.decode_ratio) > 0
    assert len(rates.paired.rounds) == 6
    assert min(candidate.load.warm, candidate.first_generation) > 0
    (entry,) = lab.store.entries("loading")
    (warm,) = lab.store.peek("loading", entry)["warm"]
    ids = torch.tensor([text_tokens(lab, lab.model.fitting(128))])
    assert warm["token"] == loading.generate_one(lab.base_model, ids)
    assert len(warm["steady"]) == loading.STEADY


def test_a_runtime_that_does_not_time_its_loads_says_so(elsewhere: Lab) -> None:
    with pytest.raises(MetricError, match=r"Elsewhere has no `time_load`"):
        elsewhere.candidate(Elsewhere(type="Q4_0")).load  # noqa: B018


def test_many_requests_at_a_time_are_its_servers(elsewhere: Lab) -> None:
    with pytest.raises(MetricError, match="qlab serve-bench"):
        elsewhere.candidate(Elsewhere(type="Q4_0")).serving(2)


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
