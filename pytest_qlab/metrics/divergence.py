"""Two models' next-token distributions compared token by token, without their logits in memory.

Both heads run tile by tile over the vocabulary; running maxima and sums give the Kullback-Leibler
divergence, both negative log-likelihoods and both most likely tokens in one pass:

    KL(P || Q) = T / S_P - (m_P + ln S_P) + (m_Q + ln S_Q),
    S = sum of exp(z - m),  T = sum of exp(z_P - m_P) (z_P - z_Q),  m = max z.

Logits are float32, as the heads give them; everything after that is float64. The same call returns
the same bits. Another tile size may change the last bits, because the matrix product then sums in
another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pytest_qlab.errors import MetricError
from pytest_qlab.finite import is_finite

# Rows x columns x 8 bytes is 1 MiB: what the elementwise passes read stays in the cache.
_ROWS, _CPU_TILE, _DEVICE_TILE = 256, 512, 8192
# Rounding of float64 sums; a divergence below minus this share of its terms is a defect.
_ROUNDING = 1e-10


class Head(Protocol):
    """What turns final hidden states into logits, a range of the vocabulary at a time."""

    @property
    def vocabulary(self) -> int:
        """How many tokens get a logit."""
        ...

    def logits_tile(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Float32 logits (T, stop - start) of tokens start..stop-1 from hidden states (T, d)."""
        ...


class DenseHead:
    """A linear head, with an optional logit scale and soft-cap.

    logits = cap * tanh(z / cap) with z = scale * (hidden @ weight^T + bias); without a soft-cap, z.

    Args:
        weight: (rows, d). bias: (rows,) or None.
        vocabulary: how many of the rows are real tokens; all by default. Padded rows must be left
            out, because a softmax over them is another distribution.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        *,
        vocabulary: int | None = None,
    ) -> None:
        self._weight, self._bias = weight, bias
        self._scale, self._softcap = scale, softcap
        self._vocabulary = weight.shape[0] if vocabulary is None else vocabulary

    @property
    def vocabulary(self) -> int:
        """How many tokens get a logit."""
        return self._vocabulary

    def logits_tile(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Float32 logits (T, stop - start)."""
        logits = hidden.float() @ self._weight[start:stop].float().T
        if self._bias is not None:
            logits += self._bias[start:stop].float()
        if self._scale != 1.0:
            logits *= self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


@dataclass(frozen=True)
class TokenComparison:
    """What two models say about the same T tokens; all of shape (T,), float32 unless said.

    Attributes:
        base_nll, candidate_nll: negative log-likelihood of the target, nats.
        kl: KL(base || candidate), nats; exactly 0 where the logits are equal.
        agree: bool, whether the most likely tokens are the same; of tied ones the first counts.
        base_top, candidate_top: probability of each model's most likely token.
    """

    base_nll: Tensor
    candidate_nll: Tensor
    kl: Tensor
    agree: Tensor
    base_top: Tensor
    candidate_top: Tensor


@dataclass(frozen=True)
class HiddenComparison:
    """How far hidden states moved; all of shape (T,), float32.

    Attributes:
        signal: sum of h^2; error: sum of (h - h')^2; cosine: of the angle between h and h'.
    """

    signal: Tensor
    error: Tensor
    cosine: Tensor


class _Distribution:
    """Running log-sum-exp, most likely token and target's logit of T rows."""

    def __init__(self, targets: Tensor, name: str) -> None:
        self._targets, self.name = targets, name
        rows = targets.shape[0]
        self.top = torch.full((rows,), -torch.inf, dtype=torch.float64, device=targets.device)
        self.best = torch.zeros(rows, dtype=torch.long, device=targets.device)
        self._sum = torch.zeros_like(self.top)
        self._target_logit = torch.full_like(self.top, -torch.inf)

    def add(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take in a tile of float64 logits (T, t).

        Returns:
            exp(logits - max so far), and the factor by which sums over earlier tiles shrink.
        """
        tile_top, tile_best = logits.max(dim=1)  # NaN and +inf come through
        _check_logits(tile_top, self.name)
        better = tile_top > self.top
        self.best = torch.where(better, tile_best + start, self.best)
        top = torch.maximum(self.top, tile_top)
        # Where every logit so far is -inf (masked), subtracting 0 keeps exp() at 0, not NaN.
        shift = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        shrink = torch.exp(self.top - shift)
        weights = torch.exp(logits - shift[:, None])
        self._sum = self._sum * shrink + weights.sum(dim=1)
        self.top = top
        inside = (self._targets >= start) & (self._targets < start + logits.shape[1])
        column = (self._targets - start).clamp(0, logits.shape[1] - 1)
        picked = logits.gather(1, column[:, None])[:, 0]
        self._target_logit = torch.where(inside, picked, self._target_logit)
        return weights, shrink

    @property
    def sum(self) -> Tensor:
        """Sum of exp(z - max)."""
        return self._sum

    @property
    def log_normalizer(self) -> Tensor:
        """log-sum-exp of the logits."""
        return self.top + self._sum.log()

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the targets, nats."""
        return self.log_normalizer - self._target_logit


def compare_hidden(
    base_hidden: Tensor,
    candidate_hidden: Tensor,
    base_head: Head,
    candidate_head: Head,
    targets: Tensor,
    *,
    tile: int | None = None,
) -> TokenComparison:
    """Compare two models from their final hidden states, (T, d) each; needs O(T + tile) memory.

    Args:
        targets: int64 (T,), the token that followed.
        tile: how many tokens of the vocabulary at a time; by default what suits the device.

    Raises:
        MetricError: vocabularies or lengths differ, a target is outside the vocabulary, a logit is
            NaN or +inf, or all logits of a token are -inf.
    """
    vocabulary = base_head.vocabulary
    if candidate_head.vocabulary != vocabulary:
        raise _vocabulary_error(vocabulary, candidate_head.vocabulary)
    _check_targets(base_hidden.shape[0], candidate_hidden.shape[0], targets, vocabulary)
    on_cpu = base_hidden.device.type == "cpu"
    width = tile or (_CPU_TILE if on_cpu else _DEVICE_TILE)
    rows = _ROWS if on_cpu else len(targets)
    blocks = zip(
        _blocks(base_hidden, rows),
        _blocks(candidate_hidden, rows),
        _blocks(targets.to(base_hidden.device), rows),
        strict=True,
    )
    return join_comparisons(
        [_compare(*block, base_head, candidate_head, width) for block in blocks]
    )


def _compare(
    base_hidden: Tensor,
    candidate_hidden: Tensor,
    targets: Tensor,
    base_head: Head,
    candidate_head: Head,
    width: int,
) -> TokenComparison:
    base, candidate = _Distribution(targets, "baseline"), _Distribution(targets, "candidate")
    weighted = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    for start in range(0, base_head.vocabulary, width):
        stop = min(start + width, base_head.vocabulary)
        z_base = base_head.logits_tile(base_hidden, start, stop).double()
        z_candidate = candidate_head.logits_tile(candidate_hidden, start, stop).double()
        weights, shrink = base.add(z_base, start)
        candidate.add(z_candidate, start)
        # Tokens the baseline gives no probability contribute nothing, whatever the logits.
        terms = (z_base - z_candidate).mul_(weights).masked_fill_(weights == 0, 0.0)
        earlier = torch.where(shrink == 0, torch.zeros_like(weighted), weighted * shrink)
        weighted = earlier + terms.sum(dim=1)
    return _summary(base, candidate, weighted / base.sum)


def _summary(base: _Distribution, candidate: _Distribution, mean_gap: Tensor) -> TokenComparison:
    for side in (base, candidate):
        if bool((side.sum == 0).any()):
            raise _all_masked(side.name)
    kl = mean_gap - base.log_normalizer + candidate.log_normalizer
    scale = 1 + mean_gap.abs() + base.log_normalizer.abs() + candidate.log_normalizer.abs()
    return TokenComparison(
        base_nll=base.nll.float(),
        candidate_nll=candidate.nll.float(),
        kl=_clamped(kl, scale),
        agree=base.best == candidate.best,
        base_top=base.sum.reciprocal().float(),
        candidate_top=candidate.sum.reciprocal().float(),
    )


def _clamped(kl: Tensor, scale: Tensor) -> Tensor:
    """Set to 0 what is negative by rounding; anything more negative is an error."""
    if bool((kl < -_ROUNDING * scale).any()):
        raise MetricError(
            f"A divergence of {float(kl.min()):.3g} nats was computed, and none can be negative. "
            "The heads' logits are not the same in two calls; run on a deterministic backend."
        )
    return kl.clamp_min(0.0).float()


def compare_logits(base: Tensor, candidate: Tensor, targets: Tensor) -> TokenComparison:
    """Compare two models from whole logits, (T, V) each: by log-softmax in float64.

    For heads that cannot run tile by tile.

    Raises:
        MetricError: as `compare_hidden`.
    """
    if base.shape[1] != candidate.shape[1]:
        raise _vocabulary_error(base.shape[1], candidate.shape[1])
    _check_targets(base.shape[0], candidate.shape[0], targets, base.shape[1])
    for name, logits in (("baseline", base), ("candidate", candidate)):
        top = logits.amax(dim=1)
        _check_logits(top, name)
        if bool(torch.isneginf(top).any()):
            raise _all_masked(name)
    parts = []
    for p_logits, q_logits, target in zip(
        _blocks(base, _ROWS),
        _blocks(candidate, _ROWS),
        _blocks(targets.to(base.device), _ROWS),
        strict=True,
    ):
        log_p = torch.log_softmax(p_logits.double(), dim=1)
        log_q = torch.log_softmax(q_logits.double(), dim=1)
        p = log_p.exp()
        terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0)
        # The terms cancel to the divergence; they and the logits bound the rounding.
        size = p_logits.double().nan_to_num(neginf=0.0).abs().amax(dim=1)
        kl = _clamped(terms.sum(dim=1), 1 + terms.abs().sum(dim=1) + size)
        parts.append(
            TokenComparison(
                base_nll=-log_p.gather(1, target[:, None])[:, 0].float(),
                candidate_nll=-log_q.gather(1, target[:, None])[:, 0].float(),
                kl=kl,
                agree=p_logits.max(dim=1).indices == q_logits.max(dim=1).indices,
                base_top=log_p.amax(dim=1).exp().float(),
                candidate_top=log_q.amax(dim=1).exp().float(),
            )
        )
    return join_comparisons(parts)


def compare_states(base_hidden: Tensor, candidate_hidden: Tensor) -> HiddenComparison:
    """Signal, error and cosine of each token's hidden states, (T, d) each, from float64 sums.

    The cosine is 1 where both are zero, and 0 where one is.

    Raises:
        MetricError: the shapes differ, or a value is not finite.
    """
    if base_hidden.shape != candidate_hidden.shape:
        raise MetricError(
            f"Hidden states of shapes {tuple(base_hidden.shape)} and "
            f"{tuple(candidate_hidden.shape)} cannot be compared; both models must run over the "
            "same tokens and have the same width."
        )
    parts = []
    for base, candidate in zip(
        _blocks(base_hidden, _ROWS), _blocks(candidate_hidden, _ROWS), strict=True
    ):
        h, other = base.double(), candidate.double()
        for name, values in (("baseline", h), ("candidate", other)):
            if not is_finite(values):
                raise _not_finite(f"hidden states of the {name}")
        signal, moved = h.square().sum(dim=1), other.square().sum(dim=1)
        length = (signal * moved).sqrt()
        cosine = (h * other).sum(dim=1) / torch.where(length > 0, length, torch.ones_like(length))
        cosine = torch.where((signal == 0) & (moved == 0), torch.ones_like(cosine), cosine)
        same = (h == other).all(dim=1)  # exactly 1 for a copy, whatever sqrt() rounds to
        cosine = torch.where(same, torch.ones_like(cosine), cosine.clamp(-1.0, 1.0))
        error = (h - other).square().sum(dim=1)
        parts.append(HiddenComparison(signal.float(), error.float(), cosine.float()))
    return HiddenComparison(
        torch.cat([part.signal for part in parts]),
        torch.cat([part.error for part in parts]),
        torch.cat([part.cosine for part in parts]),
    )


def _blocks(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def join_comparisons(parts: list[TokenComparison]) -> TokenComparison:
    """Comparisons of consecutive tokens as one."""
    if len(parts) == 1:
        return parts[0]
    names = TokenComparison.__dataclass_fields__
    return TokenComparison(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


def _check_targets(base: int, candidate: int, targets: Tensor, vocabulary: int) -> None:
    if not base == candidate == len(targets) or base == 0:
        raise MetricError(
            f"The baseline has {base} positions, the candidate {candidate}, and there are "
            f"{len(targets)} targets. All must be the same number, at least 1: run both models "
            "over the same tokens."
        )
    if int(targets.min()) < 0 or int(targets.max()) >= vocabulary:
        raise MetricError(
            f"A target token is outside the head's vocabulary of {vocabulary} tokens: ids range "
            f"from {int(targets.min())} to {int(targets.max())}. The tokenizer does not belong to "
            "this model."
        )


def _check_logits(top: Tensor, name: str) -> None:
    """Refuse NaN and +inf among the rows' maxima; -inf is allowed, it masks a token."""
    if bool((torch.isnan(top) | torch.isposinf(top)).any()):
        raise _not_finite(f"logits of the {name}")


def _not_finite(what: str) -> MetricError:
    return MetricError(
        f"The {what} contain NaN or infinity, so nothing can be said about its quality. Evaluate "
        "in float32 (--qlab-dtype=float32); if that does not help, the weights are damaged or the "
        "quantization has overflowed."
    )


def _all_masked(name: str) -> MetricError:
    return MetricError(
        f"All logits that the {name} gives for some token are minus infinity, so there is no "
        "distribution to compare. Check the model's head and its logit processors."
    )


def _vocabulary_error(base: int, candidate: int) -> MetricError:
    return MetricError(
        f"The baseline's head has {base} tokens and the candidate's {candidate}. Distributions "
        "over different vocabularies cannot be compared: use a candidate made from this model, "
        "or cut both heads to the tokenizer's real vocabulary."
    )
