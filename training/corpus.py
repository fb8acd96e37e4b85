"""The text that the embedded model is trained on: reading, cleaning, tokenizing.

A manifest (TOML) lists *sources*.  A source names a domain (``prose``, ``code`` or ``chat``), a
reader from ``READERS``, paths relative to a root that is given on the command line, and a sampling
weight.  ``prepare`` turns them into a tokenizer and, per source, one ``.npy`` of ``uint16`` token
ids for training and one for evaluation.  The split is by whole document and seeded, so that a
held-out document is never seen in training, and neither by the tokenizer.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
VOCABULARY = 4096
CONTEXT = 1024
BOOK_PART = 6000  # characters: books are cut at paragraphs into parts of about this size


@dataclass(frozen=True)
class Source:
    """One entry of the manifest."""

    name: str
    domain: str
    reader: str
    paths: tuple[Path, ...]
    weight: float
    held_out: float  # share of the documents that is kept for evaluation; 1.0: all of them
    derived: bool  # made from another source's text: drop what is held out there


def read_manifest(path: Path, roots: dict[str, Path]) -> list[Source]:
    """The sources of a manifest; each source's paths are relative to ``roots[source.root]``."""
    with path.open("rb") as handle:
        entries: list[dict[str, Any]] = tomllib.load(handle)["source"]
    sources = []
    for entry in entries:
        root = roots[entry.get("root", "data")]
        sources.append(
            Source(
                name=entry["name"],
                domain=entry["domain"],
                reader=entry["reader"],
                paths=tuple(root / part for part in entry["paths"]),
                weight=float(entry["weight"]),
                held_out=float(entry.get("held_out", 0.01)),
                derived=bool(entry.get("derived", False)),
            )
        )
    return sources


# --- cleaning -----------------------------------------------------------------------------------

# UTF-8 that was once decoded as Windows-1252; the lower-cased story file is full of it.  Longest
# first: the closing quote's third byte has no character there, so that two are left of it.
_MOJIBAKE = {
    "\u00e2\u20ac\u0153": '"',
    "\u00e2\u20ac\u009d": '"',
    "\u00e2\u20ac\u2122": "'",
    "\u00e2\u20ac\u02dc": "'",
    "\u00e2\u20ac\u201c": " - ",
    "\u00e2\u20ac\u201d": " - ",
    "\u00e2\u20ac\u00a6": "...",
    "\u00e2\u20ac": '"',
    "\u00e3\u00a9": "e",
    "\u00e3\u00b1": "n",
    "\u00e3\u00b3": "o",
    "\u00e3\u00a1": "a",
    "\u201c": '"',
    "\u201d": '"',
    "\u2019": "'",
    "\u2018": "'",
}
_STORY_START = re.compile(
    r"(once upon|once there|one day,? (a|an|two|there|the)\b|there (was|were) |there once |"
    r"a long time ago|long ago)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_NAMED = re.compile(r"\bnamed ([a-z]+)")
_CALLED = re.compile(r"\b(?:girl|boy|dog|cat|bird|bunny|bear|man|woman|rabbit) called ([a-z]+)")
_NOT_NAMES = frozenset(
    ("a", "an", "the", "his", "her", "their", "its", "it", "him", "after", "them", "that")
)
_SENTENCE = re.compile(  # its start: of the line, after a stop, after a quoted stop, in a quote
    r"(^|[.!?] +|[.!?]\" +(?!(?:he|she|they|it|his|her)\b)|(?:^|[\s(])\")([a-z])"
)


def fix_mojibake(text: str) -> str:
    """Undo the common damage to quotes and dashes, and make them plain ASCII."""
    for wrong, right in _MOJIBAKE.items():
        text = text.replace(wrong, right)
    return text


def proper_nouns(texts: list[str], minimum: int = 4, share: float = 0.9) -> set[str]:
    """Words that are capitalised in at least ``share`` of their mid-sentence occurrences."""
    upper: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for text in texts:
        for match in _WORD.finditer(text):
            before = text[max(0, match.start() - 2) : match.start()]
            if len(before) == 2 and before[1] == " " and (before[0].isalpha() or before[0] == ","):
                word = match.group().split("'")[0]
                every[word.lower()] += 1
                upper[word.lower()] += word[0].isupper()
    return {word for word, n in every.items() if n >= minimum and upper[word] >= share * n}


def truecase(text: str, nouns: set[str]) -> str:
    """Give lower-cased text its capitals back: sentence starts, ``I``, names (known or said)."""
    said = {*_NAMED.findall(text), *_CALLED.findall(text)} - _NOT_NAMES
    names = nouns | said

    def noun(match: re.Match[str]) -> str:
        word = match.group()
        return word[0].upper() + word[1:] if word.split("'")[0] in names else word

    text = _WORD.sub(noun, text)
    text = re.sub(r"\bi\b", "I", text)
    lines = text.split("\n")
    return "\n".join(_SENTENCE.sub(lambda m: m[1] + m[2].upper(), line) for line in lines)


def _tidy(text: str) -> str:
    """No trailing blanks, at most one empty line in a row, one blank between words."""
    text = re.sub(r"[ \t\u00a0]+", " ", text.replace("\r", ""))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", text)).strip()


# --- readers: a path to its documents -------------------------------------------------------------


def _parts(paragraphs: list[str], size: int = BOOK_PART) -> Iterator[str]:
    part: list[str] = []
    length = 0
    for paragraph in paragraphs:
        part.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            yield "\n\n".join(part)
            part, length = [], 0
    if length > 200:
        yield "\n\n".join(part)


def _book_paragraphs(path: Path) -> Iterator[list[str]]:
    text = path.read_text("utf-8")
    for book in re.split(r"(?m)^# Title: .*$", text):
        body = re.sub(r"(?m)^(## (Author|Year): .*|-{3,}|\* *\* *\*.*)$", "", book)
        body = re.sub(r"_([^_\n]+)_", r"\1", re.sub(r"(?m)^#+ *", "", fix_mojibake(body)))
        paragraphs = [p for p in _tidy(body).split("\n\n") if p]
        if paragraphs:
            yield paragraphs


def read_books(path: Path) -> Iterator[str]:
    """Books under ``# Title:`` headings, in parts that end at a paragraph."""
    for paragraphs in _book_paragraphs(path):
        yield from _parts(paragraphs)


def read_dialogue(path: Path) -> Iterator[str]:
    """Runs of quoted speech in books, as a talk of two: paragraphs that open with a quote."""
    for paragraphs in _book_paragraphs(path):
        turns: list[str] = []
        for paragraph in [*paragraphs, ""]:
            speech = " ".join(re.findall(r'"([^"]+)"', paragraph))
            if paragraph.startswith('"') and 8 <= len(speech) <= 600:
                turns.append(speech.rstrip(","))
                continue
            if len(turns) >= 2:
                yield from (chat(turns[i : i + 10]) for i in range(0, len(turns) - 1, 10))
            turns = []


def read_stories(path: Path) -> Iterator[str]:
    """Stories of a plain text file; stories follow each other without a reliable separator."""
    story: list[str] = []
    size, blanks, blank = 0, 0, True
    for line in fix_mojibake(path.read_text("utf-8")).split("\n"):
        if not line.strip():
            blank = True
            continue
        new = bool(_STORY_START.match(line)) or (not blank and blanks > 0)
        if new and size > 300:
            yield _tidy("\n\n".join(story))
            story, size, blanks = [], 0, 0
        blanks += bool(story) and blank
        story.append(line)
        size += len(line)
        blank = False


def read_lines(path: Path) -> Iterator[str]:
    """One document per line; long ones are cut like books, at sentence ends."""
    for line in path.read_text("utf-8").split("\n"):
        if len(line) > 200:
            yield from _parts([_tidy(p) for p in re.findall(r".{1,1500}(?:\. |$)", line)])


def read_wiki(path: Path) -> Iterator[str]:
    """WikiExtractor output: ``<doc ...>`` title, text ``</doc>``."""
    pattern = r"(?s)<doc [^>]*>\n(.*?)(?:</doc>|(?=<doc )|\Z)"
    for match in re.finditer(pattern, path.read_text("utf-8")):
        if len(match[1]) > 200:
            yield from _parts([p for p in _tidy(match[1]).split("\n") if p])


def read_jsonl(path: Path) -> Iterator[str]:
    """The ``text`` field of JSON lines."""
    for line in path.read_text("utf-8").splitlines():
        text = _tidy(fix_mojibake(json.loads(line)["text"]))
        yield from _parts([p for p in text.split("\n") if p])


_NO_CODE = frozenset(
    (
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "turtledemo",
    )
)


def read_python(path: Path) -> Iterator[str]:
    """Python files below a directory, without tests, tables and generated configuration."""
    for file in sorted(path.rglob("*.py")):
        left_out = _NO_CODE & set(file.relative_to(path).parts)
        generated = file.name.startswith("_sysconfigdata")
        if not left_out and not generated and 200 < file.stat().st_size < 300_000:
            text = file.read_text("utf-8", errors="replace").expandtabs(4)
            yield re.sub(r"\n{4,}", "\n\n\n", text.replace("\r", "")).strip() + "\n"


def chat(turns: list[str]) -> str:
    """Turns in the format of the project's chat text."""
    names = ("User", "Assistant")
    return "\n\n".join(f"{names[i % 2]}: {turn.strip()}" for i, turn in enumerate(turns)) + "\n"


def read_instruct(path: Path) -> Iterator[str]:
    """Instruction data with an Alpaca-style prompt (only the instruction itself is kept)."""
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        prompt = re.sub(r"(?s)^.*?### Instruction:\n", "", record["prompt"])
        prompt = re.sub(r"(?s)\n*### Response:\s*$", "", prompt)
        turns = [_tidy(fix_mojibake(part)) for part in (prompt, record["response"])]
        if all(turns):
            yield chat(turns)


def read_story_requests(path: Path) -> Iterator[str]:
    """Stories as answers: the request names the hero that the story itself introduces."""
    asks = ("Tell me a story about {}.", "Please write a short story about {}.",
            "Can you tell me a story about {}?", "I want to hear a story about {}.")  # fmt: skip
    hero = re.compile(r"\b(an? (?:[a-z]+ ){1,3}(?:named|called) [A-Z][a-z]+)")
    for i, story in enumerate(read_cased_stories(path)):
        match = hero.search(story[:300])
        if match:
            yield chat([asks[i % len(asks)].format(match[1]), story])


NOUNS: set[str] = set()  # filled by ``prepare`` from the cased sources, used by the readers below


def read_cased_stories(path: Path) -> Iterator[str]:
    """Lower-cased stories with their capitals given back (see ``truecase``)."""
    for story in read_stories(path):
        yield truecase(story, NOUNS)


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "books": read_books,
    "dialogue": read_dialogue,
    "stories": read_stories,
    "stories-truecased": read_cased_stories,
    "story-requests": read_story_requests,
    "lines": read_lines,
    "wiki": read_wiki,
    "jsonl": read_jsonl,
    "python": read_python,
    "instruct": read_instruct,
}


# --- tokenizer and token files --------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly ``VOCABULARY`` entries that puts bos in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries: too little text")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray[Any, Any]:
    """All documents in one stream: bos, text, eos, bos, text, eos, ..."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += [*encoding.ids, EOS_ID]
    return np.asarray(ids, dtype=np.uint16)


def _leaks(document: str, held_text: str) -> bool:
    """Whether any longer line of a derived document ends like text held out elsewhere."""
    lines = (re.sub(r"^(User|Assistant): ", "", line) for line in document.split("\n"))
    return any(len(line) >= 60 and line[-40:] in held_text for line in lines)


def prepare(sources: list[Source], out: Path, seed: int, sample: int = 12_000_000) -> None:
    """Write ``tokenizer/``, ``NAME.train.npy``, ``NAME.held.npy`` and ``corpus.json`` to ``out``.

    ``sample`` is the number of characters the tokenizer is trained on, shared out over the sources
    by their sampling weights, so that the vocabulary fits what the model will see.
    """
    out.mkdir(parents=True, exist_ok=True)
    cased = ("books", "stories", "lines", "wiki", "jsonl")
    texts = [path.read_text("utf-8") for s in sources if s.reader in cased for path in s.paths]
    NOUNS.update(proper_nouns(texts))
    documents: dict[str, tuple[list[str], list[str]]] = {}
    seen: set[str] = set()
    for source in sources:
        found = [d for path in source.paths for d in READERS[source.reader](path)]
        unique = [document for document in dict.fromkeys(found) if document not in seen]
        seen.update(unique)
        random.Random(f"{seed}/{source.name}").shuffle(unique)
        held = round(len(unique) * source.held_out)
        documents[source.name] = (unique[held:], unique[:held])
    held_text = "\n".join(d for s in sources if s.domain == "prose" for d in documents[s.name][1])
    for source in sources:
        if source.derived:
            kept = [d for d in documents[source.name][0] if not _leaks(d, held_text)]
            documents[source.name] = (kept, documents[source.name][1])
    total = sum(source.weight for source in sources)
    texts = []
    for source in sources:
        budget = sample * source.weight / total
        for document in documents[source.name][0]:
            if budget <= 0:
                break
            texts.append(document)
            budget -= len(document)
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(out / "tokenizer")
    facts: dict[str, Any] = {"seed": seed, "sources": {}}
    for source in sources:
        row: dict[str, Any] = {"domain": source.domain, "weight": source.weight}
        for part, docs in zip(("train", "held"), documents[source.name], strict=True):
            ids = _encode(tokenizer, docs)
            np.save(out / f"{source.name}.{part}.npy", ids)
            length = sum(len(document) for document in docs)
            row[part] = {"documents": len(docs), "characters": length, "tokens": len(ids)}
        facts["sources"][source.name] = row
    (out / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
