"""What a GGUF file says of a model beside its tensors, and whether llama.cpp can compute it at all.

Source: `convert_hf_to_gguf.py`, and `load_hparams` and the graphs in `src/models` of llama.cpp.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.engines.gguf.names import gguf_names
from pytest_qlab.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor with a divisor for each rotary frequency, as the scaling of Llama 3 needs it."""

_ROTARY = ("default", "linear", "llama3")
_GELU = ("gelu_new", "gelu_pytorch_tanh")


def hyperparameters(model: PreTrainedModel) -> dict[str, int | float | str]:
    """The metadata that llama.cpp needs to compute what a model computes, by full key.

    The context is at most a model's sliding window: the llama.cpp graphs of these architectures
    have none and attend to everything, which is the same up to that length. The number of tokens
    is not among it.

    Raises:
        ModelError: llama.cpp would compute something else.
    """
    architecture = gguf_names(model).architecture
    config: Any = model.config
    values = _of_gpt2(config) if architecture == "gpt2" else _of_llama(config, architecture)
    return {f"{architecture}.{key}": value for key, value in values.items()}


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, float32 (head_dim / 2,); None for one.

    Raises:
        ModelError: the kind of scaling is not supported.
    """
    config: Any = model.config
    if gguf_names(model).architecture == "gpt2":
        return None
    scaling = _rotary(config)
    if scaling["rope_type"] != "llama3":
        return None
    dim = _head_dim(config)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    wavelengths = 2 * math.pi * scaling["rope_theta"] ** exponents
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor = scaling["factor"]
    context = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > context / low, torch.full_like(between, factor), between)
    return torch.where(wavelengths < context / high, torch.ones_like(between), factors)


def check_hyperparameters(metadata: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Compare a file's metadata with a model's configuration, as far as results depend on it.

    Raises:
        ModelError: they differ, or the file is of another architecture.
    """
    architecture = gguf_names(model).architecture
    found = metadata.get("general.architecture")
    if found != architecture:
        raise ModelError(
            f"The GGUF file is of the architecture {reprlib.repr(found)}, but the base model is a "
            f"{type(model).__name__}, which is {architecture!r} there. Give the model that the "
            "file was made from as --qlab-model."
        )
    ours = _effective(hyperparameters(model), architecture)
    theirs = _effective(metadata, architecture)
    for key, value in ours.items():
        if not _same(value, theirs[key]):
            raise ModelError(
                f"The GGUF file does not fit the base model: {architecture}.{key} is "
                f"{reprlib.repr(theirs[key])} in the file, but {value!r} by the model's "
                "configuration. Give the model that the file was made from as --qlab-model; if "
                "that is what you did, one of the two was changed afterwards."
            )


def _effective(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """What llama.cpp makes of a file's metadata, defaults and all, as far as results depend on it.

    Not among it is what only limits the length, or repeats the shapes of tensors.
    """

    def given(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        # Some writers give a value for each layer.
        same = isinstance(value, list) and value and all(each == value[0] for each in value)
        return value[0] if same else value

    heads, width = given("attention.head_count"), given("embedding_length")
    values = {
        "block_count": given("block_count"),
        "embedding_length": width,
        "attention.head_count": heads,
    }
    if architecture == "gpt2":
        return values | {
            "attention.layer_norm_epsilon": given("attention.layer_norm_epsilon"),
        }
    known = isinstance(heads, int) and isinstance(width, int) and heads > 0
    length = given("attention.key_length", width // heads if known else None)
    scaling = given("rope.scaling.type", "linear")
    factor = given("rope.scaling.factor", given("rope.scale_linear")) or 1.0
    if scaling == "none" or (scaling == "linear" and factor == 1.0):
        scaling, factor = "none", 1.0
    return values | {
        "attention.head_count_kv": given("attention.head_count_kv", heads),
        "attention.key_length": length,
        "attention.value_length": given(
            "attention.value_length", width // heads if known else None
        ),
        "attention.layer_norm_rms_epsilon": given("attention.layer_norm_rms_epsilon"),
        "attention.scale": given("attention.scale") or None,
        "rope.dimension_count": given("rope.dimension_count", length),
        "rope.freq_base": given("rope.freq_base", 10000.0),
        "rope.scaling.type": scaling,
        "rope.scaling.factor": factor,
        "rope.scaling.attn_factor": given("rope.scaling.attn_factor", 1.0),
        "expert_count": given("expert_count", 0),
    }


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def _of_llama(config: Any, architecture: str) -> dict[str, int | float | str]:
    scaling = _rotary(config)
    dim, heads = _head_dim(config), config.num_attention_heads
    if config.hidden_act not in ("silu", "swish"):
        raise _impossible(f"the activation {config.hidden_act!r}", "silu")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise _impossible("rotary positions of a part of each head", "whole heads")
    if scaling["rope_type"] == "llama3" and architecture != "llama":
        raise _impossible(f"the rotary scaling of Llama 3 in {architecture!r}", "none or linear")
    if architecture == "qwen2" and dim * heads != config.hidden_size:
        raise _impossible(
            f"{heads} heads of {dim} in a width of {config.hidden_size}",
            "heads that fill the width",
        )
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and "sliding_attention" in kinds:
        context = min(context, window)
    values: dict[str, int | float | str] = {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": dim,
        "rope.freq_base": float(scaling["rope_theta"]),
    }
    if scaling["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    return values


def _of_gpt2(config: Any) -> dict[str, int | float | str]:
    if config.activation_function not in _GELU:
        raise _impossible(f"the activation {config.activation_function!r}", " or ".join(_GELU))
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise _impossible("attention scaled otherwise than by the width of a head", "that scale")
    return {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _rotary(config: Any) -> dict[str, Any]:
    scaling = {"rope_type": "default", **(getattr(config, "rope_parameters", None) or {})}
    if scaling["rope_type"] not in _ROTARY or "rope_theta" not in scaling:
        raise _impossible(
            f"rotary positions of the kind {scaling['rope_type']!r}", ", ".join(_ROTARY)
        )
    return scaling


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _impossible(what: str, possible: str) -> ModelError:
    return ModelError(
        f"The base model has {what}, which cannot be expressed in a GGUF file as this package "
        f"writes and reads them; expected {possible}. Use methods that need no GGUF file."
    )
