"""Tokens of a base model and two candidates, drawn at random, and their sums over windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.gate.baselines import Sums, Windows, rounded

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]
DOMAINS = ("prose", "code")


@dataclass(frozen=True)
class Model:
    """One candidate's comparisons with the base model, by token."""

    nll: Array
    kl: Array
    agree: Array
    error: Array
    cosine: Array


@dataclass(frozen=True)
class Text:
    """Tokens in windows in documents; `signal` is of the base model's hidden states."""

    window: Numbers
    document: Numbers
    domain: Numbers
    base: Array
    signal: Array

    def of_windows(self, values: Array) -> list[float]:
        return [float(each) for each in np.bincount(self.window, weights=values)]


def draw(seed: int, damages: tuple[float, float], documents: int = 40) -> tuple[Text, list[Model]]:
    """A text of `documents` documents, and a candidate for each damage (nats of KL)."""
    random = np.random.default_rng(seed)
    window: list[int] = []
    document: list[int] = []
    domain: list[int] = []
    for number in range(documents):
        for _ in range(random.integers(1, 4)):
            scored = int(random.integers(40, 120))
            window += [window[-1] + 1 if window else 0] * scored
            document += [number] * scored
            domain += [number % 2] * scored
    count = len(window)
    of_document = np.asarray(document)
    # Documents differ in how hard they are, so that tokens of one are alike.
    hard = random.gamma(4, 0.25, documents)[of_document]
    base = random.gamma(1.2, 2.5, count) * hard
    text = Text(
        np.asarray(window), of_document, np.asarray(domain), base, random.gamma(20, 3, count)
    )
    models = []
    for damage in damages:
        kl = damage * hard * random.gamma(0.5, 2, count)
        noise = random.normal(0, 1, count) * np.sqrt(2 * kl)
        share = np.minimum(kl, 2)
        models.append(
            Model(
                nll=np.maximum(base + kl / 2 + noise, 0),
                kl=kl,
                agree=(random.random(count) > share / 2).astype(float),
                error=text.signal * share * random.gamma(5, 0.2, count),
                cosine=1 - share / 2 * random.gamma(5, 0.2, count),
            )
        )
    return text, models


def windows_of(text: Text) -> Windows:
    """As a baseline has them, not rounded."""
    firsts = np.unique(text.window, return_index=True)[1]
    return Windows(
        digest="d",
        convention="spread120",
        domains=list(DOMAINS),
        domain=text.domain[firsts].tolist(),
        document=text.document[firsts].tolist(),
        tokens=np.bincount(text.window).tolist(),
        base_nll=text.of_windows(text.base),
        hidden_signal=text.of_windows(text.signal),
    )


def sums_of(text: Text, model: Model) -> Sums:
    """As a baseline has them, not rounded."""
    return Sums(
        delta=text.of_windows(model.nll - text.base),
        kl=text.of_windows(model.kl),
        tail=[int(each) for each in text.of_windows((model.kl > 1).astype(float))],
        agree=[int(each) for each in text.of_windows(model.agree)],
        hidden_error=text.of_windows(model.error),
        hidden_distance=text.of_windows(1 - model.cosine),
    )


def rounded_sums(sums: Sums) -> Sums:
    """As they are written into a file."""
    kept = {
        name: [rounded(each) for each in getattr(sums, name)]
        for name in ("delta", "kl", "hidden_error", "hidden_distance")
    }
    return sums.model_copy(update=kept)
