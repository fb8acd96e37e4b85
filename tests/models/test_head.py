"""Final hidden states and the head together give the logits of a full forward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from pytest_qlab.errors import ModelError
from pytest_qlab.models.head import head_of
from tests.architectures import ARCHITECTURES, llama, token_ids


def _llama_config() -> LlamaConfig:
    config = llama().config
    assert isinstance(config, LlamaConfig)
    return config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_gives_the_models_logits(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    head = head_of(model)
    ids = token_ids(20, batch=2, seed=9)
    expected = model(ids).logits
    assert head.exact
    assert head.backbone
    logits = head.logits_from_hidden(head.hidden(ids))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.full_logits(ids), expected)
    part = head.logits_from_hidden(head.hidden(ids), 30, 41)
    torch.testing.assert_close(part, expected[..., 30:41], rtol=1e-5, atol=1e-5)


def test_the_soft_cap_of_gemma_2_is_found() -> None:
    assert head_of(ARCHITECTURES["gemma2"]()).soft_cap == 10.0
    assert head_of(ARCHITECTURES["gemma"]()).soft_cap is None


def test_a_scale_on_the_logits_is_found() -> None:
    config = CohereConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        logit_scale=0.25,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    head = head_of(CohereForCausalLM(config).train(False))
    assert head.exact
    assert head.scale == 0.25


def test_an_unknown_transform_is_not_exact_and_full_logits_are() -> None:
    class Odd(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.abs().sqrt()
            return output

    model = Odd(_llama_config()).train(False)
    head = head_of(model)
    ids = token_ids(8)
    assert not head.exact
    assert torch.equal(head.full_logits(ids), model(ids).logits)


def test_hidden_states_come_from_a_hook_where_the_backbone_differs() -> None:
    class Doubled(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))

    model = Doubled(_llama_config()).train(False)
    head = head_of(model)
    assert not head.backbone
    assert head.exact
    batches = [token_ids(12, seed=seed) for seed in range(6)]

    def logits(ids: Tensor) -> Tensor:
        return head.logits_from_hidden(head.hidden(ids))

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(logits, batches))
    for ids, result in zip(batches, results, strict=True):
        torch.testing.assert_close(result, model(ids).logits.detach())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no output embeddings"):
        head_of(LlamaModel(_llama_config()))
