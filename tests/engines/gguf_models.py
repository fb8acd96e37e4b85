"""Tiny models and tokenizers for the tests of GGUF files: rows of 32, byte-level BPE."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pytest_qlab.methods.pipeline import QuantizedModel
from pytest_qlab.models.load import LoadedModel, from_memory
from pytest_qlab.models.structure import all_linears

ROWS = 288
_ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}
_SHAPE: dict[str, Any] = {
    **_ENDS,
    "vocab_size": ROWS,
    "pad_token_id": None,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **options}))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _llama(tie_word_embeddings=False),
    "llama-tied-biased": lambda: _llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-wide-heads": lambda: _llama(head_dim=32),
    "llama3-scaling": lambda: _llama(rope_parameters=LLAMA3),
    "llama-linear-scaling": lambda: _llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=32)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=ROWS, n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=96, **_ENDS
        )
    ),
}
ARCHITECTURE_OF = dict.fromkeys(MODELS, "llama") | {
    name: name for name in ("qwen2", "qwen3", "gpt2")
}


def tiny(name: str, tokenizer: PreTrainedTokenizerFast | None = None) -> LoadedModel:
    """One of `MODELS` with random weights, none of them at its initial one or zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data.add_(0.2 * noise)
        else:
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
    return from_memory(model, tokenizer or byte_level(), "tiny")


def byte_level(
    merges: int = 20,
    *,
    pre_tokenizer: Any = None,
    bos: bool = True,
    ignore_merges: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: `<s>`, `</s>`, 256 bytes, and so many merged pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet]
    pairs = [(first, second) for first in "\u0120etao" for second in "thinsr"][:merges]
    tokens += [first + second for first, second in pairs]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)}, pairs, ignore_merges=ignore_merges
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>"
    )


def sentence_piece() -> PreTrainedTokenizerFast:
    """BPE over characters with a fallback to bytes, as converted from SentencePiece."""
    pieces = ["\u2581", *"abcdehinort"]
    pairs = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("i", "n"), ("\u2581", "a")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*(first + second for first, second in pairs), *pieces]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        pairs,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def forward(loaded: LoadedModel, quantized: QuantizedModel, ids: list[int]) -> Tensor:
    """Logits (len(ids), vocabulary) of the model with the dequantized matrices of `quantized`."""
    model = copy.deepcopy(loaded.model)
    for site in all_linears(model):
        site.set_weight(quantized.layers[site.name].weight.dequantize())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, layer in quantized.embeddings.items():
            parameters[f"{name}.weight"].copy_(layer.weight.dequantize())
        for name, value in quantized.changed.items():
            parameters[name].copy_(value)
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits
