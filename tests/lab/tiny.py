"""A lab over a tiny random model and a few lines of text: everything in a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pytest_qlab import Document, Lab
from tests.architectures import ARCHITECTURES, character_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz     ,.\n"


def documents(count: int, seed: int, length: int = 150) -> list[Document]:
    drawn = random.Random(seed)
    return [
        Document(f"{seed}-{n}", "noise", "".join(drawn.choices(LETTERS, k=length)))
        for n in range(count)
    ]


def tiny_lab(store: Path, architecture: str = "llama", **options: Any) -> Lab:
    arguments: dict[str, Any] = {
        "evaluation": documents(6, seed=1),
        "calibration": documents(8, seed=2),
        "window_length": 48,
        "calibration_length": 32,
        "threads": 1,
        **options,
    }
    return Lab(
        ARCHITECTURES[architecture](), tokenizer=character_tokenizer(), store=store, **arguments
    )


def saved_tiny_model(directory: Path, architecture: str = "llama") -> Path:
    """A checkpoint directory of the shape that a hub model has."""
    ARCHITECTURES[architecture]().save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory
