"""Parquet files and data sets of the Hub, through the extra `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qlab.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from types import ModuleType

    from pytest_qlab.data.text import Split

PIECE = 4_000
_HEADING = re.compile(r" = [^=]+ = \n?")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hub, and how its rows become documents.

    Attributes:
        repository, configuration: as `datasets.load_dataset` takes them.
        key: the column with the text.
        splits: the Hub's name of each split of ours.
        rows: `articles` (lines to be put together up to the next heading), `documents` (each row
            is one) or `sentences` (to be put together in pieces of about 4 kB).
        limit: how many rows are taken at most, streamed; None for all.
        options: further arguments of `load_dataset`.
    """

    repository: str
    configuration: str
    key: str
    splits: dict[str, str]
    rows: str
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


HUB_DATASETS = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "text",
        {"evaluation": "test", "calibration": "train"},
        "articles",
    ),
    # 1100 validation documents are what GPTQ's later code scores.
    "c4": HubDataset(
        "allenai/c4",
        "en",
        "text",
        {"evaluation": "validation", "calibration": "train"},
        "documents",
        limit=1100,
        options={"streaming": True},
    ),
    # The repository holds a script, which datasets >= 4 refuses; the Hub converted it to parquet.
    "ptb": HubDataset(
        "ptb_text_only",
        "penn_treebank",
        "sentence",
        {"evaluation": "test", "calibration": "train"},
        "sentences",
        options={"revision": "refs/convert/parquet"},
    ),
}


def hub_documents(name: str, split: Split) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents of a named data set.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: the data set is not in the cache and cannot be downloaded, or has no text.
    """
    dataset = HUB_DATASETS[name]
    datasets = _datasets(f"The data set {name!r}")
    hub_split = dataset.splits[split]
    try:
        rows = datasets.load_dataset(
            dataset.repository, dataset.configuration, split=hub_split, **dataset.options
        )
        texts = [str(row[dataset.key]) for row in islice(rows, dataset.limit)]
    except Exception as error:  # the network, the cache, the Hub: errors of many kinds
        raise DataError(
            f"The data set {name!r} ({dataset.repository}, {dataset.configuration}, split "
            f"{hub_split}) cannot be loaded: {str(error).strip() or type(error).__name__}. It is "
            "fetched from the Hugging Face Hub and kept in its cache: run this once where there "
            "is a network and without HF_HUB_OFFLINE or HF_DATASETS_OFFLINE, or give the path of "
            "a local file, or use the embedded texts."
        ) from error
    documents = [text for text in _together(texts, dataset.rows) if text.strip()]
    if not documents:
        raise DataError(
            f"The data set {name!r} (split {hub_split}) has no text. Clear it from the cache of "
            "the Hugging Face Hub and load it again."
        )
    for number, text in enumerate(documents, start=1):
        yield f"{name}/{hub_split}/{number}", text


def _together(texts: list[str], rows: str) -> Iterator[str]:
    if rows == "documents":
        yield from texts
        return
    current: list[str] = []
    length = 0
    for text in texts:
        starts_article = rows == "articles" and _HEADING.fullmatch(text)
        full = rows == "sentences" and length > PIECE
        if current and (starts_article or full):
            yield "".join(current)
            current, length = [], 0
        line = text if text.endswith("\n") else f"{text}\n"
        current.append(line)
        length += len(line)
    if current:
        yield "".join(current)


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: the file cannot be read.
    """
    datasets = _datasets("Reading a parquet file")
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
        return [dict(row) for row in rows]
    except Exception as error:  # errors of pyarrow, datasets and the file system
        raise DataError(
            f"The parquet file {str(path)!r} cannot be read: "
            f"{str(error).strip() or type(error).__name__}. Write it again, or give .jsonl."
        ) from error


def _datasets(what: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(what, "datasets") from error
    module: ModuleType = datasets
    return module
