"""SmoothQuant's scales: outliers of the inputs moved into the weights, as far as alpha says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-5


def smoothing_scale(weights: Sequence[Tensor], max_abs: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max_i|W_ij|^(1 - alpha), which inputs are divided by; float32 [n].

    Equation 4 of arXiv 2211.10438. As in the reference code, the weights' maxima and the scale are
    at least 1e-5.

    Args:
        weights: float32 (m, n) of all layers that read the inputs.
        max_abs: float32 [n], the greatest magnitude of each input channel.
        alpha: 0 makes the weights' columns even, 1 the inputs' channels.
    """
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    columns = columns.clamp(min=SMALLEST)
    scale: Tensor = (max_abs**alpha / columns ** (1 - alpha)).clamp(min=SMALLEST)
    return scale
