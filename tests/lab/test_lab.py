"""The lab: every method on every layout, the identity as it is, artefacts built once."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pytest_qlab import Estimate, Lab, Method, QlabError, QuantizedLayer
from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.checkpoint import MODEL_FILE, instantiate
from pytest_qlab.errors import MethodError, MetricError, SpecError
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.measuring.layers import original_terms
from pytest_qlab.methods.awq import Awq
from pytest_qlab.methods.gptq import Gptq
from pytest_qlab.models.structure import all_linears, decoder_blocks
from pytest_qlab.solvers.gptq import gptq_solve
from pytest_qlab.solvers.grid import GridRule
from tests.architectures import ARCHITECTURES, CONTEXT, token_ids
from tests.lab.tiny import tiny_lab

METHODS = (
    "rtn:bits=8:group_size=32",
    "dynamic:bits=8",
    "static:bits=8",
    "gptq:bits=8:group_size=32",
    "awq:bits=8:group_size=32",
)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_method_on_every_layout(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture)
    none = lab.baseline
    assert none.kl.max == 0
    assert none.perplexity_delta == 0
    assert none.top1_agreement == 1
    assert none.compression_ratio == pytest.approx(1, rel=0.02)
    for spec in METHODS:
        candidate = lab.candidate(spec)
        assert 0 < candidate.kl.mean < 0.02, spec
        assert candidate.snr_db > 15, spec
        assert 1.5 < candidate.compression_ratio < 4.1, spec
        assert 0 < candidate.layer_error < 1e-3, spec
        assert [layer.name for layer in candidate.layers] == [
            site.name for site in all_linears(lab.base_model)
        ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fewer_bits_do_more_damage(architecture: str, bits: int, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture)
    for method in ("rtn", "gptq", "awq", "dynamic"):
        worse = lab.candidate(f"{method}:bits={bits}")
        better = lab.candidate(f"{method}:bits=8")
        assert worse.weights.snr_db < better.weights.snr_db
        assert worse.bits_per_weight < better.bits_per_weight
        assert worse.layer_error > better.layer_error


class Unrounded(Awq):
    """AWQ's transform, with the rounding switched off."""

    name: ClassVar[str] = "unrounded"

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        return QuantizedLayer(PlainWeight(weight))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_awq_without_rounding_is_the_same_function(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture)
    checkpoint = lab.checkpoint(Unrounded(bits=3, group_size=8))
    assert checkpoint.scales(), "no fold was found, so nothing was tested"
    ids = token_ids(24)
    with torch.no_grad():
        expected = lab.base_model(input_ids=ids).logits
        found = instantiate(checkpoint, lab.base_model)(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_folded_layers_are_reported_in_the_original_terms(
    architecture: str, tmp_path: Path
) -> None:
    lab = tiny_lab(tmp_path, architecture)
    checkpoint = lab.checkpoint(Unrounded(bits=3, group_size=8))
    layers, scales = checkpoint.layers(), checkpoint.scales()
    moved = 0
    for site in all_linears(lab.base_model):
        stored = layers[site.name].weight.dequantize()
        moved += not torch.allclose(stored, site.weight())
        torch.testing.assert_close(
            original_terms(stored, scales.get(site.name, {})), site.weight(), rtol=1e-5, atol=1e-6
        )
    assert moved


def file_and_header(path: Path) -> tuple[int, int]:
    with path.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    return path.stat().st_size, header + 8


@pytest.mark.parametrize("spec", ["none", *METHODS, "gptq:bits=3:static_groups=false:group_size=8"])
def test_the_file_is_as_large_as_is_said(spec: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate(spec)
    size, header = file_and_header(candidate.checkpoint.directory / MODEL_FILE)
    assert candidate.size == size - header
    base = sum(parameter.nbytes for parameter in lab.base_model.parameters())
    assert candidate.compression_ratio == pytest.approx(base / (size - header))


def test_what_is_measured_is_what_the_bits_say(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("rtn:bits=3:group_size=8")
    layers = candidate.checkpoint.layers()
    for name, module in candidate.model.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.weight, layers[name].weight.dequantize())
            assert module.simulated
    ids = token_ids(20)
    reference = instantiate(candidate.checkpoint, lab.base_model)
    with torch.no_grad():
        for name, layer in layers.items():
            rows, columns = layer.weight.shape
            plain = torch.nn.Linear(columns, rows, bias=False)
            plain.weight.copy_(layer.weight.dequantize())
            parent, _, attribute = name.rpartition(".")
            setattr(reference.get_submodule(parent), attribute, plain)
        assert torch.equal(reference(input_ids=ids).logits, candidate.model(input_ids=ids).logits)


def test_gptq_sees_what_quantized_blocks_before_it_make(tmp_path: Path) -> None:
    """Oracle: put the quantized first block into a model and run whole forwards through it."""
    lab = tiny_lab(tmp_path)
    method = Gptq(bits=2, group_size=8)
    layers = lab.checkpoint(method).layers()
    model = instantiate(lab.checkpoint(method), lab.base_model)
    original = {site.name: site.weight() for site in all_linears(lab.base_model)}
    _, (second, _) = decoder_blocks(lab.base_model)
    name = f"{second}.self_attn.q_proj"
    inputs: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(
        lambda _module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for ids in lab.calibration.sequences:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    x = torch.cat(inputs)
    solved = gptq_solve(
        original[name],
        x.T @ x,
        GridRule(2),
        group_size=8,
        desc_act=True,
        static_groups=True,
    )
    found, expected = layers[name].weight.dequantize(), solved.quantized.pack().dequantize()
    assert (found != expected).float().mean() < 0.01
    statistics = lab.statistics(gram=True)(1)[name]
    assert statistics.gram is not None
    assert not torch.allclose(statistics.gram, x.T @ x, rtol=1e-3), "nothing was propagated"


def test_true_sequential_is_another_result(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    plain = lab.candidate("gptq:bits=2:group_size=8")
    sequential = lab.candidate("gptq:bits=2:group_size=8:true_sequential")
    assert plain.kl.mean != sequential.kl.mean
    first = [layers.layers() for layers in (plain.checkpoint, sequential.checkpoint)]
    name = next(iter(first[0]))
    assert torch.equal(first[0][name].weight.dequantize(), first[1][name].weight.dequantize())


def measures(lab: Lab, spec: str) -> dict[str, Any]:
    candidate = lab.candidate(spec)
    assert candidate.kl.mean >= 0
    assert candidate.layer_error >= 0
    return {name: each.model_dump() for name, each in candidate.fragment().measures.items()}


@pytest.mark.parametrize("spec", ["rtn:bits=3", "gptq:bits=3", "awq:bits=3", "static:bits=4"])
def test_results_do_not_depend_on_threads(spec: str, tmp_path: Path) -> None:
    one = measures(tiny_lab(tmp_path / "1", threads=1), spec)
    three = measures(tiny_lab(tmp_path / "3", threads=3), spec)
    assert one == three


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    specs = ["none", "rtn", "static", "gptq", "awq"]
    first = tiny_lab(tmp_path)
    expected = [measures(first, spec) for spec in specs]
    assert first.store.built
    assert first.forwards > 0
    second = tiny_lab(tmp_path)
    assert [measures(second, spec) for spec in specs] == expected
    assert second.store.built == {}
    assert second.forwards == 0


def test_a_second_run_loads_no_model(tmp_path: Path) -> None:
    from tests.lab.tiny import documents, saved_tiny_model

    directory = saved_tiny_model(tmp_path / "model")

    def lab() -> Lab:
        return Lab(
            str(directory),
            evaluation=documents(4, 1),
            calibration=documents(4, 2),
            window_length=48,
            calibration_length=32,
            store=tmp_path / "store",
        )

    measures(lab(), "gptq:bits=4")
    second = lab()
    measures(second, "gptq:bits=4")
    assert second.describe()["model"]["parameters"] > 0
    assert "loaded" not in vars(second.model)
    assert "tokenizer" not in vars(second.model)


def test_options_and_inputs_are_part_of_the_key(tmp_path: Path) -> None:
    base = measures(tiny_lab(tmp_path), "gptq:bits=3")
    from tests.lab.tiny import documents

    other = tiny_lab(tmp_path, calibration=documents(8, seed=5))
    assert measures(other, "gptq:bits=3") != base
    assert any(key.startswith("quantized/") for key in other.store.built)
    windows = tiny_lab(tmp_path, evaluation=documents(6, seed=9))
    assert measures(windows, "gptq:bits=3") != base
    assert not any(key.startswith("quantized/") for key in windows.store.built)


def test_statistics_are_shared(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    for spec in ("awq", "awq:bits=3", "static", "rtn"):
        measures(lab, spec)
    assert sum(key.startswith("statistics/") for key in lab.store.built) == 1


def test_measures_have_intervals_and_say_what_they_are(tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path).candidate("rtn:bits=3")
    delta = candidate.perplexity_delta
    assert isinstance(delta, Estimate)
    assert delta.lower is not None
    assert delta.upper is not None
    assert delta.lower < delta < delta.upper
    assert delta.convention == "spread48"
    assert delta.clusters == 6
    assert candidate["kl.mean"] == candidate.kl.mean
    with pytest.raises(QlabError, match="Did you mean"):
        candidate["kl.maen"]


def test_simulated_latency_can_be_refused(tmp_path: Path) -> None:
    for policy in ("skip", "fail"):
        lab = tiny_lab(tmp_path, simulated_latency=policy)
        with pytest.raises(QlabError, match="would need W4 matmul"):
            lab.candidate("rtn").latency  # noqa: B018


def test_candidates_are_named_once(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    assert lab.candidate("rtn:bits=4") is lab.candidate("rtn")
    with pytest.raises(SpecError, match="names 2 methods"):
        lab.candidate("rtn,gptq")


def test_nan_weights_are_refused_with_the_layers_name(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    site = all_linears(lab.base_model)[3]
    site.module.get_parameter("weight").data[0, 0] = float("nan")
    with pytest.raises(MethodError, match=site.name):
        lab.checkpoint(Gptq())


class Shouting(Method):
    """A method that fails in the middle."""

    name: ClassVar[str] = "shouting"

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        if "down" in name:
            raise MethodError(f"no, not {name}")
        return QuantizedLayer(PlainWeight(weight))


def test_a_failed_method_leaves_nothing_behind(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    with pytest.raises(MethodError, match="no, not model"):
        lab.checkpoint(Shouting())
    assert not list(tmp_path.rglob(MODEL_FILE))


def test_a_measure_by_name_computes_no_other(tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path).candidate("rtn:bits=3")
    assert candidate["size"] == candidate.size
    assert candidate["layer_error"] == candidate.layer_error
    assert candidate["weights.cosine"] == candidate.weights.cosine
    assert "fidelity" not in vars(candidate)
    assert candidate["kl.mean"] == candidate.kl.mean
    with pytest.raises(MetricError, match=r"Did you mean 'kl\.mean'"):
        candidate["kl.maen"]


def test_fragment_is_plain_json(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate("awq:bits=3")
    assert candidate.fragment().measures == {}
    assert "documents" not in vars(lab.evaluation)  # it computes nothing, and reads no text
    assert candidate.layer_error > 0
    assert candidate.top1_agreement > 0
    fragment = candidate.fragment()
    assert set(fragment.keys) == {"quantized", "reference"}
    assert json.loads(json.dumps(fragment.model_dump(mode="json"))) == fragment.model_dump(
        mode="json"
    )
    assert {"kl.mean", "size", "layer_error", "weights.snr_db"} <= set(fragment.measures)
    assert len(fragment.layers) == len(all_linears(lab.base_model))


def test_windows_never_exceed_the_models_context(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, "gpt2", window_length=4096, calibration_length=4096)
    assert lab.evaluation.convention == f"spread{CONTEXT}"
    assert max(len(window.ids) for window in lab.eval_data.windows) <= CONTEXT
    assert {len(ids) for ids in lab.calibration.sequences} == {CONTEXT}
    assert lab.candidate("gptq").kl.mean > 0


def test_describe_says_what_was_measured_on_what(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    measures(lab, "gptq")
    found = lab.describe()
    assert found["evaluation"]["tokens"] == sum(w.scored for w in lab.eval_data.windows)
    assert found["evaluation"]["windows"] == len(lab.eval_data.windows)
    assert found["calibration"]["tokens"] == lab.calibration.tokens
    assert found["model"]["parameters"] == sum(p.numel() for p in lab.base_model.parameters())
    assert json.loads(json.dumps(found)) == found


def test_the_worst_layers_are_known_once_they_were_measured(tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path).candidate("rtn:bits=3")
    assert candidate.kl.mean > 0
    assert candidate.worst_layers() == []
    by_error = sorted(candidate.layers, key=lambda layer: -(layer.output_error or 0))
    assert [layer.name for layer in candidate.worst_layers()] == [e.name for e in by_error[:3]]
    later = tiny_lab(tmp_path).candidate("rtn:bits=3")
    assert later.worst_layers(1) == candidate.worst_layers(1)
    assert later.lab.store.built == {}
