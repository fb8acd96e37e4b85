"""Tiny randomly initialised causal language models, one for every layout the plugin must handle.

Every model has two decoder layers, a vocabulary of 96 tokens and a context of 64 positions. All
one-dimensional parameters (norm weights, biases) are drawn at random instead of left at one or
zero, so that a fold that forgets one of them cannot pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
CONTEXT = 64
_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SHAPE: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}


def build(
    model_class: Callable[[Any], PreTrainedModel], config: PreTrainedConfig, seed: int
) -> PreTrainedModel:
    """The model in float32 and eval mode, with weights large enough to make logits differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * noise)
            else:
                parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
    model.train(False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def llama(seed: int = 0) -> PreTrainedModel:
    """Llama with grouped-query attention (2 key/value heads) and a head of its own."""
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False)
    return build(LlamaForCausalLM, config, seed)


def llama_tied(seed: int = 0) -> PreTrainedModel:
    """Llama with as many key/value heads as heads, biases, and tied embeddings."""
    config = LlamaConfig(
        **SHAPE, num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True
    )
    return build(LlamaForCausalLM, config, seed)


def gpt2(seed: int = 0) -> PreTrainedModel:
    """GPT-2: Conv1D, fused query/key/value, learned positions, tied embeddings."""
    config = GPT2Config(**_TOKENS, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=CONTEXT)
    return build(GPT2LMHeadModel, config, seed)


def opt(seed: int = 0) -> PreTrainedModel:
    """OPT, norm first: biases everywhere and a ReLU between fc1 and fc2."""
    config = OPTConfig(
        **_TOKENS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        do_layer_norm_before=True,
    )
    return build(OPTForCausalLM, config, seed)


def qwen2(seed: int = 0) -> PreTrainedModel:
    """Qwen2: biases on query, key and value only."""
    config = Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False)
    return build(Qwen2ForCausalLM, config, seed)


def qwen3(seed: int = 0) -> PreTrainedModel:
    """Qwen3: norms on queries and keys, and heads wider than hidden size / heads."""
    config = Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    return build(Qwen3ForCausalLM, config, seed)


def gemma(seed: int = 0) -> PreTrainedModel:
    """Gemma: norms that multiply by (1 + weight), scaled embeddings, tied head."""
    config = GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=8)
    return build(GemmaForCausalLM, config, seed)


def gemma2(seed: int = 0) -> PreTrainedModel:
    """Gemma 2: norms before and after each sublayer, soft caps on attention and on logits."""
    config = Gemma2Config(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=10.0,
    )
    return build(Gemma2ForCausalLM, config, seed)


def phi(seed: int = 0) -> PreTrainedModel:
    """Phi: attention and MLP in parallel behind one norm; a head with a bias."""
    config = PhiConfig(**SHAPE, num_key_value_heads=4)
    return build(PhiForCausalLM, config, seed)


def falcon(seed: int = 0) -> PreTrainedModel:
    """Falcon as the 7b: fused multi-query attention and MLP in parallel behind one norm."""
    config = FalconConfig(
        **_TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=64,
        max_position_embeddings=CONTEXT,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        bias=False,
        alibi=False,
    )
    return build(FalconForCausalLM, config, seed)


def mixtral(seed: int = 0) -> PreTrainedModel:
    """Mixtral: four experts of which each token visits two."""
    config = MixtralConfig(
        **SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    return build(MixtralForCausalLM, config, seed)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": llama_tied,
    "gpt2": gpt2,
    "opt": opt,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "phi": phi,
    "falcon": falcon,
    "mixtral": mixtral,
}


def token_ids(length: int = 24, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids of shape (batch, length), without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def character_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the same vocabulary size: newline and ASCII up to '{', one token each."""
    characters = ["\n", *(chr(code) for code in range(32, 32 + VOCABULARY - 4))]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
