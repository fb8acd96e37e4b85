"""A tokenizer in the metadata of a GGUF file, and whether a file has the tokenizer of a model.

Two kinds can be expressed: byte-level BPE (GPT-2, Llama 3, Qwen), and BPE that falls back to bytes
as converted from SentencePiece (Llama 2, Mistral). Source: `conversion/base.py` and
`src/llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from pytest_qlab.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pytest_qlab.engines.gguf.reader import GgufFile

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_UNDERSCORE = "\u2581"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_LOOKS_SPECIAL = re.compile(r"<[|\uff5c].*[|\uff5c]>")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("bytes, words",), False): "gpt-2",
    (("digits", "bytes, words"), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST, "bytes"), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST, "bytes"), False): "smaug-bpe",
    ((_WORDS + r"\p{N}" + _REST, "bytes"), False): "qwen2",
    ((_CASED % ("", "", r"\p{N}"), "bytes"), True): "tekken",
    ((_CASED % (_CONTRACTION, _CONTRACTION, r"\p{N}{1,3}"), "bytes"), False): "gpt-4o",
}
"""llama.cpp's name for ways to split text into words, by their steps and `ignore_merges`."""


class TokenType(IntEnum):
    """What a token is, as llama.cpp counts."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF files describe it.

    Attributes:
        metadata: by full key; lists are of one type and not empty.
        notes: sentences on what llama.cpp will do otherwise when it tokenizes text itself. Token
            ids that are given to it are not concerned.
    """

    metadata: dict[str, Any]
    notes: tuple[str, ...]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Describe a tokenizer for a model whose input embedding has so many rows.

    Rows without a token get one that is never produced, and tokens without a row are left out.

    Raises:
        ModelError: the tokenizer is of a kind that GGUF files cannot express.
    """
    description = _description(tokenizer)
    model, kind = description["model"], _kind(description)
    notes: list[str] = []
    tokens, types = _tokens(tokenizer, rows, model, kind)
    metadata: dict[str, Any] = {"tokenizer.ggml.model": kind}
    if kind == "gpt2":
        metadata["tokenizer.ggml.pre"] = _pre_tokenizer(description, notes)
    else:
        metadata["tokenizer.ggml.pre"] = "default"
        _note_normalization(description, notes)
    metadata[_TOKENS] = tokens
    if kind == "llama":
        metadata["tokenizer.ggml.scores"] = _scores(tokens, model["merges"])
    metadata["tokenizer.ggml.token_type"] = types
    if kind == "gpt2":
        metadata[_MERGES] = _merges(model["merges"])
    else:
        metadata["tokenizer.ggml.add_space_prefix"] = _adds_space(description)
    metadata |= _special_tokens(tokenizer, rows, notes)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return Vocabulary(metadata, tuple(notes))


def check_vocabulary(file: GgufFile, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare a file's tokens with those of a tokenizer.

    Only what token ids mean is compared: not what ends a text, which models change afterwards, nor
    tokens that either has in unused places. A file without a vocabulary has none to compare.

    Raises:
        ModelError: a token, a merge, or the token that begins a text is another one.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind in ("none", "no_vocab"):
        return
    theirs = file.metadata.get(_TOKENS)
    if not isinstance(theirs, list):
        raise _other(f"it has no list of tokens ({_TOKENS})")
    ours = vocabulary_of(tokenizer, len(theirs)).metadata
    expected = ours["tokenizer.ggml.model"]
    if kind != expected:
        raise _other(f"it is of the kind {reprlib.repr(kind)}, the model's of {expected!r}")
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    ordinary = [index for token, index in tokenizer.get_vocab().items() if token not in added]
    if len(theirs) <= max(ordinary, default=-1):
        raise _other(f"it has {len(theirs)} tokens, the model's ids up to {max(ordinary)}")
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    unused = [kind == TokenType.UNUSED for kind in kinds] if isinstance(kinds, list) else []
    for index, (mine, other) in enumerate(zip(ours[_TOKENS], theirs, strict=True)):
        if ours["tokenizer.ggml.token_type"][index] == TokenType.UNUSED or (
            mine in added and unused[index : index + 1] == [True]
        ):
            continue
        if mine.replace(_UNDERSCORE, " ") != str(other).replace(_UNDERSCORE, " "):
            raise _other(f"token {index} is {reprlib.repr(other)}, in the model's {mine!r}")
    if _MERGES in ours:
        _check_merges(ours[_MERGES], file.metadata.get(_MERGES))
    mine, other = (part.get("tokenizer.ggml.bos_token_id") for part in (ours, file.metadata))
    if None not in (mine, other) and mine != other:
        raise _other(f"its texts begin with token {reprlib.repr(other)}, the model's with {mine}")


def _check_merges(ours: list[str], theirs: Any) -> None:
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        count = len(theirs) if isinstance(theirs, list) else "no"
        raise _other(f"it has {count} merges, the model's {len(ours)}")
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            raise _other(f"merge {index} is {reprlib.repr(other)}, in the model's {mine!r}")


def _other(what: str) -> ModelError:
    return ModelError(
        f"The tokenizer in the GGUF file is not the base model's: {what}. Token ids would mean "
        "something else to it: give the model that the file was made from as --qlab-model."
    )


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _inexpressible(f"a {type(tokenizer).__name__} without a tokenizer.json")
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def _kind(description: Mapping[str, Any]) -> str:
    """`gpt2` or `llama`, as llama.cpp calls byte-level and SentencePiece-like BPE."""
    model = description["model"]
    if model["type"] != "BPE":
        raise _inexpressible(f"of the kind {model['type']}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _inexpressible("a BPE that marks the parts of words")
    if not model["merges"]:
        raise _inexpressible("a BPE without merges")
    if any(step["type"] == "ByteLevel" for step in _steps(description["pre_tokenizer"])):
        return "gpt2"
    if model.get("byte_fallback") and model["vocab"].keys() >= _BYTES:
        return "llama"
    raise _inexpressible("a BPE of characters that has no tokens for bytes")


def _inexpressible(what: str) -> ModelError:
    return ModelError(
        f"The model's tokenizer is {what}, which cannot be expressed in a GGUF file here; expected "
        "byte-level BPE, or BPE with a fallback to bytes. Use methods that need no GGUF file."
    )


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a pre-tokenizer or normalizer that may be a sequence, in order."""
    if part is None:
        return []
    members = part.get("pretokenizers", part.get("normalizers"))
    return [part] if members is None else [step for each in members for step in _steps(each)]


def _pre_tokenizer(description: Mapping[str, Any], notes: list[str]) -> str:
    steps = _steps(description["pre_tokenizer"])
    merges_ignored = bool(description["model"].get("ignore_merges"))
    found = _PRE_TOKENIZERS.get((tuple(_signature(step) for step in steps), merges_ignored))
    if found is None:
        notes.append(
            "The tokenizer splits text into words in a way that llama.cpp may not know: the GGUF "
            "file names its default, with which llama.cpp will split some texts otherwise."
        )
    _note_normalization(description, notes)
    if any(step.get("add_prefix_space") for step in steps):
        notes.append("The tokenizer puts a space before texts; llama.cpp will not.")
    return found or "default"


def _note_normalization(description: Mapping[str, Any], notes: list[str]) -> None:
    """Note steps that change the text; that spaces become underscores is none of them."""
    kinds = [
        step["type"]
        for step in _steps(description["normalizer"])
        if step["type"] != "Prepend" and step.get("content") != _UNDERSCORE
    ]
    if kinds:
        notes.append(f"The tokenizer normalizes text ({', '.join(kinds)}); llama.cpp will not.")


def _signature(step: Mapping[str, Any]) -> str:
    """What a step does, in the words of `_PRE_TOKENIZERS`."""
    if step["type"] == "ByteLevel":
        return "bytes, words" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    pattern = step.get("pattern", {}).get("Regex", "")
    how = (step.get("behavior"), step.get("invert"))
    return str(pattern) if how in (("Isolated", False), ("Removed", True)) else str(step)


def _adds_space(description: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before a text."""
    steps = [*_steps(description["normalizer"]), *_steps(description["pre_tokenizer"])]
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, rows: int, model: Mapping[str, Any], kind: str
) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens that have a row; llama.cpp takes no text twice."""
    added = tokenizer.added_tokens_decoder
    tokens: dict[int, tuple[str, TokenType]] = {}
    for text, index in tokenizer.get_vocab().items():
        type = TokenType.NORMAL
        if index in added:
            special = added[index].special or _LOOKS_SPECIAL.fullmatch(text)
            type = TokenType.CONTROL if special else TokenType.USER_DEFINED
        if kind == "llama" and text in _BYTES:
            type = TokenType.BYTE
        elif kind == "llama" and text == model.get("unk_token"):
            type = TokenType.UNKNOWN
        tokens[index] = (text, type)
    taken = {text for text, _ in tokens.values()}
    for index, (text, type) in tokens.items():
        spaced = text.replace(_UNDERSCORE, " ")
        if type == TokenType.USER_DEFINED and spaced not in taken:
            # Tokens of users are searched for in the text as it is given.
            tokens[index] = (spaced, type)
            taken.add(spaced)
    for index in range(rows):
        if index not in tokens:
            text = f"[PAD{index}]"
            while text in taken:
                text = f"[{text}]"
            tokens[index] = (text, TokenType.UNUSED)
    chosen = [tokens[index] for index in range(rows)]
    return [text for text, _ in chosen], [int(type) for _, type in chosen]


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, which has two forms of them."""
    found = []
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _merges(merges: list[Any]) -> list[str]:
    """As llama.cpp reads them: a space inside a part is written as byte-level BPE writes it."""
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _pairs(merges)]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """The later a token is merged the lower, as SentencePiece has it; not merged: lowest."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(merges)):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: int, notes: list[str]
) -> dict[str, int | bool]:
    """Special ids, and which of them the tokenizer puts around a text, found by asking it."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    start = next(
        (at for at in range(len(full)) if plain and full[at : at + len(plain)] == plain), len(full)
    )
    around = {"bos": full[:start], "eos": full[start + len(plain) :]}
    metadata: dict[str, int | bool] = {}
    for name, put in around.items():
        if len(put) == 1:
            ids[name] = put[0]
        elif put:
            notes.append(
                f"The tokenizer puts {len(put)} tokens around texts; llama.cpp puts at most one "
                "on each side."
            )
    for name, index in ids.items():
        if isinstance(index, int) and 0 <= index < rows:
            metadata[f"tokenizer.ggml.{_SPECIAL[name]}_token_id"] = index
    for name, put in around.items():
        metadata[f"tokenizer.ggml.add_{name}_token"] = len(put) == 1 and put[0] < rows
    return metadata
