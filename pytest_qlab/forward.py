"""Run a causal language model over evaluation windows, and keep what predicts the scored tokens.

Final hidden states are all that is needed for logits, and are 8 to 70 times smaller. A model whose
logits cannot be made from them gives its logits instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.data.windows import Window
    from pytest_qlab.models.head import Head


def predictions(head: Head, windows: Sequence[Window], *, threads: int) -> Iterator[Tensor]:
    """Yield, for each window, what predicts its scored tokens, float32.

    Args:
        head: of the model that is run.
        windows: token ids; position t predicts the token at t + 1.
        threads: windows that run at the same time.

    Yields:
        Final hidden states [scored, hidden size], or where the head is not exact, logits
        [scored, vocabulary].
    """
    device = head.weight.device

    def run(window: Window) -> Tensor:
        ids = torch.tensor([window.ids], device=device)
        found = head.hidden(ids) if head.exact else head.full_logits(ids)
        return found[0, window.first_scored - 1 : -1].float()

    return ordered_map(run, windows, threads)


def targets_of(window: Window) -> Tensor:
    """The scored tokens of a window, int64 [scored]."""
    return torch.tensor(window.ids[window.first_scored :])
