"""A two-layer model, a tokenizer of characters and a ten-line method: a comparison in milliseconds.

The model is a Llama with random weights: what is measured on it means nothing, but every path that
a real one takes is taken.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pytest_qlab.data.text import Document
from pytest_qlab.lab import Lab
from pytest_qlab.methods.base import Bits, Method, QuantizedLayer

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"
_SPECIAL = ("<s>", "</s>", "<pad>")


class ToyMethod(Method):
    """The least that a method is: each row is rounded to multiples of its own step."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "rows rounded to multiples of a step; for tests"

    bits: Bits = 4

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """Round a weight of shape (m, n)."""
        from pytest_qlab.methods.inputs import check_weight
        from pytest_qlab.solvers.grid import GridRule, round_to_nearest

        check_weight(weight, name)
        rule = GridRule(self.bits, symmetric=True)
        return QuantizedLayer(round_to_nearest(weight, rule, -1).pack())


def tiny_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A Llama with two layers, random weights, float32, in eval mode.

    Its vocabulary has a token for each of `LETTERS` and three more; hidden size 32, MLP 48, four
    heads that share two keys and values, a context of 64 tokens. `config` overrides.
    """
    shape: dict[str, Any] = {
        "vocab_size": len(LETTERS) + len(_SPECIAL),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape))
        for parameter in model.parameters():
            # Larger than for training, so that predictions differ and every weight matters.
            noise = torch.randn(parameter.shape)
            width = parameter.shape[-1] ** 0.5
            parameter.data = 1 + 0.2 * noise if parameter.dim() == 1 else noise / width
            parameter.requires_grad_(False)
    model.train(False)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `LETTERS`; all other characters are unknown to it."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=64,
    )


def tiny_documents(count: int = 6, seed: int = 0, length: int = 150) -> list[Document]:
    """Documents of random letters."""
    drawn = random.Random(seed)
    return [
        Document(f"{seed}-{number}", "noise", "".join(drawn.choices(LETTERS, k=length)))
        for number in range(count)
    ]


def tiny_lab(store: str | Path, **options: Any) -> Lab:
    """A `Lab` on `tiny_model` with six windows of text and eight calibration sequences.

    Args:
        store: a directory for what is measured, such as `tmp_path`.
        options: of `Lab`, which override these.
    """
    arguments: dict[str, Any] = {
        "evaluation": tiny_documents(6, seed=1),
        "calibration": tiny_documents(8, seed=2),
        "window_length": 48,
        "calibration_length": 32,
        "threads": 1,
        **options,
    }
    if "model" not in options:
        arguments = {"model": tiny_model(), "tokenizer": tiny_tokenizer(), **arguments}
    return Lab(store=store, **arguments)


def save_tiny_model(directory: str | Path) -> Path:
    """Write `tiny_model` as a directory that `--qlab-model` takes; returns it."""
    path = Path(directory)
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
