"""Attribution by brute force: a model with one layer's weights written into it, run as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_qlab import Lab
from pytest_qlab.checkpoint import Checkpoint


def naive_kl(base: Tensor, other: Tensor) -> Tensor:
    """Sum over the vocabulary of p (log p - log q), float64, of logits (T, V)."""
    log_p, log_q = base.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def mean_kl(base: Any, other: Any, windows: Sequence[Any]) -> float:
    """Over all scored tokens of some windows, from plain forwards of both models."""
    found = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window.ids])
            rows = slice(window.first_scored - 1, len(window.ids) - 1)
            logits = [m(input_ids=ids, use_cache=False).logits[0, rows] for m in (base, other)]
            found.append(naive_kl(*logits))
    return float(torch.cat(found).mean())


def with_one_layer(lab: Lab, checkpoint: Checkpoint, name: str) -> Any:
    """The base model with the quantized weight in the layer, by hand, and its inputs rounded.

    A fold has quantized diag(1 / row) W diag(column) for inputs divided by `column`; both are taken
    back on the weight, and inputs are rounded as the quantized layer would see them.
    """
    model = copy.deepcopy(lab.base_model)
    layer = checkpoint.layers()[name]
    scales = checkpoint.scales().get(name, {})
    rows, columns = layer.weight.shape
    row, column = scales.get("row", torch.ones(rows)), scales.get("column", torch.ones(columns))
    weight = layer.weight.dequantize() * row[:, None] / column[None, :]
    module = model.get_submodule(name)
    transposed = type(module).__name__ == "Conv1D"
    with torch.no_grad():
        module.weight.copy_(weight.T if transposed else weight)
    activation = layer.activation
    if activation is not None:
        module.register_forward_pre_hook(
            lambda _, args: (activation(args[0] / column) * column, *args[1:])
        )
    return model
