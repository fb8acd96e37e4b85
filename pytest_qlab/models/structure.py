"""Where the linear layers of a causal language model are, whatever its architecture.

Everything is found from the modules themselves: decoder blocks are the `ModuleList` that holds
the layers, quantizable are the `nn.Linear` and GPT-2 `Conv1D` modules inside them, and routers of
a mixture of experts are told apart by where they stand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pytest_qlab.errors import ModelError

_ROUTER_CLASS = re.compile(r"router|top_?k|gating", re.IGNORECASE)
_EXPERTS = re.compile(r"(^|_)experts$")


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One weight matrix and where it stands in the model.

    Attributes:
        name: dotted name in the model.
        module: an `nn.Linear`, a `Conv1D`, or a router that holds a two-dimensional `weight`.
        parent: the module that holds it.
        attribute: its name in the parent.
    """

    name: str
    module: nn.Module
    parent: nn.Module
    attribute: str

    @property
    def transposed(self) -> bool:
        """Whether the stored weight is (in_features, out_features), as in GPT-2's Conv1D."""
        return _is_conv1d(self.module)

    @property
    def stored(self) -> Tensor:
        """The parameter itself, in its own layout and dtype."""
        return self.module.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias parameter of shape (out_features,), or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def out_features(self) -> int:
        """Rows of the weight matrix."""
        return int(self.stored.shape[1 if self.transposed else 0])

    @property
    def in_features(self) -> int:
        """Columns of the weight matrix."""
        return int(self.stored.shape[0 if self.transposed else 1])

    def weight(self) -> Tensor:
        """A float32 copy of the weight, (out_features, in_features), contiguous."""
        weight = self.stored.detach()
        if self.transposed:
            weight = weight.t()
        return weight.to(torch.float32, copy=True).contiguous()

    def set_weight(self, weight: Tensor) -> None:
        """Overwrite the weight with one of shape (out_features, in_features)."""
        if weight.shape != (self.out_features, self.in_features):
            raise ModelError(
                f"{self.name} holds a weight of shape {(self.out_features, self.in_features)}, "
                f"but was given one of shape {tuple(weight.shape)}."
            )
        with torch.no_grad():
            self.stored.copy_(weight.t() if self.transposed else weight)

    def replace(self, model: nn.Module, new_module: nn.Module) -> None:
        """Put `new_module` at this site's name in `model` (this model or a copy of it)."""
        parent, _, attribute = self.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new_module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a plain weight matrix, perhaps adds a bias, and no more."""
    kind: Any = type(module)
    return (isinstance(module, nn.Linear) and _is_plain(kind)) or _is_conv1d(module)


@cache
def _is_plain(kind: Any) -> bool:
    """Whether a class of linear layers computes what `nn.Linear` does.

    Some compute it in another way, as Falcon's, and some something else, as the block-diagonal
    projection of DeepSeek V4: one that has a forward of its own is tried on a few numbers.
    """
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            tried, inputs = kind(3, 2).to(torch.float32), torch.randn(1, 4, 3)
            found = tried(inputs)
            expected = nn.functional.linear(inputs, tried.weight, tried.bias)
    except Exception:  # its constructor or its forward wants something else
        return False
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D; by name, because importing it takes seconds."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
    return "transformers.pytorch_utils.Conv1D" in kinds


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers in order, with their dotted names.

    Of all outermost module lists that hold linear layers, the one inside the decoder with as many
    members as the configuration says is taken, else the one with the most linear weights.

    Raises:
        ModelError: no module list holds linear layers.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if config is not None else None
    expected = getattr(text_config, "num_hidden_layers", None)
    find = getattr(model, "get_decoder", None)
    decoder: nn.Module = (find() if callable(find) else None) or model
    inside = {id(module) for module in decoder.modules()}

    candidates: list[tuple[tuple[bool, bool, int], str, nn.ModuleList]] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{o}.") for o in outer):
            continue
        linears = [m for m in module.modules() if is_linear(m)]
        if not linears:
            continue
        outer.append(name)
        size = sum(m.get_parameter("weight").numel() for m in linears)
        candidates.append(((id(module) in inside, len(module) == expected, size), name, module))
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder layers with linear layers inside, so "
            "there is nothing to quantize. Give a causal language model whose blocks are in a "
            "torch.nn.ModuleList."
        )
    _, name, blocks = max(candidates, key=lambda candidate: candidate[0])
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


def quantizable_linears(block: nn.Module, prefix: str = "") -> list[LinearSite]:
    """Linear layers of a block in model order, without its routers.

    Args:
        block: a decoder layer.
        prefix: its dotted name in the model, put before every site's name.
    """
    names = {site.name for site in routers(block, prefix)}
    sites = [_site(block, name, prefix) for name, m in block.named_modules() if is_linear(m)]
    return [site for site in sites if site.name not in names]


def routers(block: nn.Module, prefix: str = "") -> list[LinearSite]:
    """Weight matrices that choose or weigh experts: never quantized, but part of norm folds.

    These are modules of another class that hold a two-dimensional `weight` of their own, and
    linear layers that are a router, stand inside one or, as gates with one output for each expert
    or one in all, beside a list of experts.
    """
    found = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            if _is_router(block, name, module):
                found.append(_site(block, name, prefix))
        elif not isinstance(module, nn.Embedding):
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2:
                found.append(_site(block, name, prefix))
    return found


def all_linears(model: nn.Module) -> list[LinearSite]:
    """The quantizable linear layers of all decoder blocks, in model order."""
    return [
        site for name, block in decoder_blocks(model) for site in quantizable_linears(block, name)
    ]


def _site(block: nn.Module, name: str, prefix: str) -> LinearSite:
    parent, _, attribute = name.rpartition(".")
    full = f"{prefix}.{name}" if prefix else name
    return LinearSite(full, block.get_submodule(name), block.get_submodule(parent), attribute)


def _is_router(block: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear layer of a block, at `name` in it, is a router."""
    parts = name.split(".")
    if "router" in parts:
        return True
    for depth in range(1, len(parts) + 1):
        if _ROUTER_CLASS.search(type(block.get_submodule(".".join(parts[:depth]))).__name__):
            return True
    parent = block.get_submodule(".".join(parts[:-1]))
    outputs = int(module.get_parameter("weight").shape[0])
    for child_name, child in parent.named_children():
        if _EXPERTS.search(child_name):
            count = getattr(child, "num_experts", None)
            if count is None:
                count = len(child) if isinstance(child, nn.ModuleList) else 0
            if outputs in (1, count):
                return True
    return False
