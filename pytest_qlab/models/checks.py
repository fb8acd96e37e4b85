"""What must hold of a model before it is measured: kind, vocabulary, causality, finite weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.errors import ModelError
from pytest_qlab.finite import is_finite
from pytest_qlab.models.experts import unfuse_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_causal(config: Mapping[str, Any], source: str, trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = config.get("model_type")
    custom = "AutoModelForCausalLM" in config.get("auto_map", {})
    if custom and trust_remote_code:
        return
    if not isinstance(model_type, str):
        raise ModelError(
            f"The config.json of the model {source!r} names no model_type, so it is not known "
            "which architecture it is. Give a model saved by transformers."
        )
    if model_type not in CONFIG_MAPPING:
        remedy = (
            "it comes with its own modelling code, which --qlab-trust-remote-code would run"
            if custom
            else "upgrade transformers if the model is newer than it, or give another model"
        )
        raise ModelError(
            f"The model {source!r} is of type {model_type!r}, which the installed transformers "
            f"does not know: {remedy}."
        )
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"The model {source!r} is of type {model_type!r}, which is not a causal language "
            "model: it cannot predict each token of a text from those before it. Give a model "
            "that AutoModelForCausalLM can load."
        )


def prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Put a model in the state that LoadedModel promises, and check it."""
    model.train(False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, value in model.named_parameters():
        check_finite(name, value, source)
    check_vocabulary(model, tokenizer, source)
    unfuse_experts(model)
    _check_no_look_ahead(model, source)


def check_finite(name: str, value: Tensor, source: str) -> None:
    """No value of a parameter may be NaN or infinite."""
    if not is_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        raise ModelError(
            f"The weights of the model {source!r} are not all finite: {name} holds {bad} "
            f"values that are NaN or infinite, of {value.numel()}. If it was saved in float16 "
            "it may have overflowed: save it in bfloat16 or float32, or download it again."
        )


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    """No ordinary token may lie outside the embedding; added special tokens are never produced."""
    rows = _embedding_rows(model)
    added = {
        index
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special
    }
    highest = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1)
    if highest >= rows:
        raise ModelError(
            f"The tokenizer of the model {source!r} has token ids up to {highest}, but the model's "
            f"embedding has only {rows} rows. The tokenizer belongs to another model: save the "
            "right one beside the weights, or resize the model's embeddings."
        )


def _check_no_look_ahead(model: PreTrainedModel, source: str) -> None:
    pair = look_ahead_pair(_embedding_rows(model))
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
            for ids in pair
        )
    check_causality(first, second, source, type(model).__name__)


def look_ahead_pair(rows: int) -> tuple[list[int], list[int]]:
    """Two sequences of 8 tokens that differ in the last, for `check_causality`."""
    ids = [place % rows for place in range(8)]
    return ids, [*ids[:-1], (ids[-1] + 1) % rows]


def check_causality(first: Tensor, second: Tensor, source: str, architecture: str) -> None:
    """Earlier logits must not depend on later tokens (an encoder loads as a causal model too).

    Args:
        first, second: logits (8, vocabulary) of the sequences of `look_ahead_pair`.

    Raises:
        ModelError: they differ there, or are not finite.
    """
    first, second = first[:-1], second[:-1]
    if not is_finite(first):
        raise ModelError(
            f"The model {source!r} computes logits that are not finite although its weights are. "
            "A wider dtype may help: --qlab-dtype=float32."
        )
    change, size = _norm(first - second), _norm(first)
    if change > (1e-3 if first.dtype == torch.float32 else 1e-2) * size:
        raise ModelError(
            f"The model {source!r} ({architecture}) is not a causal language model: its "
            "prediction for a token depends on the tokens after it. Give a decoder model, not an "
            "encoder such as BERT."
        )


def _embedding_rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().get_parameter("weight").shape[0])


def _norm(value: Tensor) -> float:
    return float(value.float().norm())
