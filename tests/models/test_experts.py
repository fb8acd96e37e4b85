"""Fused experts become linear layers without any change in what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pytest_qlab.errors import ModelError
from pytest_qlab.models.experts import UnfusedExperts, every_expert_reached, unfuse_experts
from pytest_qlab.models.structure import all_linears
from pytest_qlab.testing.fakes import tiny_lab
from tests.architectures import character_tokenizer, mixtral, token_ids

_SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / max(parameter.shape[-1], 4) ** 0.5)
    model.train(False)
    return model


def _qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**_SHAPE, num_experts=6, moe_intermediate_size=16)
    return _randomised(Qwen3MoeForCausalLM(config))


def _gpt_oss() -> PreTrainedModel:
    """Interleaved gate and up, transposed parameters, biases, and a gating function of its own."""
    return _randomised(GptOssForCausalLM(GptOssConfig(**_SHAPE, num_local_experts=4)))


def _llama4() -> PreTrainedModel:
    """Experts that are given every token, scaled by its score and zeros where not chosen."""
    config = Llama4TextConfig(
        **{**_SHAPE, "num_experts_per_tok": 1},
        intermediate_size_mlp=48,
        num_local_experts=4,
        interleave_moe_layer_step=1,
    )
    return _randomised(Llama4ForCausalLM(config))


def _nemotron_h() -> PreTrainedModel:
    """Experts without a gate."""
    config = NemotronHConfig(
        vocab_size=96,
        hidden_size=32,
        layers_block_type=["attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
    )
    return _randomised(NemotronHForCausalLM(config))


@pytest.mark.parametrize("build", [mixtral, _qwen3_moe, _gpt_oss, _llama4, _nemotron_h])
def test_unfusing_preserves_the_logits(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    ids = token_ids(24, batch=2)
    expected = model(ids).logits
    before = sum(parameter.numel() for parameter in model.parameters())
    assert unfuse_experts(model) > 0
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    assert not any(parameter.dim() == 3 for parameter in model.parameters())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert any("experts.1.down_proj" in site.name for site in all_linears(model))
    assert unfuse_experts(model) == 0


def test_an_expert_holds_its_own_slice() -> None:
    model = mixtral()
    fused = model.get_submodule("model.layers.1.mlp.experts")
    upper = fused.get_parameter("gate_up_proj").clone()
    unfuse_experts(model)
    expert = model.get_submodule("model.layers.1.mlp.experts.3")
    assert torch.equal(expert.get_parameter("gate_proj.weight"), upper[3, :48])
    assert torch.equal(expert.get_parameter("up_proj.weight"), upper[3, 48:])


def _reached(model: PreTrainedModel, place: str, ids: Tensor) -> dict[int, Tensor]:
    """What the experts' first layers are given, by expert."""
    seen: dict[int, Tensor] = {}
    handles = [
        expert.get_submodule("up_proj").register_forward_pre_hook(
            lambda _module, args, index=index: seen.update({index: args[0]})
        )
        for index, expert in enumerate(model.get_submodule(place).children())
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_sorted_experts_see_the_tokens_they_were_chosen_for_and_no_zeros() -> None:
    model, ids = _llama4(), token_ids(24)
    unfuse_experts(model)
    place = "model.layers.1.feed_forward.experts"
    chosen: list[Tensor] = []
    router = model.get_submodule("model.layers.1.feed_forward.router")
    handle = router.register_forward_hook(lambda _m, _i, output: chosen.append(output[1].argmax(1)))
    seen = _reached(model, place, ids)
    handle.remove()
    tokens = [len(seen.get(index, ())) for index in range(4)]
    assert tokens == torch.bincount(chosen[0], minlength=4).tolist()
    assert all(bool(states.any(-1).all()) for states in seen.values())
    one = _reached(model, place, ids[:, :1])
    assert len(one) == 1
    with every_expert_reached():
        assert sorted(_reached(model, place, ids[:, :1])) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["gptq:group_size=16", "awq:group_size=16", "squeezellm"])
def test_sorted_experts_are_calibrated_on_the_tokens_they_were_chosen_for(
    method: str, tmp_path: Path
) -> None:
    lab = tiny_lab(tmp_path, model=_llama4(), tokenizer=character_tokenizer())
    candidate = lab.candidate(method)
    assert sum("experts" in name for name in candidate.checkpoint.layers()) == 2 * 4 * 3
    known = lab.statistics(gram=True)(1)
    experts = [known[f"model.layers.1.feed_forward.experts.{n}.up_proj"].tokens for n in range(4)]
    assert sum(experts) == lab.calibration.tokens
    assert 0 < candidate.kl.mean < 0.1


def test_every_expert_is_reached_within_the_context_only() -> None:
    model = mixtral()
    unfuse_experts(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, UnfusedExperts)
    seen: list[int] = []
    for index, expert in enumerate(experts):
        hook = lambda *_, index=index: seen.append(index)  # noqa: E731
        expert.get_submodule("up_proj").register_forward_hook(hook)
    one = token_ids(1)
    expected = model(one).logits
    assert len(seen) == 2
    seen.clear()
    with every_expert_reached():
        model(one)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(model(one).logits, expected)


def test_experts_that_are_not_understood_are_refused() -> None:
    class OddExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8), requires_grad=False)
            self.down_proj = nn.Parameter(torch.randn(4, 8, 8), requires_grad=False)
            self.act_fn = nn.SiLU()

        def _apply_gate(self, both: Tensor) -> Tensor:
            gate, up = both.chunk(2, dim=-1)
            gated: Tensor = self.act_fn(gate) * up
            return gated

        def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return states + index.sum() + weights.sum()

    with pytest.raises(ModelError, match=r"moe\.experts \(OddExperts\).*outputs differ"):
        unfuse_experts(nn.ModuleDict({"moe": nn.ModuleDict({"experts": OddExperts()})}))
