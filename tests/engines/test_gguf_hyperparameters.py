"""Metadata of models: what is written, what cannot be, and what a file's must be equal to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qlab.engines.gguf.hyperparameters import (
    check_hyperparameters,
    hyperparameters,
    rope_factors,
)
from pytest_qlab.errors import ModelError
from tests.engines.gguf_models import ARCHITECTURE_OF, LLAMA3, MODELS


def _file(name: str, **changes: Any) -> tuple[dict[str, Any], Any]:
    """The metadata of a model's file, with changes by the last part of the key, and the model."""
    model = MODELS[name]()
    metadata: dict[str, Any] = dict(hyperparameters(model))
    metadata["general.architecture"] = ARCHITECTURE_OF[name]
    for key, value in changes.items():
        full = key if "." in key else next(k for k in metadata if k.endswith(f".{key}"))
        if value is None:
            metadata.pop(full)
        else:
            metadata[full] = value
    return metadata, model


def test_a_llama_with_wide_heads_is_described_in_full() -> None:
    assert hyperparameters(MODELS["llama-wide-heads"]()) == {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
    }


def test_a_gpt2_is_described_with_its_own_inner_width() -> None:
    assert hyperparameters(MODELS["gpt2"]()) == {
        "gpt2.block_count": 2,
        "gpt2.context_length": 128,
        "gpt2.embedding_length": 64,
        "gpt2.feed_forward_length": 96,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
    }


def test_the_context_ends_where_the_sliding_window_does() -> None:
    assert hyperparameters(MODELS["mistral"]())["llama.context_length"] == 64


def test_scaling_of_llama_3_divides_the_frequencies_that_transformers_divides() -> None:
    model: Any = MODELS["llama3-scaling"]()
    factors = rope_factors(model)
    assert factors is not None
    assert factors.dtype == torch.float32
    base = LLAMA3["rope_theta"]
    assert isinstance(base, float)
    plain = torch.tensor([base ** (-2 * pair / 16) for pair in range(8)])
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert 1 in factors
    assert 8 in factors  # and some in between: all three branches are taken
    assert ((factors > 1) & (factors < 8)).any()


@pytest.mark.parametrize("name", ["llama", "llama-linear-scaling", "gpt2"])
def test_other_models_have_no_factors(name: str) -> None:
    assert rope_factors(MODELS[name]()) is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("gpt2", {"activation_function": "gelu"}, "the activation 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention scaled otherwise"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of the kind 'yarn'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "a part of each head",
        ),
        ("qwen2", {"rope_parameters": LLAMA3}, "scaling of Llama 3 in 'qwen2'"),
        ("qwen2", {"head_dim": 32}, "4 heads of 32 in a width of 64"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    model = MODELS[name]()
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(ModelError, match=message):
        hyperparameters(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_metadata_fit_it(name: str) -> None:
    check_hyperparameters(*_file(name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Official files of Qwen leave these out, old ones of Llama more; llama.cpp fills them in.
        (
            "qwen2",
            {"key_length": None, "value_length": None, "dimension_count": None},
        ),
        ("llama", {"freq_base": None, "key_length": None, "value_length": None}),
        ("llama", {"context_length": 4096, "llama.vocab_size": 1}),
        ("llama", {"head_count_kv": [2, 2], "feed_forward_length": [96, 96]}),
        ("llama", {"layer_norm_rms_epsilon": 9.999999974752427e-07}),  # 1e-6 in float32
        ("llama", {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 3.0}),
        ("llama", {"llama.rope.scaling.type": "linear"}),
        ("llama-linear-scaling", {"type": None}),
        ("gpt2", {"feed_forward_length": 256}),  # the official converter takes 4 widths for granted
    ],
)
def test_metadata_with_the_same_effect_fit(name: str, changes: dict[str, Any]) -> None:
    check_hyperparameters(*_file(name, **changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"general.architecture": "qwen2"}, "architecture 'qwen2', but"),
        ("llama", {"freq_base": 5e5}, r"llama\.rope\.freq_base is 500000\.0 in the file, but 1"),
        ("llama", {"layer_norm_rms_epsilon": 1e-5}, "layer_norm_rms_epsilon is 1e-05"),
        ("llama", {"head_count": 8}, r"attention\.head_count is 8 in the file, but 4"),
        ("llama", {"head_count_kv": None}, "head_count_kv is 4 in the file, but 2"),
        ("llama", {"head_count_kv": [2, 4]}, "head_count_kv is"),
        ("llama", {"block_count": 3}, "block_count is 3"),
        ("llama-wide-heads", {"key_length": None}, "key_length is 16 in the file, but 32"),
        ("llama", {"llama.rope.scaling.factor": 2.0}, r"rope\.scaling\.type is 'linear'"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type is 'yarn'"),
        ("llama", {"llama.rope.scaling.attn_factor": 1.5}, r"attn_factor is 1\.5"),
        ("llama", {"llama.expert_count": 8}, "expert_count is 8"),
        ("llama-linear-scaling", {"factor": 2.0}, r"scaling\.factor is 2\.0"),
        ("gpt2", {"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small'"),
        ("llama", {"embedding_length": "wide"}, "embedding_length is 'wide'"),
    ],
)
def test_metadata_of_another_model_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_hyperparameters(*_file(name, **changes))
