"""The output head: final hidden states, and logits from them without running the model again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_qlab.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Transform = Callable[[Tensor], Tensor]
_TOLERANCE = 1e-5
_capturing = threading.Lock()


@dataclass(frozen=True, eq=False)
class Head:
    """The last step of a causal language model: from final hidden states to logits.

    Attributes:
        model: the model it belongs to.
        weight: (vocabulary, hidden), in the model's dtype; not to be changed.
        bias: (vocabulary,) or None.
        scale: factor that the model puts on its logits.
        soft_cap: bound c of `c * tanh(logits / c)`, applied after the factor, or None.
        exact: whether `logits_from_hidden` was found to give the model's logits. If not, callers
            take the logits of a full forward (`full_logits`).
        backbone: whether the final hidden states come from the model without its head.
    """

    model: PreTrainedModel
    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None
    exact: bool
    backbone: bool

    def transform(self, logits: Tensor) -> Tensor:
        """What the model does to each logit after the matrix product (elementwise)."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits

    def logits_from_hidden(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Float32 logits (..., stop - start) of vocabulary entries, from hidden states (..., d)."""
        bias = self.bias[start:stop] if self.bias is not None else None
        logits = F.linear(hidden.to(self.weight.dtype), self.weight[start:stop], bias)
        return self.transform(logits.float())

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Final hidden states (batch, tokens, d), the head's input; safe in several threads."""
        with torch.no_grad():
            if self.backbone:
                return _run_backbone(self.model, input_ids)
            with _capturing:  # hooks are the module's: one thread at a time
                return _capture(self.model, head_module(self.model), input_ids)[0]

    def full_logits(self, input_ids: Tensor) -> Tensor:
        """Float32 logits (batch, tokens, vocabulary) of a full forward."""
        with torch.no_grad():
            return _logits(self.model, input_ids).float()


def head_of(model: PreTrainedModel) -> Head:
    """Find the head of a model and check it on a forward over a few tokens.

    Raises:
        ModelError: the model has no output embeddings.
    """
    module = head_module(model)
    weight, bias = matrix_of(module)
    ids = torch.tensor([probe_of(weight.shape[0])], device=weight.device)
    with torch.no_grad():
        hidden, raw, logits = _capture(model, module, ids)
        backbone = False
        if isinstance(model.base_model, nn.Module) and model.base_model is not model:
            try:
                alone = _run_backbone(model, ids)
                backbone = alone.shape == hidden.shape and bool((alone == hidden).all())
            except (AttributeError, TypeError, ValueError):
                backbone = False
    raw, logits = raw.float(), logits.float()
    tolerance = _TOLERANCE if weight.dtype == torch.float32 else 2e-2
    for scale, soft_cap in _transforms(model, raw, logits):
        head = Head(model, weight, bias, scale, soft_cap, True, backbone)
        computed = head.logits_from_hidden(hidden)
        if computed.shape == logits.shape and _close(computed, logits, tolerance):
            return head
    return Head(model, weight, bias, 1.0, None, False, backbone)


def matrix_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a model's output embeddings."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias = getattr(module, "bias", None)
    return weight, bias if isinstance(bias, Tensor) else None


def probe_of(vocabulary: int) -> list[int]:
    """The token ids that `head_of` runs a model with that many on."""
    return list(range(min(8, vocabulary)))


def _transforms(
    model: PreTrainedModel, raw: Tensor, logits: Tensor
) -> list[tuple[float, float | None]]:
    """Likely (scale, soft cap) pairs: none, those of the configuration, a constant ratio."""
    config = model.config.get_text_config(decoder=True)
    caps: list[float | None] = [None]
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        caps.insert(0, float(cap))
    scales = [1.0]
    factor = getattr(config, "logit_scale", None)
    if factor:
        scales.append(float(factor))
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        scales.append(1 / float(divisor))
    if raw.shape == logits.shape and bool((raw != 0).any()):
        scales.append(float((raw * logits).sum() / (raw * raw).sum()))
    return [(scale, soft_cap) for soft_cap in caps for scale in scales]


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-9))


def head_module(model: PreTrainedModel) -> nn.Module:
    """The output embeddings.

    Raises:
        ModelError: there are none.
    """
    module: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise ModelError(
            f"{type(model).__name__} has no output embeddings (a language model head), so its "
            "tokens cannot be scored. Give a causal language model."
        )
    return module


def _logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _run_backbone(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def _capture(
    model: PreTrainedModel, module: nn.Module, input_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of the head, and the model's logits, of one forward in this thread."""
    thread = threading.get_ident()
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if threading.get_ident() == thread:
            seen.append((inputs[0], output))

    handle = module.register_forward_hook(hook)
    try:
        logits = _logits(model, input_ids)
    finally:
        handle.remove()
    if not seen:
        raise ModelError(
            f"{type(model).__name__} computes its logits without calling its output embeddings, "
            "so its final hidden states cannot be captured. Give another model."
        )
    return (*seen[-1], logits)
