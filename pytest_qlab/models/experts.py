"""Mixtures of experts as transformers 5 keeps them: one fused parameter for all experts.

Quantization works on one matrix for each expert, so the fused module is replaced by an equal one
with a linear layer for each, and the replacement is checked on random inputs.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytest_qlab.errors import ModelError

_local = threading.local()


@contextmanager
def every_expert_reached() -> Iterator[None]:
    """Within, each expert in this thread sees every token, with an equal share added to its weight.

    The function is another than the model's, but has the same folds, and all experts take part.
    """
    before = getattr(_local, "dense", False)
    _local.dense = True
    try:
        yield
    finally:
        _local.dense = before


class Expert(nn.Module):
    """One expert's matrices: `gate_proj` (if it is gated), `up_proj`, `down_proj`."""

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        if gate is not None:
            self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down
        self.gated = gate is not None


class UnfusedExperts(nn.ModuleList):
    """The experts of one layer, each with its own linear layers; a list of `Expert`.

    Args:
        fused: a module with `gate_up_proj` (or `up_proj`) and `down_proj` of three dimensions. Its
            parameters are moved out of it; what is left of it supplies the activation.
    """

    def __init__(self, fused: nn.Module) -> None:
        experts, interleaved, gated = _split(fused)
        super().__init__(experts)
        for name in list(fused._parameters):
            del fused._parameters[name]
        self._rest: list[Any] = [fused]  # in a list: no part of the module tree
        self.interleaved = interleaved
        self.gated = gated

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return len(self)

    def expert(self, index: int, states: Tensor) -> Tensor:
        """One expert's output for hidden states of shape (tokens, hidden)."""
        expert: Any = self[index]
        up = expert.up_proj(states)
        if not self.gated:
            hidden = self._rest[0].act_fn(up)
        else:
            gate = expert.gate_proj(states)
            if self.interleaved:
                both = torch.stack([gate, up], dim=-1).flatten(-2)
            else:
                both = torch.cat([gate, up], dim=-1)
            hidden = self._gated(both)
        output: Tensor = expert.down_proj(hidden)
        return output

    def _gated(self, both: Tensor) -> Tensor:
        hidden: Tensor = self._rest[0]._apply_gate(both)
        return hidden

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, of shape (tokens, hidden)."""
        result = torch.zeros_like(hidden_states)
        dense = getattr(_local, "dense", False)
        for index in range(len(self)):
            chosen = top_k_index == index
            if dense:
                weights = (top_k_weights * chosen).sum(-1, keepdim=True) + 1 / len(self)
                result += (self.expert(index, hidden_states) * weights).to(result.dtype)
                continue
            token, position = torch.where(chosen)
            if len(token) == 0:
                continue
            output = self.expert(index, hidden_states[token])
            output = output * top_k_weights[token, position, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result


class SortedExperts(UnfusedExperts):
    """Experts that are given all tokens once for each of them, scaled, as Llama 4's.

    A token that an expert was not chosen for is zeros there, and so is what becomes of it: the
    expert's layers see the others alone.
    """

    def _gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        hidden: Tensor = self._rest[0].act_fn(gate) * up
        return hidden

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Outputs of the experts, one after the other, for states (experts * tokens, hidden)."""
        parts = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        shared = parts.sum(0) / len(self) if getattr(_local, "dense", False) else None
        outputs = []
        for index, states in enumerate(parts):
            if shared is not None:
                outputs.append(self.expert(index, states + shared))
                continue
            (chosen,) = torch.where(states.any(-1))
            output = torch.zeros_like(states)
            if len(chosen):
                output = output.index_add(0, chosen, self.expert(index, states[chosen]))
            outputs.append(output)
        return torch.cat(outputs)


def _is_sorted(fused: nn.Module) -> bool:
    """Whether it takes hidden states alone: which expert sees which is said by where they are."""
    return len(inspect.signature(fused.forward).parameters) == 1


def _is_transposed(fused: nn.Module) -> bool:
    """Whether a matrix is (in_features, out_features)."""
    return bool(getattr(fused, "is_transposed", _is_sorted(fused)))


def is_fused(module: nn.Module) -> bool:
    """Whether a module keeps the matrices of several experts in parameters of three dimensions."""
    named = "Expert" in type(module).__name__ or "down_proj" in module._parameters
    return named and any(p is not None and p.dim() == 3 for p in module._parameters.values())


def unfuse_experts(model: nn.Module, *, check: bool = True) -> int:
    """Replace every fused experts module of `model`, in place; return how many there were.

    Args:
        check: compare outputs, which takes parameters with values.

    Raises:
        ModelError: the experts compute something this module does not know how to reproduce.
    """
    names = [name for name, module in model.named_modules() if is_fused(module)]
    for name in names:
        fused = model.get_submodule(name)
        try:
            probe = _probe(fused) if check else None
            with torch.no_grad():
                expected = None if probe is None else fused(*probe)
                experts = (SortedExperts if _is_sorted(fused) else UnfusedExperts)(fused)
                same = probe is None or _close(experts(*probe), expected)
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError) as error:
            raise _unknown(name, fused, str(error)) from error
        if not same:
            raise _unknown(name, fused, "the outputs differ")
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, experts)
    return len(names)


def _unknown(name: str, fused: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"The experts at {name} ({type(fused).__name__}) could not be split into one set of linear "
        f"layers for each expert ({reason}), so they cannot be quantized as asked. Mixtures whose "
        "experts compute down(activation(gate(x)) * up(x)) are understood; give another model."
    )


def _split(fused: nn.Module) -> tuple[list[Expert], bool, bool]:
    """The experts' matrices; whether gate and up rows alternate; whether there is a gate at all."""
    parameters = fused._parameters
    transposed = _is_transposed(fused)
    gated = "gate_up_proj" in parameters
    first = "gate_up_proj" if gated else "up_proj"
    interleaved = gated and not getattr(fused, "is_concatenated", True)
    upper, lower = parameters[first], parameters["down_proj"]
    assert upper is not None
    assert lower is not None
    upper_bias, lower_bias = parameters.get(f"{first}_bias"), parameters.get("down_proj_bias")
    experts = []
    for index in range(len(lower)):
        matrix = upper[index].t() if transposed else upper[index]
        bias = upper_bias[index] if upper_bias is not None else None
        gate = None
        if gated:
            half = matrix.shape[0] // 2
            rows = slice(0, None, 2) if interleaved else slice(0, half)
            gate = _linear(matrix[rows], bias[rows] if bias is not None else None)
            rows = slice(1, None, 2) if interleaved else slice(half, None)
            matrix, bias = matrix[rows], bias[rows] if bias is not None else None
        down = lower[index].t() if transposed else lower[index]
        down_bias = lower_bias[index] if lower_bias is not None else None
        experts.append(Expert(gate, _linear(matrix, bias), _linear(down, down_bias)))
    return experts, interleaved, gated


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that owns a copy of `weight` (out_features, in_features)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _probe(fused: nn.Module) -> tuple[Tensor, ...]:
    """Random hidden states of 16 tokens, two experts for each, and their weights.

    Of sorted experts, the states of all experts, some of them zeros.
    """
    down = fused.get_parameter("down_proj")
    count, width = int(down.shape[0]), int(down.shape[2 if _is_transposed(fused) else 1])
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(16, width, generator=generator).to(down)
    if _is_sorted(fused):
        kept = torch.rand(count, 16, 1, generator=generator).to(down) < 0.7
        return ((states * kept).reshape(-1, width),)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(16)])
    weights = torch.rand(chosen.shape, generator=generator).to(down)
    return states, chosen.to(down.device), weights


def _close(actual: Tensor, expected: object) -> bool:
    if not isinstance(expected, Tensor):
        return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= tolerance * expected.float().norm())
