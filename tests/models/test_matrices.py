"""Every matrix is found and named by its part, in the words of GGUF."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import MptConfig, MptForCausalLM

from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.matrices import Counts, Matrix, counts_of, matrices_of, role_of
from pytest_qlab.models.structure import all_linears
from tests.architectures import ARCHITECTURES

_ATTENTION = ["attn_q", "attn_k", "attn_v", "attn_output"]
_LLAMA = [*_ATTENTION, "ffn_gate", "ffn_up", "ffn_down"]
_FUSED = ["attn_qkv", "attn_output", "ffn_up", "ffn_down"]
_ROLES = {
    "gpt2": _FUSED,
    "falcon": _FUSED,
    "opt": [*_ATTENTION, "ffn_up", "ffn_down"],
    "phi": [*_ATTENTION, "ffn_up", "ffn_down"],
    "mixtral": [*_ATTENTION, *4 * ["ffn_gate", "ffn_up", "ffn_down"]],
    **dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA),
}
_TIED = ("llama-tied", "gpt2", "opt", "qwen3", "gemma", "gemma2", "falcon")
_COUNTS = {
    "llama": ("llama", 2, 0),
    "llama-tied": ("llama", 1, 0),
    "gpt2": ("gpt2", 1, 0),
    "opt": ("opt", 1, 0),
    "qwen2": ("qwen2", 2, 0),
    "qwen3": ("qwen3", 2, 0),
    "gemma": ("gemma", 4, 0),
    "gemma2": ("gemma2", 2, 0),
    "phi": ("phi", 1, 0),
    "falcon": ("falcon", 4, 0),
    "mixtral": ("llama", 2, 4),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_are_those_of_the_table(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    found = matrices_of(model)
    for block in range(2):
        roles = [each.role for each in found if each.block == block]
        assert sorted(roles) == sorted(_ROLES[architecture])
    ends = [(each.role, each.tied) for each in found if each.block is None]
    if architecture in _TIED:
        assert ends == [("token_embd", True)]
    else:
        assert ends == [("token_embd", False), ("output", False)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_shapes_are_the_modules(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    found = matrices_of(model)
    sites = all_linears(model)
    assert [each.name for each in found if each.block is not None] == [s.name for s in sites]
    assert [(each.rows, each.columns) for each in found[: len(sites)]] == [
        (site.out_features, site.in_features) for site in sites
    ]
    for each in found[len(sites) :]:
        weight = model.get_submodule(each.name).get_parameter("weight")
        assert weight.shape == (each.rows, each.columns) == (96, 32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_are_the_configuration(architecture: str) -> None:
    name, gqa, experts = _COUNTS[architecture]
    model = ARCHITECTURES[architecture]()
    assert counts_of(model) == Counts(name, layers=2, gqa=gqa, experts=experts)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("self_attn.q_proj", "attn_q"),  # Llama and its many children
        ("attention.wv", "attn_v"),  # Llama as Meta publishes it
        ("attention.query_key_value", "attn_qkv"),  # GPT-NeoX
        ("attention.dense", "attn_output"),
        ("self_attention.dense", "attn_output"),  # BLOOM
        ("attn.Wqkv", "attn_qkv"),  # MPT
        ("attn.out_proj", "attn_output"),
        ("ffn.up_proj", "ffn_up"),
        ("attn.attention.out_proj", "attn_output"),  # GPT-Neo
        ("attn.q_proj", "attn_q"),  # GPT-J
        ("mlp.fc_out", "ffn_down"),
        ("self_attn.qkv_proj", "attn_qkv"),  # Phi-3
        ("mlp.gate_up_proj", "ffn_up"),
        ("feed_forward.w2", "ffn_down"),
        ("block_sparse_moe.experts.7.w1", "ffn_gate"),
        ("block_sparse_moe.experts.7.w3", "ffn_up"),
        ("mlp.shared_expert.down_proj", "ffn_down"),
        ("self_attn.gate_proj", "other"),  # a gate on the outputs of attention
        ("self_attn.kv_b_proj", "other"),  # DeepSeek's latent attention
        ("linear_attn.out_proj", "other"),  # Qwen3-Next
        ("mamba.out_proj", "other"),
        ("mixer.x_proj", "other"),
        ("project_in", "other"),
    ],
)
def test_roles_by_name(name: str, role: str) -> None:
    assert role_of(name) == role


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"opt"}))
def test_roles_agree_with_the_gguf_package(architecture: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    arch = {"phi": "PHI2", "mixtral": "LLAMA", "llama-tied": "LLAMA"}.get(
        architecture, architecture.upper()
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 2)
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    for each in matrices_of(model):
        theirs = names.get_name(f"{each.name}.weight", try_suffixes=(".weight",))
        if theirs is None:  # split experts, which GGUF keeps as one tensor
            assert ".experts." in each.name
            continue
        block = "" if each.block is None else f"blk.{each.block}."
        assert theirs == f"{block}{each.role}.weight"


def test_counts_in_parts_of_the_configuration() -> None:
    config = MptConfig(
        d_model=32, n_heads=4, n_layers=3, vocab_size=96, max_seq_len=64, expansion_ratio=2
    )
    model = MptForCausalLM(config)
    assert counts_of(model) == Counts("mpt", layers=3, gqa=1, experts=0)
    assert [m.role for m in matrices_of(model)] == [*3 * _FUSED, "token_embd"]


@pytest.mark.parametrize(
    ("settings", "gqa", "experts"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4, 0),
        ({"num_attention_heads": 8, "num_key_value_heads": [4, 2], "num_experts": None}, 2, 0),
        ({"n_head": 8, "multi_query": True, "num_kv_heads": 8}, 8, 0),
        (
            {
                "num_attention_heads": 8,
                "multi_query": True,
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
            },
            4,
            0,
        ),
        ({"num_attention_heads": 4, "n_routed_experts": 64}, 1, 64),
        ({"n_heads": 4, "ffn_config": SimpleNamespace(moe_num_experts=16)}, 1, 16),
        ({}, 1, 0),
    ],
)
def test_counts_by_the_names_of_many_configurations(
    settings: dict[str, Any], gqa: int, experts: int
) -> None:
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    config = SimpleNamespace(model_type="any", num_hidden_layers=1, **settings)
    config.get_text_config = lambda decoder: config
    model.config = config
    assert counts_of(model) == Counts("any", 1, gqa, experts)


def test_a_model_without_embeddings_has_its_linears() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6))])
    assert matrices_of(model) == [Matrix("layers.0.0", "other", 0, 6, 4)]
    assert counts_of(model) == Counts("", 1, 1, 0)
