"""Documents from names, files and directories, and one clear error for each bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_qlab.data.text import load_documents
from pytest_qlab.errors import DataError


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("First.\n\nSecond: naïve.\n", encoding="utf-8")
    (document,) = load_documents(str(path))
    assert (document.id, document.domain) == ("novel", "novel")
    assert document.text == "First.\n\nSecond: naïve.\n"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfHello")
    assert load_documents(str(path))[0].text == "Hello"


def test_a_long_text_is_cut_at_the_ends_of_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * 150 for number in range(60)]
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = load_documents(str(path))
    assert "\n\n".join(document.text for document in documents) == path.read_text()
    assert [document.id for document in documents][:2] == ["long#1", "long#2"]
    assert all(2_000 < len(document.text) <= 4_100 for document in documents[:-1])
    assert all(document.text.startswith("Paragraph ") for document in documents)


def test_a_directory_gives_its_files_with_subdirectories_as_domains(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    for name in ("b.txt", "law/x.txt", "law/deep/y.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "notes.md").write_text("not read")
    found = {(d.id, d.domain, d.text) for d in load_documents(str(root))}
    assert found == {
        ("b", "mine", "b.txt"),
        ("law/x", "law", "law/x.txt"),
        ("law/deep/y", "law", "law/deep/y.txt"),
    }


def test_json_lines_with_a_key_of_choice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"body": "one\u2028more"}, {"body": " "}, {"body": "three", "domain": "law"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(["", *lines, ""]), encoding="utf-8")
    documents = load_documents(str(path), text_key="body")
    assert [(d.id, d.domain, d.text) for d in documents] == [
        ("rows/1", "rows", "one\u2028more"),
        ("rows/3", "law", "three"),
    ]


def test_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert [document.text for document in load_documents(str(path))] == ["one", "two"]


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "text file .* is empty"),
        ("a.txt", b" \n\t\n", "text file .* is empty"),
        ("a.txt", b"good \xff bad", "is not UTF-8 text: byte 5"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "Line 2 .* is not valid JSON"),
        (
            "a.jsonl",
            b'{"title": "t", "body": "b"}',
            r"no key 'text'\. It has: body, title\. .*--qlab-text-key",
        ),
        ("a.jsonl", b'["a"]', "Row 1 .* is no JSON object but a list"),
        ("a.jsonl", b'{"text": 3}', "has a int under 'text'"),
        ("a.jsonl", b'{"text": ""}\n{"text": " "}', "every document in it is empty"),
        ("a.json", b'{"text": "a"}', "a list of objects"),
        ("a.json", b"[1, 2", r"not valid JSON.*\.jsonl"),
        ("a.json", b"[]", "every document in it is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_documents(_write(tmp_path / name, content))


def test_an_unknown_name_or_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'wikitext'.*Did you mean 'wikitext2'.*chat.*\.jsonl"):
        load_documents("wikitext")
    with pytest.raises(DataError, match="no text file or directory"):
        load_documents(str(tmp_path / "missing.txt"))


def test_a_directory_without_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.txt files"):
        load_documents(str(tmp_path))


def test_an_empty_file_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"b\.txt' is empty"):
        load_documents(str(tmp_path))
