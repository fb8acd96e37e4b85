"""KL of many models from one base model on the same tokens: the base's side is computed once.

With d = z_P - z_Q and any constant c,

    KL(P || Q) = log E_P[exp(c - d)] + E_P[d - c] = log(1 + E_P[exp(c - d) - 1]) + E_P[d - c],

in which nothing large cancels if c is E_P[d] but for its rounding, so that float32 is enough: equal
logits give exactly 0, and small divergences keep their digits. Rows whose logits are further apart
than exp() bears in float32 are compared in float64 as everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytest_qlab.metrics.divergence import compare_logits

# Rows x vocabulary x 4 bytes is about 1 MiB: what the elementwise passes read stays in the cache.
_BLOCK = 2**18
_FURTHEST = 40.0


class Anchor:
    """A base model's next-token distributions over T tokens.

    Args:
        logits: float32 (T, V), finite or -inf.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._p = torch.softmax(logits, dim=1)
        self._rows = max(1, _BLOCK // logits.shape[1])

    def kl(self, logits: Tensor) -> Tensor:
        """KL(base || other) of each token, nats, float64 (T,); `logits` are the other's (T, V).

        Raises:
            MetricError: the shapes differ, or a logit is NaN or +inf.
        """
        if logits.shape != self._logits.shape:
            return self._exactly(self._logits, logits)  # which says what is wrong
        rows = range(0, len(logits), self._rows)
        return torch.cat([self._block(slice(row, row + self._rows), logits) for row in rows])

    def _block(self, rows: slice, logits: Tensor) -> Tensor:
        p, gap = self._p[rows], self._logits[rows] - logits[rows]
        gap -= _mean(p, gap)[:, None].to(gap.dtype)
        if not bool(gap.abs().amax() < _FURTHEST):  # NaN, too: both may be -inf
            return self._exactly(self._logits[rows], logits[rows])
        rest = _mean(p, gap)
        return (torch.log1p(_mean(p, gap.neg_().expm1_())) + rest).clamp_min(0.0)

    @staticmethod
    def _exactly(base: Tensor, other: Tensor) -> Tensor:
        targets = torch.zeros(len(base), dtype=torch.long, device=base.device)
        return compare_logits(base, other, targets).kl.double()


def _mean(p: Tensor, values: Tensor) -> Tensor:
    """E_P of each row, float64."""
    return (p * values).sum(dim=1, dtype=torch.float64)
