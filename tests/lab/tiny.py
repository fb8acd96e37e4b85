"""A lab over a tiny random model and a few lines of text: everything in a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pytest_qlab import Document, Lab, testing
from tests.architectures import ARCHITECTURES, character_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz     ,.\n"


def documents(count: int, seed: int, length: int = 150) -> list[Document]:
    drawn = random.Random(seed)
    return [
        Document(f"{seed}-{n}", "noise", "".join(drawn.choices(LETTERS, k=length)))
        for n in range(count)
    ]


def tiny_lab(store: Path, architecture: str = "llama", **options: Any) -> Lab:
    given: dict[str, Any] = {
        "model": ARCHITECTURES[architecture](),
        "tokenizer": character_tokenizer(),
        "evaluation": documents(6, seed=1),
        "calibration": documents(8, seed=2),
        **options,
    }
    return testing.tiny_lab(store, **given)


def saved_tiny_model(directory: Path, architecture: str = "llama") -> Path:
    """A checkpoint directory of the shape that a hub model has."""
    ARCHITECTURES[architecture]().save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory
