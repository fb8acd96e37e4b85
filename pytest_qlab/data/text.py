"""Documents to evaluate and calibrate on: the embedded texts, and the user's own files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_qlab.data.hub import HUB_DATASETS, hub_documents, parquet_rows
from pytest_qlab.errors import DataError, did_you_mean

Split = Literal["evaluation", "calibration"]
DOMAINS = ("prose", "code", "chat")
EMBEDDED = "embedded"
LONGEST_WHOLE = 20_000
PIECE = 4_000
_EMBEDDED_DIRECTORY = Path(__file__).resolve().parent.parent / "embedded" / "text"
_ROW_FILES = (".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text that stands for itself: windows are never cut across two.

    Attributes:
        id: unique within what was loaded together.
        domain: what results are grouped by.
        text: never empty.
    """

    id: str
    domain: str
    text: str


def check_name(name_or_path: str) -> None:
    """Whether there is text of that name at all, without reading any.

    Raises:
        DataError: no such name, file or directory.
    """
    names = [EMBEDDED, *DOMAINS, *HUB_DATASETS]
    path = Path(name_or_path).expanduser()
    if name_or_path not in names and not path.is_dir() and not path.is_file():
        raise DataError(
            f"There is no text file or directory {name_or_path!r}, and no data set of that name."
            f"{did_you_mean(name_or_path, names)} Or give the path of a .txt, .jsonl, .json or "
            ".parquet file, or of a directory of .txt files."
        )


def load_documents(
    name_or_path: str, *, split: Split = "evaluation", text_key: str = "text"
) -> list[Document]:
    """Documents by name, or from a file or directory.

    Names are `embedded` (all of `prose`, `code`, `chat`), each of these, and the Hub's
    `wikitext2`, `c4`, `ptb` (through the extra `datasets`). Files are .txt (one document; if
    longer than 20 kB, cut at the ends of paragraphs into pieces of about 4 kB), .jsonl, .json
    (a list) and .parquet (one document a row); a directory is searched for .txt files.

    Args:
        name_or_path: one name or path.
        split: which part of a named data set; files are taken whole for either.
        text_key: the key or column that holds the text, in formats with rows.

    Raises:
        DataError: no such name or file, nothing in it, or it cannot be read.
        MissingExtraError: parquet or a Hub data set without the extra `datasets`.
    """
    check_name(name_or_path)
    if name_or_path == EMBEDDED:
        return [document for domain in DOMAINS for document in _embedded(domain, split)]
    if name_or_path in DOMAINS:
        return _embedded(name_or_path, split)
    if name_or_path in HUB_DATASETS:
        return [
            Document(identity, name_or_path, text)
            for identity, text in hub_documents(name_or_path, split)
        ]
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        documents = _directory(path)
    else:
        documents = _file(path, text_key)
    if not documents:
        raise DataError(
            f"There is no text in {name_or_path!r}: every document in it is empty. Give a file "
            "with some text (a few kilobytes at least)."
        )
    return documents


def _embedded(domain: str, split: Split) -> list[Document]:
    paths = sorted((_EMBEDDED_DIRECTORY / split / domain).glob("*.txt"))
    if not paths:
        raise DataError(
            f"The embedded {split} text of the domain {domain!r} is missing from this installation "
            "of pytest-qlab. Reinstall the package from a wheel, or give texts of your own."
        )
    return [Document(f"{domain}/{path.stem}", domain, _read(path)) for path in paths]


def _directory(directory: Path) -> list[Document]:
    """All .txt files below; files in a subdirectory have its name as their domain."""
    paths = sorted(directory.rglob("*.txt"))
    if not paths:
        raise DataError(
            f"The directory {str(directory)!r} has no .txt files. Give a directory with some, or "
            "the path of one .txt, .jsonl, .json or .parquet file."
        )
    documents: list[Document] = []
    for path in paths:
        relative = path.relative_to(directory)
        domain = relative.parts[0] if len(relative.parts) > 1 else directory.resolve().name
        identity = relative.with_suffix("").as_posix()
        documents.extend(_pieces(identity, domain, _read(path)))
    return documents


def _file(path: Path, text_key: str) -> list[Document]:
    if path.suffix.lower() not in _ROW_FILES:
        return _pieces(path.stem, path.stem, _read(path))
    documents = []
    for number, row in enumerate(_rows(path), start=1):
        if not isinstance(row, Mapping) or text_key not in row:
            raise _missing_key(path, number, row, text_key)
        text = row[text_key]
        if not isinstance(text, str):
            raise DataError(
                f"Row {number} of {str(path)!r} has a {type(text).__name__} under {text_key!r} "
                "where text is expected. Name the key that holds the text with --qlab-text-key."
            )
        domain = row.get("domain")
        if text.strip():
            name = domain if isinstance(domain, str) and domain else path.stem
            documents.append(Document(f"{path.stem}/{number}", name, text))
    return documents


def _missing_key(path: Path, number: int, row: object, text_key: str) -> DataError:
    if isinstance(row, str | int | float | list | None):
        return DataError(
            f"Row {number} of {str(path)!r} is no JSON object but a {type(row).__name__}. Each row "
            f'is expected to look like {{"{text_key}": "..."}}.'
        )
    keys = sorted(str(key) for key in row) if isinstance(row, Mapping) else []
    return DataError(
        f"Row {number} of {str(path)!r} has no key {text_key!r}. It has: "
        f"{', '.join(keys) or '(none)'}. Name the one that holds the text with --qlab-text-key."
    )


def _rows(path: Path) -> Iterable[object]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path)
    text = _read(path)
    if suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"The file {str(path)!r} is not valid JSON: {error}. For one JSON object a line, "
                "name the file .jsonl."
            ) from error
        if not isinstance(rows, list):
            raise DataError(
                f"The file {str(path)!r} holds a JSON {type(rows).__name__}; a list of objects "
                "with the text under one key is expected."
            )
        return rows
    return _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    # Only at newlines: str.splitlines would also cut at separators that JSON leaves unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(
                f"Line {number} of {str(path)!r} is not valid JSON: {error}. One JSON object on "
                "each line is expected."
            ) from error


def _read(path: Path) -> str:
    """The text of a file that must hold some."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The file {str(path)!r} is not UTF-8 text: byte {error.start} cannot be decoded. "
            "Convert it to UTF-8, or give a text file."
        ) from error
    except OSError as error:
        raise DataError(
            f"The file {str(path)!r} cannot be read: {error.strerror or error}. Check its "
            "permissions."
        ) from error
    if not text.strip():
        raise DataError(
            f"The text file {str(path)!r} is empty. Give a file with some text (a few kilobytes at "
            "least), or leave it out."
        )
    return text


def _pieces(identity: str, domain: str, text: str) -> list[Document]:
    """The text as one document, or, if it is long, cut at the ends of paragraphs."""
    if len(text.encode()) <= LONGEST_WHOLE:
        return [Document(identity, domain, text)]
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) + len(paragraph) > PIECE and pieces[-1].strip():
            pieces.append("")
        pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph
    return [
        Document(f"{identity}#{number}", domain, piece)
        for number, piece in enumerate(pieces, start=1)
        if piece.strip()
    ]
