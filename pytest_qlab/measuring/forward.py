"""Run a causal language model over evaluation windows, and keep what predicts the scored tokens.

Final hidden states are all that is needed for logits, and are 8 to 70 times smaller. A model whose
logits cannot be made from them gives its logits instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.data.windows import Window
    from pytest_qlab.models.head import Head


def predict(head: Head, window: Window) -> Tensor:
    """What predicts a window's scored tokens, float32; position t predicts the token at t + 1.

    Args:
        head: of the model that is run.
        window: token ids, of which those from `first_scored` on are scored.

    Returns:
        Final hidden states [scored, hidden size], or where the head is not exact, logits
        [scored, vocabulary].
    """
    ids = torch.tensor([window.ids], device=head.weight.device)
    found = head.hidden(ids) if head.exact else head.full_logits(ids)
    return found[0, window.first_scored - 1 : -1].float()


def targets_of(window: Window) -> Tensor:
    """The scored tokens of a window, int64 [scored]."""
    return torch.tensor(window.ids[window.first_scored :])
