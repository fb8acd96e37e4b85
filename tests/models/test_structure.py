"""Linear layers are found in every layout, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from pytest_qlab.errors import ModelError
from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.structure import (
    all_linears,
    decoder_blocks,
    quantizable_linears,
    routers,
)
from pytest_qlab.testing.fakes import tiny_lab, tiny_model, tiny_tokenizer
from tests.architectures import ARCHITECTURES, token_ids

_LLAMA = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
_EXPECTED = {
    "gpt2": ("transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "opt": (
        "model.decoder.layers",
        {*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "fc1", "fc2"},
    ),
    "phi": (
        "model.layers",
        {*(f"self_attn.{p}_proj" for p in "qkv"), "self_attn.dense", "mlp.fc1", "mlp.fc2"},
    ),
    "falcon": (
        "transformer.h",
        {
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        },
    ),
    "mixtral": (
        "model.layers",
        {f"self_attn.{p}_proj" for p in "qkvo"}
        | {f"mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")},
    ),
    **dict.fromkeys(
        ("llama", "llama-tied", "qwen2", "qwen3", "gemma", "gemma2"), ("model.layers", _LLAMA)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_linears_are_those_of_the_table(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    blocks, linears = _EXPECTED[architecture]
    expected = {f"{blocks}.{layer}.{name}" for layer in range(2) for name in linears}
    found = [site.name for site in all_linears(model)]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [name for name, _ in decoder_blocks(model)] == [f"{blocks}.0", f"{blocks}.1"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_site_gives_the_matrix_that_its_module_multiplies_by(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    generator = torch.Generator().manual_seed(0)
    for site in all_linears(model):
        x = torch.randn(3, site.in_features, generator=generator)
        expected = x @ site.weight().T
        if site.bias is not None:
            expected += site.bias
        assert site.weight().shape == (site.out_features, site.in_features)
        torch.testing.assert_close(site.module(x), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_weight_that_is_set_is_read_back_and_used(architecture: str) -> None:
    site = all_linears(ARCHITECTURES[architecture]())[1]
    weight = torch.arange(site.out_features * site.in_features).float()
    weight = weight.reshape(site.out_features, site.in_features)
    copy = site.weight()
    site.set_weight(weight)
    assert torch.equal(site.weight(), weight)
    assert not torch.equal(copy, weight)
    x = torch.eye(site.in_features)
    expected = weight.T if site.bias is None else weight.T + site.bias
    torch.testing.assert_close(site.module(x), expected)
    with pytest.raises(ModelError, match=r"shape"):
        site.set_weight(weight[:-1])


def test_replacing_puts_the_module_into_the_model_given() -> None:
    model, other = ARCHITECTURES["mixtral"](), ARCHITECTURES["mixtral"]()
    for each in (model, other):
        unfuse_experts(each)
    site = next(s for s in all_linears(model) if s.name.endswith("experts.2.down_proj"))
    new = nn.Linear(site.in_features, site.out_features, bias=False)
    site.replace(other, new)
    assert other.get_submodule(site.name) is new
    assert model.get_submodule(site.name) is site.module
    assert torch.isfinite(other(token_ids()).logits).all()


def test_routers_of_mixtures_are_told_from_linears() -> None:
    model = ARCHITECTURES["mixtral"]()
    unfuse_experts(model)
    name, block = decoder_blocks(model)[0]
    assert [site.name for site in routers(block, name)] == [f"{name}.mlp.gate"]
    assert routers(block, name)[0].weight().shape == (4, 32)


def test_the_gate_of_a_shared_expert_is_a_router() -> None:
    config = Qwen2MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    model = Qwen2MoeForCausalLM(config)
    assert unfuse_experts(model) == 1
    name, block = decoder_blocks(model)[0]
    assert {s.name for s in routers(block, "b")} == {"b.mlp.gate", "b.mlp.shared_expert_gate"}
    names = {site.name.removeprefix(f"{name}.") for site in quantizable_linears(block, name)}
    assert {"mlp.shared_expert.up_proj", "mlp.experts.3.down_proj"} <= names
    assert "mlp.shared_expert_gate" not in names


def test_linear_routers_inside_and_beside_experts_are_left_out() -> None:
    class TopKGating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 3)
            self.router = nn.Linear(8, 5)
            self.gating = TopKGating()
            self.shared = nn.Linear(8, 8)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    block = nn.ModuleDict({"mlp": Mixture()})
    assert [site.name for site in quantizable_linears(block)] == [
        "mlp.shared",
        "mlp.experts.0",
        "mlp.experts.1",
        "mlp.experts.2",
    ]
    assert {s.name for s in routers(block)} == {"mlp.gate", "mlp.router", "mlp.gating.layer"}


class Restated(nn.Linear):
    """As Falcon's: the same product, written down once more."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    """Built as a linear layer is, and not one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Grouped(nn.Linear):
    """As DeepSeek V4's: each group of outputs reads a group of the inputs."""

    def __init__(self, of_group: int, outputs: int, groups: int) -> None:
        super().__init__(of_group, outputs, bias=False)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.view(self.groups, -1, self.in_features)
        parts = x.view(*x.shape[:-1], self.groups, self.in_features)
        return torch.einsum("...gi,goi->...go", parts, rows).flatten(-2)


def test_a_linear_layer_that_computes_something_else_is_none() -> None:
    block = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "restated": Restated(8, 8),
            "doubled": Doubled(8, 8),
            "grouped": Grouped(4, 8, 2),
        }
    )
    assert [site.name for site in quantizable_linears(block)] == ["plain", "restated"]
    assert routers(block) == []


@pytest.mark.parametrize("method", ["rtn:group_size=16", "gptq:group_size=16", "awq:group_size=16"])
def test_a_model_with_such_a_layer_is_quantized_around_it(method: str, tmp_path: Path) -> None:
    model = tiny_model()
    for _, block in decoder_blocks(model):
        attention = block.get_submodule("self_attn")
        width = attention.get_submodule("o_proj").get_parameter("weight").shape[1]
        attention.register_module("o_proj", Grouped(width // 2, width, 2).requires_grad_(False))
    lab = tiny_lab(tmp_path, model=model, tokenizer=tiny_tokenizer())
    candidate = lab.candidate(method)
    assert not any(name.endswith("o_proj") for name in candidate.checkpoint.layers())
    assert any(name.endswith("v_proj") for name in candidate.checkpoint.layers())
    assert 0 < candidate.kl.mean < 1


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to quantize"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))
