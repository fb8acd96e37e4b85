"""Every weight matrix of a model and the part it plays, in the words of GGUF.

Files for llama.cpp name tensors by their part (`attn_v`, `ffn_down`, `token_embd`), and its mixes
choose types by it. The part is read off the names that architectures give to their modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from pytest_qlab.models.structure import decoder_blocks, quantizable_linears

_ATTENTION = {
    "attn_q": {"q_proj", "wq", "q_lin"},
    "attn_k": {"k_proj", "wk", "k_lin"},
    "attn_v": {"v_proj", "wv", "v_lin"},
    "attn_qkv": {"query_key_value", "c_attn", "Wqkv", "wqkv", "qkv_proj", "in_proj_qkv", "qkv"},
    "attn_output": {"o_proj", "wo", "out_lin"},
}
_FEED_FORWARD = {
    "ffn_gate": {"gate_proj", "w1", "c_fc_0"},
    "ffn_up": {
        *("up_proj", "gate_up_proj", "dense_h_to_4h", "c_fc", "fc1", "fc_in", "w3", "v1"),
        *("c_fc_1", "input_linear"),
    },
    "ffn_down": {
        *("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2"),
        "output_linear",
    },
}
_LAST_OF_ATTENTION = {"out_proj", "c_proj", "dense"}
_IN_ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")
_RECURRENT = re.compile(r"(^|[._])(linear_attn|mamba|ssm|conv)([._]|$)")

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_EXPERTS = (
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "num_moe_experts",
)


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a model.

    Attributes:
        name: dotted name of its module.
        role: GGUF's name for its part: `attn_q`, `attn_k`, `attn_v`, `attn_qkv`, `attn_output`,
            `ffn_gate`, `ffn_up`, `ffn_down`, `token_embd`, `output`; `other` for all other parts.
            The experts of a block share theirs.
        block: number of its decoder block; None for the input embedding and the output head.
        rows, columns: out_features and in_features; of an embedding, vocabulary and width.
        tied: whether it is an input embedding that is the output head, too.
    """

    name: str
    role: str
    block: int | None
    rows: int
    columns: int
    tied: bool = False


@dataclass(frozen=True)
class Counts:
    """What llama.cpp's mixes depend on beside the matrices.

    Attributes:
        architecture: GGUF's name of it, as far as known; else transformers' model type.
        layers: decoder blocks.
        gqa: query heads that share a key/value head, in the first block.
        experts: of a mixture, in each block; 0 if there are none.
    """

    architecture: str
    layers: int
    gqa: int
    experts: int


def matrices_of(model: nn.Module) -> list[Matrix]:
    """All quantizable matrices: the decoder's linear layers, the input embedding, the output head.

    A head that is tied to the input embedding is not listed a second time.

    Raises:
        ModelError: there is no list of decoder layers.
    """
    found = [
        Matrix(
            site.name,
            role_of(site.name.removeprefix(f"{name}.")),
            index,
            site.out_features,
            site.in_features,
        )
        for index, (name, block) in enumerate(decoder_blocks(model))
        for site in quantizable_linears(block, name)
    ]
    embedding = _ask(model, "get_input_embeddings")
    head = _ask(model, "get_output_embeddings")
    shared = embedding is not None and head is not None and embedding.weight is head.weight
    if embedding is not None:
        found.append(_end(model, embedding, "token_embd", tied=shared))
    if head is not None and not shared:
        found.append(_end(model, head, "output"))
    return found


def role_of(name: str) -> str:
    """The part that a linear layer plays in its decoder block, by its name there.

    `self_attn.v_proj` is `attn_v`, `mlp.experts.3.down_proj` is `ffn_down`.
    """
    inside, _, leaf = name.rpartition(".")
    for role, leaves in _ATTENTION.items():
        if leaf in leaves:
            return role
    if _RECURRENT.search(inside):
        return "other"
    if _IN_ATTENTION.search(inside):
        return "attn_output" if leaf in _LAST_OF_ATTENTION else "other"
    for role, leaves in _FEED_FORWARD.items():
        if leaf in leaves:
            return role
    return "other"


def counts_of(model: nn.Module) -> Counts:
    """Read what llama.cpp's mixes depend on from a model and its configuration.

    Raises:
        ModelError: there is no list of decoder layers.
    """
    config: Any = getattr(model, "config", None)
    if config is not None:
        config = config.get_text_config(decoder=True)
    kind = str(getattr(config, "model_type", ""))
    heads = _count(config, _HEADS) or 1
    shared = _count(config, _KEY_VALUE_HEADS) or heads
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        shared = 1  # Falcon 7B and GPT-BigCode, whatever else their configuration says
    return Counts(
        architecture={"mistral": "llama", "mixtral": "llama"}.get(kind, kind),
        layers=len(decoder_blocks(model)),
        gqa=heads // shared,
        experts=_count(config, _EXPERTS) or 0,
    )


def _count(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is set, of the configuration or of a part of it."""
    for part in (config, *(getattr(config, each, None) for each in ("attn_config", "ffn_config"))):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]  # one for each block; llama.cpp looks at the first
            if isinstance(value, int):
                return value
    return None


def _ask(model: nn.Module, method: str) -> Any:
    """The module that `method` of a model returns, if it is there and holds a matrix."""
    find = getattr(model, method, None)
    try:
        module = find() if callable(find) else None
    except NotImplementedError:
        return None
    weight = getattr(module, "weight", None)
    return module if weight is not None and weight.dim() == 2 else None


def _end(model: nn.Module, module: nn.Module, role: str, *, tied: bool = False) -> Matrix:
    name = next(name for name, each in model.named_modules() if each is module)
    rows, columns = module.get_parameter("weight").shape
    return Matrix(name, role, None, int(rows), int(columns), tied)
