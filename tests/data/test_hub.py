"""Data sets of the Hub and parquet, through a stand-in for the optional package `datasets`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pytest_qlab.data.text import load_documents
from pytest_qlab.errors import DataError, MissingExtraError

Loader = Callable[..., Any]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loader], None]:
    """Puts a module `datasets` in place whose load_dataset is the function given."""

    def put(load_dataset: Loader) -> None:
        module = ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)

    return put


class _Recorder:
    """A load_dataset that returns rows and remembers what it was asked for."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.rows


def test_wikitext2_rows_become_articles(install: Callable[[Loader], None]) -> None:
    lines = ["", " = First = \n", " Text . \n", " = = Part = = \n", " More . \n", " = Second = \n"]
    recorder = _Recorder([{"text": line} for line in lines])
    install(recorder)
    documents = load_documents("wikitext2", split="evaluation")
    assert [document.text for document in documents] == [
        " = First = \n Text . \n = = Part = = \n More . \n",
        " = Second = \n",
    ]
    assert {document.domain for document in documents} == {"wikitext2"}
    load_documents("wikitext2", split="calibration")
    assert recorder.calls == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}),
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
    ]


def test_c4_is_streamed_and_cut_off(install: Callable[[Loader], None]) -> None:
    def rows() -> Iterator[dict[str, str]]:
        number = 0
        while True:
            number += 1
            yield {"text": f"Document {number}.", "url": ""}

    recorder = _Recorder(rows())
    install(recorder)
    documents = load_documents("c4")
    assert len(documents) == 1100
    assert documents[-1].text == "Document 1100."
    assert recorder.calls == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]


def test_ptb_sentences_become_pieces(install: Callable[[Loader], None]) -> None:
    sentences = [f"sentence number {number} of the corpus" for number in range(400)]
    recorder = _Recorder([{"sentence": sentence} for sentence in sentences])
    install(recorder)
    documents = load_documents("ptb", split="calibration")
    assert "".join(document.text for document in documents).split("\n") == [*sentences, ""]
    assert all(4_000 < len(document.text) < 4_100 for document in documents[:-1])
    ((args, kwargs),) = recorder.calls
    assert args == ("ptb_text_only", "penn_treebank")
    assert kwargs["split"] == "train"


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_offline(install: Callable[[Loader], None], name: str) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    install(offline)
    with pytest.raises(DataError, match=r"cannot be loaded: Couldn't reach.*HF_HUB_OFFLINE.*local"):
        load_documents(name)


def test_an_interruption_while_streaming_is_the_same_error(
    install: Callable[[Loader], None],
) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise TimeoutError

    install(_Recorder(rows()))
    with pytest.raises(DataError, match=r"'c4' .* cannot be loaded: TimeoutError"):
        load_documents("c4")


def test_a_data_set_without_text(install: Callable[[Loader], None]) -> None:
    install(_Recorder([{"text": ""}]))
    with pytest.raises(DataError, match="has no text"):
        load_documents("wikitext2")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "rows.parquet"])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    if name.endswith(".parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
        name = str(tmp_path / name)
    with pytest.raises(MissingExtraError, match=r'pip install "pytest-qlab\[datasets\]"'):
        load_documents(name)


def test_parquet_rows(install: Callable[[Loader], None], tmp_path: Path) -> None:
    recorder = _Recorder([{"body": "one"}, {"body": "two"}])
    install(recorder)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    documents = load_documents(str(path), text_key="body")
    assert [document.text for document in documents] == ["one", "two"]
    assert recorder.calls == [(("parquet",), {"data_files": str(path), "split": "train"})]
    with pytest.raises(DataError, match=r"no key 'text'\. It has: body"):
        load_documents(str(path))


def test_damaged_parquet(install: Callable[[Loader], None], tmp_path: Path) -> None:
    def damaged(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Parquet magic bytes not found")

    install(damaged)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read: Parquet magic bytes not found"):
        load_documents(str(path))
