"""Rotated candidates in a lab: original terms by hand, reopened, streamed, with real kernels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab import Lab
from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.checkpoint import instantiate, open_checkpoint
from pytest_qlab.errors import MethodError, SpecError
from pytest_qlab.hadamard import hadamard_matrix, random_signs
from pytest_qlab.measuring.alone import load_alone
from pytest_qlab.measuring.runnable import speed_model
from pytest_qlab.methods.gptq import Gptq
from pytest_qlab.models.structure import all_linears
from pytest_qlab.solvers.grid import GridRule, fake_quantize
from tests.architectures import token_ids
from tests.lab.test_streaming import contents, killed_at
from tests.lab.test_streaming import lab as saved_lab
from tests.lab.tiny import saved_tiny_model, tiny_lab
from tests.measuring.oracle import mean_kl
from tests.methods.test_quarot import rotated

FEW: dict[str, Any] = {"max_windows": 3}
CASES = [
    ("llama", "quarot+gptq:bits=3:group_size=8"),
    ("llama-tied", "quarot:seed=1+dynamic:bits=4:activation_bits=4"),
    ("qwen2", "quarot:heads=no+dynamic:bits=4"),
    ("qwen3", "quarot+rtn:bits=3:group_size=-1"),
    ("gemma", "quarot+gptq:bits=3:group_size=8"),
    ("mixtral", "quarot+rtn:bits=3:group_size=8"),
]


def hadamard(width: int) -> Tensor:
    found = hadamard_matrix(width)
    assert found is not None
    matrix: Tensor = found.T / width**0.5
    return matrix


def block_diagonal(block: Tensor, count: int) -> Tensor:
    found: Tensor = torch.kron(torch.eye(count).to(block), block.contiguous())
    return found


class ByHand:
    """What `quarot` does to the layers of a model of the architecture tests, as full matrices."""

    def __init__(self, model: Any, *, seed: int, heads: bool) -> None:
        self.model = model
        width, size = model.config.hidden_size, model.model.layers[0].self_attn.head_dim
        self.stream = torch.diag(random_signs(width, seed)) @ hadamard(width)
        self.head = hadamard(size) if heads else torch.eye(size).double()

    def matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's column scale, and the rotations of its inputs and outputs; float64."""
        module: Any = self.model.get_submodule(name)
        rows, columns = module.weight.shape
        last = name.rpartition(".")[2]
        block: Any = self.model.get_submodule(name[: name.index("layers.") + len("layers.0")])
        one = torch.ones(columns).double()
        if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            attention = last in ("q_proj", "k_proj", "v_proj")
            norm = block.input_layernorm if attention else block.post_attention_layernorm
            weight = norm.weight.double()
            column = 1 + weight if "Gemma" in type(norm).__name__ else weight
            out = self._heads(rows) if last == "v_proj" else torch.eye(rows).double()
            return column, self.stream, out
        if last == "o_proj":
            return one, self._heads(columns), self.stream
        return one, torch.eye(columns).double(), self.stream

    def _heads(self, features: int) -> Tensor:
        return block_diagonal(self.head, features // len(self.head))


def by_hand(lab: Lab, spec: str) -> ByHand:
    return ByHand(lab.base_model, seed=int("seed=1" in spec), heads="heads=no" not in spec)


@pytest.mark.parametrize(("architecture", "spec"), CASES)
def test_layer_errors_are_in_the_original_basis(
    architecture: str, spec: str, tmp_path: Path
) -> None:
    lab = tiny_lab(tmp_path, architecture, **FEW)
    candidate, base = lab.candidate(spec), lab.base_model
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        site.module.register_forward_pre_hook(
            lambda _, args, name=site.name: inputs.setdefault(name, []).append(
                args[0].reshape(-1, args[0].shape[-1]).double()
            )
        )
        for site in all_linears(base)
    ]
    with torch.no_grad():
        for ids in lab.calibration.sequences:
            base(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    hand, packed = by_hand(lab, spec), candidate.checkpoint.layers()
    for layer in candidate.layers:
        column, into, out = hand.matrices(layer.name)
        weight = base.get_submodule(layer.name).weight.double()
        found = packed[layer.name].weight.dequantize().double()
        delta = weight - out @ found @ into.T / column
        snr = 10 * torch.log10(weight.square().sum() / delta.square().sum())
        assert layer.snr_db == pytest.approx(float(snr), abs=1e-3), layer.name
        x = torch.cat(inputs[layer.name])
        error = (x @ delta.T).square().sum() / (x @ weight.T).square().sum()
        assert layer.output_error == pytest.approx(float(error), rel=1e-3), layer.name


@pytest.mark.parametrize(("architecture", "spec"), CASES)
def test_attribution_is_what_a_model_with_one_layer_says(
    architecture: str, spec: str, tmp_path: Path
) -> None:
    lab = tiny_lab(tmp_path, architecture, **FEW)
    candidate, base, windows = lab.candidate(spec), lab.base_model, lab.eval_data.windows
    found, packed, hand = candidate.attribution, candidate.checkpoint.layers(), by_hand(lab, spec)
    names = [site.name for site in all_linears(base)]
    assert list(found.layers) == names
    assert found.rest == found.control == 0
    assert found.resumed
    for name in names[:8]:
        model = copy.deepcopy(base)
        module = model.get_submodule(name)
        column, into, out = (each.float() for each in hand.matrices(name))
        layer = packed[name]
        weight, bias = layer.weight.dequantize(), getattr(module, "bias", None)

        def forward(
            x: Tensor,
            column: Tensor = column,
            into: Tensor = into,
            out: Tensor = out,
            weight: Tensor = weight,
            bias: Tensor | None = bias,
            rounded: Any = layer.activation,
        ) -> Tensor:
            x = (x / column) @ into
            y = (x if rounded is None else rounded(x)) @ weight.T @ out.T
            return y if bias is None else y + bias

        module.forward = forward
        expected = mean_kl(base, model, windows)
        # A rounded input may fall to either side where it lies in the middle.
        limit = 2e-3 if layer.activation is None else 5e-2
        assert found.layers[name] == pytest.approx(expected, rel=limit, abs=1e-9), name
    assert found.total == pytest.approx(mean_kl(base, candidate.model, windows), rel=2e-3)
    assert found.total == pytest.approx(float(candidate.kl.mean), rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma", "mixtral"])
def test_without_quantization_nothing_is_lost(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture, **FEW)
    candidate = lab.candidate("quarot+none")
    assert float(candidate.kl.mean) < 1e-9
    assert float(candidate.snr_db) > 100
    assert all(each.snr_db > 100 for each in candidate.layers)
    assert not candidate.is_baseline


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mixtral"])
def test_a_checkpoint_is_reopened_to_the_bit(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture)
    candidate = lab.candidate("quarot:seed=3+gptq:bits=3:group_size=8")
    directory = candidate.checkpoint.directory
    stored = json.loads((directory / "qlab.json").read_text())["rotation"]
    assert stored["hidden"] == {"width": 32, "seed": 3, "hadamard": True}
    ids = token_ids(24)
    with torch.no_grad():
        expected = candidate.model(input_ids=ids).logits
        again = instantiate(open_checkpoint(directory), lab.base_model)
        assert torch.equal(again(input_ids=ids).logits, expected)
        alone = load_alone(open_checkpoint(directory), lab.base_model.config, torch.float32)
        assert torch.equal(alone(input_ids=ids).logits, expected)
        steps = alone(input_ids=ids[:, :12], use_cache=True)
        later = alone(input_ids=ids[:, 12:], past_key_values=steps.past_key_values)
    torch.testing.assert_close(later.logits, expected[:, 12:], atol=1e-4, rtol=1e-4)
    embedding = candidate.checkpoint.others()["model.embed_tokens.weight"]
    assert torch.equal(embedding, lab.base_model.model.embed_tokens.weight)


def test_the_base_model_is_left_alone(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    before = {name: each.clone() for name, each in lab.base_model.named_parameters()}
    assert lab.candidate("quarot+rtn").model is not lab.base_model
    assert all(torch.equal(each, before[n]) for n, each in lab.base_model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lab.base_model.modules())


def test_seeds_are_other_candidates(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    first, other = (lab.candidate(f"quarot:seed={seed}+rtn:bits=3") for seed in (0, 1))
    assert first.checkpoint.directory != other.checkpoint.directory
    name = "model.layers.0.mlp.up_proj"
    weights = [each.checkpoint.layers()[name].weight.dequantize() for each in (first, other)]
    assert not torch.equal(*weights)
    assert float(first.kl.mean) != float(other.kl.mean)


def test_gptq_sees_the_rotated_outputs_of_quantized_blocks(tmp_path: Path) -> None:
    """The second block is calibrated on a rotated model whose first block is quantized, by hand."""
    lab = tiny_lab(tmp_path)
    method = Gptq(bits=3, group_size=8)
    packed = lab.candidate("quarot+gptq:bits=3:group_size=8").checkpoint.layers()
    model, _ = rotated(lab.base_model)
    name = "model.layers.1.self_attn.q_proj"
    inputs: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for site in all_linears(model):
            if ".layers.0." in site.name:
                site.set_weight(packed[site.name].weight.dequantize())
        for ids in lab.calibration.sequences:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    x = torch.cat(inputs)
    known = LayerStatistics(len(x), x.square().sum(0), gram=x.T @ x)
    weight = model.get_submodule(name).weight.detach()
    expected = method.quantize(weight, known, name=name).weight.dequantize()
    found = packed[name].weight.dequantize()
    assert float((found != expected).float().mean()) < 0.01
    rounded = fake_quantize(weight, GridRule(3), 8)
    assert float((found != rounded).float().mean()) > 0.1


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [
        ("llama", "quarot+rtn"),
        ("llama", "quarot:heads=no+gptq"),
        ("llama-tied", "quarot+gptq:true_sequential=true"),
        ("mixtral", "quarot+gptq"),
        ("mixtral", "smooth+gptq"),
        ("llama", "quarot+gguf:Q4_0"),
        ("gpt2", "smooth+gptq"),
        ("llama", "smoothquant"),
    ],
)
def test_block_by_block_the_bits_are_the_same(tmp_path: Path, architecture: str, spec: str) -> None:
    model = saved_tiny_model(tmp_path / "model", architecture)
    whole = saved_lab(model, tmp_path / "whole", stream="never")
    streamed = saved_lab(model, tmp_path / "streamed", stream="always", threads=2)
    method = whole.candidate(spec).method
    assert contents(streamed.checkpoint(method)) == contents(whole.checkpoint(method))
    assert not streamed.model.is_loaded
    lazy = streamed.model.lazy
    assert lazy is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lazy.model.modules())


def test_a_killed_build_goes_on_between_rotated_blocks(tmp_path: Path) -> None:
    model = saved_tiny_model(tmp_path / "model")
    spec = "quarot+gptq"
    said: list[str] = []
    whole = saved_lab(model, tmp_path / "whole", stream="always", progress=said.append)
    expected = contents(whole.candidate(spec).checkpoint)
    line = next(place for place, text in enumerate(said, 1) if "block 2/2" in text)

    def make(progress: Any) -> None:
        _ = (
            saved_lab(model, tmp_path / "killed", stream="always", progress=progress)
            .candidate(spec)
            .checkpoint
        )

    assert killed_at(line, make)
    resumed = saved_lab(model, tmp_path / "killed", stream="always")
    assert contents(resumed.candidate(spec).checkpoint) == expected


def test_real_kernels_run_rotated_layers(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    turned, plain = lab.candidate("quarot+rtn"), lab.candidate("rtn")
    assert str(turned.kernels) == str(plain.kernels)
    ids = token_ids(24)
    with torch.no_grad():
        expected = turned.model(input_ids=ids).logits
        found = speed_model(turned)(input_ids=ids).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_process_of_its_own_runs_it(tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path, **FEW).candidate("quarot+rtn")
    assert candidate.memory.rss_peak > 0
    assert candidate.memory.resident > 0


def test_other_dtypes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    saved_tiny_model(model)
    lab = saved_lab(model, tmp_path / "store", dtype="bfloat16")
    candidate = lab.candidate("quarot+none")
    assert float(candidate.kl.mean) < 0.01
    assert candidate.model.dtype == torch.bfloat16


def test_a_gguf_file_cannot_hold_it(tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path).candidate("quarot+rtn:symmetric=true:group_size=32")
    with pytest.raises(MethodError, match=r"rotates hidden states.*GGUF"):
        candidate.save_gguf(tmp_path / "rotated.gguf")


@pytest.mark.parametrize("stream", ["never", "always"])
def test_what_cannot_be_rotated_is_an_error_and_leaves_nothing(tmp_path: Path, stream: str) -> None:
    model = saved_tiny_model(tmp_path / "model", "gpt2")
    lab = saved_lab(model, tmp_path / "store", stream=stream)
    with pytest.raises(MethodError, match="quarot cannot rotate block 0"):
        _ = lab.candidate("quarot+rtn").checkpoint
    with pytest.raises(SpecError, match="'awq' calibrates on the original"):
        lab.candidate("quarot+awq")
    assert lab.candidate("rtn").checkpoint.rotation is None


def test_results_know_the_options(tmp_path: Path) -> None:
    found = tiny_lab(tmp_path).candidate("quarot:seed=4+rtn").fragment()
    assert (found.id, found.method) == ("quarot-seed=4+rtn-w4g128", "quarot+rtn")
    assert found.options["quarot.seed"] == 4
    assert json.loads(found.model_dump_json())["options"]["bits"] == 4
