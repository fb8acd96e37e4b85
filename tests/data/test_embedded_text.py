"""The embedded texts: large enough, separate, and calibration apart from evaluation."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from pytest_qlab.data.text import DOMAINS, Document, Split, load_documents

_SPLITS: tuple[Split, ...] = ("evaluation", "calibration")


def _runs(document: Document, length: int = 10) -> set[tuple[str, ...]]:
    """All runs of `length` words, letter case and punctuation aside."""
    words = re.findall(r"\w+", document.text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("split", "least"), [("evaluation", 25_000), ("calibration", 15_000)])
def test_each_domain_is_large_enough_in_several_documents(
    domain: str, split: Split, least: int
) -> None:
    documents = load_documents(domain, split=split)
    sizes = [len(document.text.encode()) for document in documents]
    assert sum(sizes) >= least
    assert len(documents) >= 8
    assert max(sizes) < sum(sizes) / 3
    assert {document.domain for document in documents} == {domain}


@pytest.mark.parametrize("split", _SPLITS)
def test_embedded_is_all_domains_with_unique_ids(split: Split) -> None:
    documents = load_documents("embedded", split=split)
    assert documents == [d for domain in DOMAINS for d in load_documents(domain, split=split)]
    assert max(Counter(document.id for document in documents).values()) == 1


def test_evaluation_and_calibration_share_no_ten_words() -> None:
    evaluation, calibration = (load_documents("embedded", split=split) for split in _SPLITS)
    seen = {run: document.id for document in calibration for run in _runs(document)}
    shared = {
        (document.id, seen[run], " ".join(run))
        for document in evaluation
        for run in _runs(document)
        if run in seen
    }
    assert not shared


@pytest.mark.parametrize("split", _SPLITS)
def test_documents_of_a_split_are_separate_texts(split: Split) -> None:
    documents = load_documents("embedded", split=split)
    runs = {document.id: _runs(document) for document in documents}
    for one, other in combinations(runs, 2):
        assert not runs[one] & runs[other], f"{one} and {other} share ten words"


def test_the_overlap_test_would_notice_an_overlap() -> None:
    text = "One two three four five six seven eight nine ten, eleven."
    other = Document("b", "prose", "Before: two three four five six seven eight nine ten eleven!")
    assert _runs(Document("a", "prose", text)) & _runs(other)
