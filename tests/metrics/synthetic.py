"""Per-token comparisons drawn at random."""

from __future__ import annotations

import numpy as np

from pytest_qlab.metrics.tokens import TokenArrays


def synthetic(
    seed: int = 0, *, documents: int = 6, windows: int = 3, tokens: int = 20, noise: float = 0.2
) -> TokenArrays:
    """Windows of unequal length in documents whose difficulty and damage vary."""
    generator = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents, dtype=np.int32), windows)
    lengths = generator.integers(tokens // 2, tokens + 1, document.size)
    window = np.repeat(np.arange(document.size, dtype=np.int32), lengths)
    n = window.size
    damage = generator.gamma(2, 0.5, documents)[document[window]]
    base = generator.gamma(2, 1, n).astype(np.float32)
    delta = noise * damage * generator.normal(0.3, 1, n)
    return TokenArrays(
        base_nll=base,
        candidate_nll=np.abs(base + delta).astype(np.float32),
        kl=(noise**2 * damage * generator.gamma(0.5, 1, n)).astype(np.float32),
        agree=generator.uniform(size=n) > 0.1 * damage,
        window=window,
        document=document,
        hidden_signal=generator.gamma(4, 1, n).astype(np.float32),
        hidden_error=(0.01 * damage * generator.gamma(4, 1, n)).astype(np.float32),
        hidden_cosine=(1 - 0.01 * generator.uniform(size=n)).astype(np.float32),
    )
