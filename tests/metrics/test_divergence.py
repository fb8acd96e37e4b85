"""Streaming divergence against a direct float64 computation in numpy and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.divergence import (
    DenseHead,
    TokenComparison,
    compare_hidden,
    compare_logits,
    compare_states,
)


class GivenLogits:
    """A head whose 'hidden states' are the logits themselves, so that any logits can be tested."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def logits_tile(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        return hidden[:, start:stop]


def tiled(base: Tensor, candidate: Tensor, targets: Tensor, tile: int | None) -> TokenComparison:
    head = GivenLogits(base.shape[1])
    return compare_hidden(base, candidate, head, head, targets, tile=tile)


def oracle(base: Tensor, candidate: Tensor, targets: Tensor) -> dict[str, NDArray[Any]]:
    """Log-softmax in numpy float64 and sums over the whole vocabulary."""
    found: dict[str, list[float]] = {"kl": [], "base_nll": [], "candidate_nll": [], "agree": []}
    found["base_top"] = []
    for p_row, q_row, target in zip(
        base.tolist(), candidate.tolist(), targets.tolist(), strict=True
    ):
        p_logits, q_logits = np.array(p_row), np.array(q_row)
        log_p = p_logits - p_logits.max() - math.log(np.exp(p_logits - p_logits.max()).sum())
        log_q = q_logits - q_logits.max() - math.log(np.exp(q_logits - q_logits.max()).sum())
        p = np.exp(log_p)
        used = p > 0
        found["kl"].append(float((p[used] * (log_p[used] - log_q[used])).sum()))
        found["base_nll"].append(float(-log_p[target]))
        found["candidate_nll"].append(float(-log_q[target]))
        found["agree"].append(float(p_logits.argmax() == q_logits.argmax()))
        found["base_top"].append(float(p.max()))
    return {name: np.array(values) for name, values in found.items()}


def logits(kind: str, tokens: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, vocabulary, generator=generator) * 4
    candidate = base + 0.1 * torch.randn(tokens, vocabulary, generator=generator)
    if kind == "offset":
        base, candidate = base + 1e4, candidate - 1e4
    elif kind == "spread":
        base, candidate = base * 100, candidate * 100
    elif kind == "masked":
        base[:, ::3] = candidate[:, ::3] = -torch.inf
    elif kind == "masked first tile":
        base[:, :11] = candidate[:, :11] = -torch.inf
    elif kind == "baseline masked":
        base[:, 5:9] = -torch.inf
    elif kind == "rising":  # every tile brings a new, far larger maximum
        ramp = torch.arange(vocabulary) * 300.0
        base, candidate = base + ramp, candidate + ramp
    elif kind == "falling":
        ramp = -torch.arange(vocabulary) * 300.0
        base, candidate = base + ramp, candidate + ramp
    return base, candidate


KINDS = [
    "plain",
    "offset",
    "spread",
    "masked",
    "masked first tile",
    "baseline masked",
    "rising",
    "falling",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "vocabulary", "tile"), [(6, 37, 10), (1, 12, 5), (3, 37, 64)])
def test_equals_the_direct_computation(kind: str, tokens: int, vocabulary: int, tile: int) -> None:
    base, candidate = logits(kind, tokens, vocabulary)
    likely = base.argmax(dim=1)
    expected = oracle(base, candidate, likely)
    for found in (tiled(base, candidate, likely, tile), compare_logits(base, candidate, likely)):
        for name, values in expected.items():
            assert getattr(found, name).numpy() == pytest.approx(values, rel=2e-6, abs=1e-9), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 70),
    tile=st.integers(1, 80),
    noise=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
)
def test_any_tile_gives_the_direct_result(
    seed: int, vocabulary: int, tile: int, noise: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(5, vocabulary, generator=generator) * 6
    candidate = base + noise * torch.randn(5, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (5,), generator=generator)
    expected = oracle(base, candidate, targets)
    found = tiled(base, candidate, targets, tile)
    for name, values in expected.items():
        assert getattr(found, name).numpy() == pytest.approx(values, rel=2e-6, abs=2e-9), name


def test_more_rows_than_a_block() -> None:
    base, candidate = logits("plain", 600, 20)
    targets = torch.arange(600) % 20
    expected = oracle(base, candidate, targets)
    for found in (tiled(base, candidate, targets, None), compare_logits(base, candidate, targets)):
        for name, values in expected.items():
            assert getattr(found, name).numpy() == pytest.approx(values, rel=2e-6, abs=1e-9), name


def test_two_outcomes_have_the_closed_form() -> None:
    p, q = 0.3, 0.55
    base = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)
    candidate = torch.tensor([[math.log(q), math.log(1 - q)]], dtype=torch.float64)
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    for found in (
        tiled(base, candidate, torch.tensor([0]), 1),
        compare_logits(base, candidate, torch.tensor([0])),
    ):
        assert float(found.kl[0]) == pytest.approx(expected, rel=1e-6)
        assert float(found.base_nll[0]) == pytest.approx(-math.log(p), rel=1e-6)
        assert float(found.candidate_nll[0]) == pytest.approx(-math.log(q), rel=1e-6)
        assert float(found.base_top[0]) == pytest.approx(1 - p, rel=1e-6)
        assert float(found.candidate_top[0]) == pytest.approx(q, rel=1e-6)
        assert not bool(found.agree[0])


def test_the_baseline_comes_first() -> None:
    """KL(P || Q) of a certain P is -ln q; of an uncertain P with a certain Q it is far more."""
    certain = torch.tensor([[50.0, 0.0]], dtype=torch.float64)
    open_ = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([0])
    assert float(tiled(certain, open_, target, 2).kl[0]) == pytest.approx(math.log(2), rel=1e-6)
    assert float(tiled(open_, certain, target, 2).kl[0]) == pytest.approx(
        25 - math.log(2), rel=1e-6
    )


def test_small_noise_limit_is_half_the_variance() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4, 300, generator=generator, dtype=torch.float64)
    noise = 1e-3 * torch.randn(4, 300, generator=generator, dtype=torch.float64)
    found = tiled(base, base + noise, torch.zeros(4, dtype=torch.long), 64)
    p = torch.softmax(base, dim=1)
    variance = (p * noise**2).sum(1) - (p * noise).sum(1) ** 2
    assert found.kl.numpy() == pytest.approx((variance / 2).numpy(), rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_diverge_by_exactly_nothing(kind: str) -> None:
    base, _ = logits(kind, 40, 53)
    targets = base.argmax(dim=1)
    for found in (tiled(base, base.clone(), targets, 7), compare_logits(base, base, targets)):
        assert found.kl.tolist() == [0.0] * 40
        assert torch.equal(found.base_nll, found.candidate_nll)
        assert bool(found.agree.all())


def test_a_shift_of_all_logits_changes_no_distribution() -> None:
    base, _ = logits("plain", 20, 53)
    found = tiled(base.double(), base.double() + 123.456, torch.zeros(20, dtype=torch.long), 9)
    assert float(found.kl.max()) < 1e-12


def test_of_tied_tokens_the_first_counts() -> None:
    base = torch.tensor([[1.0, 5.0, 0.0, 5.0, 5.0]] * 3)
    candidate = torch.tensor(
        [[1.0, 5.0, 0.0, 5.0, 2.0], [1.0, 4.0, 0.0, 5.0, 5.0], [0.0, 5.0, 5.0, 5.0, 5.0]]
    )
    targets = torch.zeros(3, dtype=torch.long)
    for tile in (1, 2, 5):
        assert tiled(base, candidate, targets, tile).agree.tolist() == [True, False, True]
    assert compare_logits(base, candidate, targets).agree.tolist() == [True, False, True]


def test_near_ties_are_told_apart() -> None:
    """One unit in the last place decides."""
    high = float(np.nextafter(np.float32(7), np.float32(8)))
    base = torch.tensor([[7.0, high, 0.0]])
    candidate = torch.tensor([[high, 7.0, 0.0]])
    found = tiled(base, candidate, torch.tensor([0]), 2)
    assert not bool(found.agree[0])
    assert 0 <= float(found.kl[0]) < 1e-12


def test_what_the_candidate_rules_out_diverges_without_bound() -> None:
    base, candidate = logits("plain", 2, 9)
    candidate[0, 4] = -torch.inf
    targets = torch.zeros(2, dtype=torch.long)
    for found in (tiled(base, candidate, targets, 4), compare_logits(base, candidate, targets)):
        assert float(found.kl[0]) == math.inf
        assert math.isfinite(float(found.kl[1]))


def test_a_vanishing_probability_that_the_candidate_rules_out_counts_nothing() -> None:
    base = torch.tensor([[0.0, 5000.0, 5001.0]])
    candidate = torch.tensor([[-torch.inf, 5000.0, 5001.0]])
    for tile in (1, 3):
        assert tiled(base, candidate, torch.tensor([1]), tile).kl.tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_no_numbers_are_refused(bad: float, side: int) -> None:
    pair = list(logits("plain", 4, 20))
    pair[side][2, 17] = bad
    targets = torch.zeros(4, dtype=torch.long)
    name = ("baseline", "candidate")[side]
    with pytest.raises(MetricError, match=f"logits of the {name} contain NaN"):
        tiled(pair[0], pair[1], targets, 6)
    with pytest.raises(MetricError, match=f"logits of the {name} contain NaN"):
        compare_logits(pair[0], pair[1], targets)


def test_a_token_without_any_possibility_is_refused() -> None:
    base, candidate = logits("plain", 4, 20)
    candidate[1] = -torch.inf
    targets = torch.zeros(4, dtype=torch.long)
    with pytest.raises(MetricError, match="All logits that the candidate"):
        tiled(base, candidate, targets, 6)
    with pytest.raises(MetricError, match="All logits that the candidate"):
        compare_logits(base, candidate, targets)


def test_different_vocabularies_are_refused() -> None:
    a, b = torch.zeros(1, 5), torch.zeros(1, 6)
    with pytest.raises(MetricError, match="5 tokens and the candidate's 6"):
        compare_hidden(a, b, GivenLogits(5), GivenLogits(6), torch.tensor([0]))
    with pytest.raises(MetricError, match="5 tokens and the candidate's 6"):
        compare_logits(a, b, torch.tensor([0]))


@pytest.mark.parametrize("target", [-1, 5])
def test_targets_outside_the_vocabulary_are_refused(target: int) -> None:
    with pytest.raises(MetricError, match="outside the head's vocabulary of 5"):
        tiled(torch.zeros(1, 5), torch.zeros(1, 5), torch.tensor([target]), None)


def test_lengths_must_agree() -> None:
    with pytest.raises(MetricError, match="baseline has 2 positions, the candidate 3"):
        tiled(torch.zeros(2, 5), torch.zeros(3, 5), torch.tensor([0, 0]), None)
    with pytest.raises(MetricError, match="at least 1"):
        tiled(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), None)


def test_a_dense_head_makes_the_logits_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(11, 6, generator=generator), torch.randn(11, generator=generator)
    hidden = torch.randn(3, 6, generator=generator)
    head = DenseHead(weight, bias, scale=0.25, softcap=2.0)
    expected = 2 * torch.tanh((hidden @ weight.T + bias) * 0.25 / 2)
    tiles = [head.logits_tile(hidden, start, min(start + 4, 11)) for start in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(tiles, dim=1), expected)
    plain = DenseHead(weight.bfloat16())
    assert plain.logits_tile(hidden.bfloat16(), 0, 11).dtype == torch.float32
    assert DenseHead(weight, vocabulary=9).vocabulary == 9


def test_a_soft_cap_and_a_cut_vocabulary_reach_the_divergence() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(30, 8, generator=generator) * 3
    base = torch.randn(5, 8, generator=generator)
    candidate = base + 0.1 * torch.randn(5, 8, generator=generator)
    targets = torch.arange(5)
    head = DenseHead(weight, softcap=5.0, vocabulary=26)
    found = compare_hidden(base, candidate, head, head, targets, tile=8)
    full = [5 * torch.tanh(h @ weight[:26].T / 5) for h in (base, candidate)]
    expected = oracle(full[0], full[1], targets)
    assert found.kl.numpy() == pytest.approx(expected["kl"], rel=1e-4)
    assert found.base_nll.numpy() == pytest.approx(expected["base_nll"], rel=1e-5)


def test_the_same_call_returns_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    head = DenseHead(torch.randn(1300, 24, generator=generator))
    base = torch.randn(300, 24, generator=generator)
    candidate = base + 0.05 * torch.randn(300, 24, generator=generator)
    targets = torch.randint(1300, (300,), generator=generator)
    once, again = (compare_hidden(base, candidate, head, head, targets) for _ in range(2))
    for name in vars(once):
        assert torch.equal(getattr(once, name), getattr(again, name))


def test_hidden_states_by_hand() -> None:
    base = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.1, 0.7]])
    candidate = torch.tensor([[3.0, 3.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0], [0.1, 0.7]])
    found = compare_states(base, candidate)
    assert found.signal.tolist()[:4] == [25.0, 1.0, 0.0, 0.0]
    assert found.error.tolist() == [1.0, 5.0, 0.0, 1.0, 0.0]
    expected = [21 / (5 * math.sqrt(18)), 0.0, 1.0, 0.0, 1.0]
    assert found.cosine.tolist() == pytest.approx(expected, rel=1e-6)


def test_uncorrelated_noise_has_the_known_cosine() -> None:
    """cos = 1 / sqrt(1 + 10^(-SNR / 10)): 20 dB gives 0.9950."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(50, 4000, generator=generator)
    found = compare_states(base, base + 0.1 * torch.randn(50, 4000, generator=generator))
    assert float(found.cosine.mean()) == pytest.approx(1 / math.sqrt(1.01), abs=2e-4)


def test_hidden_states_must_match_and_be_finite() -> None:
    with pytest.raises(MetricError, match="cannot be compared"):
        compare_states(torch.zeros(2, 3), torch.zeros(2, 4))
    broken = torch.zeros(2, 3)
    broken[1, 1] = math.nan
    with pytest.raises(MetricError, match="hidden states of the candidate contain NaN"):
        compare_states(torch.zeros(2, 3), broken)
