"""Which tensor of a GGUF file holds which parameter of a model, and in which order of rows.

llama.cpp rotates neighbouring pairs of a head's rows where transformers rotates a row of the first
half with one of the second, so files of Llama models hold the rows of queries and keys in another
order. Source: `convert_hf_to_gguf.py` and the graphs in `src/models` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp calls the modules of a class of models.

    Args:
        name: GGUF's name of the architecture.
        blocks: name of the list of decoder blocks.
        modules: tensor of each module outside them.
        block: tensor of each module inside a block.
        biased: tensors that llama.cpp also reads a bias of.
        regrouped: whether the rows of queries and keys are in another order.
    """

    name: str
    blocks: str
    modules: Mapping[str, str]
    block: Mapping[str, str]
    biased: frozenset[str]
    regrouped: bool = False


_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMED = {**_INSIDE, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_ALL = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
_LLAMA = _Architecture("llama", "model.layers", _OUTSIDE, _INSIDE, _ALL, regrouped=True)
_GPT2 = _Architecture(
    "gpt2",
    "transformer.h",
    {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    frozenset(
        {"output_norm", "attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"}
    ),
)
ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _Architecture("qwen2", "model.layers", _OUTSIDE, _INSIDE, _QKV),
    "Qwen3ForCausalLM": _Architecture("qwen3", "model.layers", _OUTSIDE, _NORMED, _QKV),
    "GPT2LMHeadModel": _GPT2,
}
"""The models that GGUF files can be written of and read for, by the names of their classes."""


@dataclass(frozen=True)
class Place:
    """One parameter and the tensor that holds it.

    Attributes:
        parameter: its name in the model.
        tensor: its name in the file.
        shape: rows first, (out_features, in_features) for matrices, whatever the model's layout.
        packable: whether it is a matrix that may be quantized.
        heads: over how many heads its rows are regrouped; 0 if they are in the same order.
    """

    parameter: str
    tensor: str
    shape: tuple[int, ...]
    packable: bool
    heads: int = 0

    @property
    def module(self) -> str:
        """The name of the module that holds it."""
        return self.parameter.rpartition(".")[0]

    def file_rows(self) -> Tensor | None:
        """The model's row at each place of the file, int64 (rows,); None if all keep theirs."""
        if not self.heads:
            return None
        return torch.arange(self.shape[0]).view(self.heads, 2, -1).transpose(1, 2).reshape(-1)

    def model_rows(self) -> Tensor | None:
        """The inverse: which row of the file's is at each place of the model."""
        if not self.heads:
            return None
        return torch.arange(self.shape[0]).view(self.heads, -1, 2).transpose(1, 2).reshape(-1)


@dataclass(frozen=True)
class Naming:
    """All parameters of one model and their places, in the model's order.

    Attributes:
        architecture: GGUF's name of it.
        places: by parameter; a head that is tied to the input embedding has none.
        embedding: the parameter that is the input embedding.
        tied: whether that is the output head, too.
    """

    architecture: str
    places: Mapping[str, Place]
    embedding: str
    tied: bool

    @property
    def rows(self) -> int:
        """Rows of the input embedding: how many tokens the file has to name."""
        return self.places[self.embedding].shape[0]


def gguf_names(model: PreTrainedModel) -> Naming:
    """Find the place of every parameter of a model.

    Raises:
        ModelError: its architecture is not one of `ARCHITECTURES`, or it has a parameter that
            llama.cpp does not know.
    """
    found = ARCHITECTURES.get(type(model).__name__)
    if found is None:
        raise ModelError(
            f"A {type(model).__name__} cannot be written to a GGUF file or read from one here. "
            f"Supported are {', '.join(ARCHITECTURES)}: give one of these, or use methods that "
            "need no GGUF file."
        )
    places = {place.parameter: place for place in _places(model, found)}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Naming(
        found.name, places, names[id(embedding.weight)], tied=head.weight is embedding.weight
    )


def _places(model: PreTrainedModel, architecture: _Architecture) -> Iterator[Place]:
    from pytest_qlab.models.structure import all_linears

    sites = {f"{site.name}.weight": site for site in all_linears(model)}
    config: Any = model.config
    heads = {}
    if architecture.regrouped:
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        prefix, stem = "", architecture.modules.get(module)
        if stem is None and module.startswith(f"{architecture.blocks}."):
            index, _, inside = module.removeprefix(f"{architecture.blocks}.").partition(".")
            prefix, stem = f"blk.{index}.", architecture.block.get(inside)
        if stem is None or (
            kind != "weight" and not (kind == "bias" and stem in architecture.biased)
        ):
            raise ModelError(
                f"{type(model).__name__} has the parameter {name}, for which llama.cpp's "
                f"{architecture.name!r} has no place, so the model cannot be written to a GGUF "
                "file. Give a model without it, or use methods that need no GGUF file."
            )
        shape = tuple(parameter.shape)
        site = sites.get(name)
        if site is not None:
            shape = (site.out_features, site.in_features)
        yield Place(
            name,
            f"{prefix}{stem}.{kind}",
            shape,
            packable=site is not None or f"{stem}.{kind}" in ("token_embd.weight", "output.weight"),
            heads=heads.get(stem, 0),
        )
