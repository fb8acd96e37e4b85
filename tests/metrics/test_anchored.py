"""KL from one base model: against the definition in float64, and where it could lose digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.anchored import Anchor


def naive_kl(base: Tensor, other: Tensor) -> Tensor:
    """Sum of p (log p - log q), float64."""
    log_p, log_q = base.double().log_softmax(dim=1), other.double().log_softmax(dim=1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, torch.zeros_like(terms), terms).sum(dim=1)


def logits(rows: int, columns: int, seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([2, 7, 96, 3000]),
    seed=st.integers(0, 2**16),
    scale=st.floats(0.0, 8.0),
    moved=st.floats(1e-3, 30.0),
    shift=st.floats(-20.0, 20.0),
)
def test_is_the_definition(
    rows: int, columns: int, seed: int, scale: float, moved: float, shift: float
) -> None:
    base = logits(rows, columns, seed, scale)
    other = base + logits(rows, columns, seed + 1, moved) + shift
    # What the differences lose in float32, times how far they are spread; a shift costs digits.
    lost = 3e-7 * moved * (1 + moved) * (1 + abs(shift))
    found, expected = Anchor(base).kl(other), naive_kl(base, other)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=lost)


@pytest.mark.parametrize("shift", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("moved", [1e-4, 1e-3, 1e-2])
def test_small_divergences_keep_their_digits(moved: float, shift: float) -> None:
    base = logits(64, 4096, 0, 3.0)
    other = base + logits(64, 4096, 1, moved) + shift
    expected = naive_kl(base, other)
    assert float(expected.mean()) == pytest.approx(moved**2 / 2, rel=0.2)
    torch.testing.assert_close(Anchor(base).kl(other), expected, rtol=2e-3, atol=0)


def test_equal_logits_give_exactly_zero() -> None:
    base = logits(9, 3000, 3, 5.0)
    assert not Anchor(base).kl(base.clone()).any()


def test_rows_far_apart_are_compared_exactly() -> None:
    base = torch.tensor([[0.0, 300.0, 0.0], [0.0, 1.0, 2.0]])
    other = torch.tensor([[500.0, 0.0, -500.0], [0.0, 1.0, 2.0]])
    torch.testing.assert_close(Anchor(base).kl(other), naive_kl(base, other))


def test_tokens_that_both_models_mask_do_not_count() -> None:
    base, other = logits(4, 50, 4, 2.0), logits(4, 50, 5, 2.0)
    base[:, 7] = other[:, 7] = -torch.inf
    kept = [column for column in range(50) if column != 7]
    torch.testing.assert_close(
        Anchor(base).kl(other), naive_kl(base[:, kept], other[:, kept]), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(bad: float) -> None:
    base = logits(2, 10, 6, 1.0)
    other = base.clone()
    other[1, 3] = bad
    with pytest.raises(MetricError, match="NaN or infinity"):
        Anchor(base).kl(other)


def test_another_vocabulary_is_an_error() -> None:
    with pytest.raises(MetricError, match="vocabular"):
        Anchor(logits(2, 10, 7, 1.0)).kl(logits(2, 11, 7, 1.0))
