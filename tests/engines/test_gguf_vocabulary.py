"""Tokenizers as GGUF files describe them, and as llama.cpp then uses them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN

from pytest_qlab.engines.gguf.reader import GgufFile
from pytest_qlab.engines.gguf.vocabulary import TokenType, check_vocabulary, vocabulary_of
from pytest_qlab.engines.gguf.writer import base_tensors, write_gguf
from pytest_qlab.errors import ModelError
from pytest_qlab.models.load import load_model
from tests.architectures import character_tokenizer
from tests.engines.gguf_models import ROWS, byte_level, sentence_piece, tiny
from tests.engines.llama_oracle import llama_tokens, needs_llama

TEXTS = [
    "the heat of the night, isn't it? 12345 3.14",
    " a leading and two  inner spaces ",
    "lines\n\nand\ttabs\r\n",
    "caf\u00e9 \u201cquoted\u201d \u65e5\u672c\u8a9e \U0001f680",
    "</s>in the text<s>",
    "",
]


def _words(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def test_byte_level_tokens_merges_and_ends() -> None:
    vocabulary = vocabulary_of(byte_level(3), ROWS)
    metadata = vocabulary.metadata
    assert vocabulary.notes == ()
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.tokens"][:4] == ["<s>", "</s>", "!", '"']
    assert metadata["tokenizer.ggml.tokens"][258:] == [
        *("\u0120t", "\u0120h", "\u0120i"),
        *(f"[PAD{index}]" for index in range(261, ROWS)),
    ]
    assert metadata["tokenizer.ggml.token_type"] == (
        [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 259 + [TokenType.UNUSED] * 27
    )
    assert metadata["tokenizer.ggml.merges"] == ["\u0120 t", "\u0120 h", "\u0120 i"]
    assert metadata["tokenizer.ggml.bos_token_id"] == 0
    assert metadata["tokenizer.ggml.eos_token_id"] == 1
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False


def test_token_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    assert {kind.name: int(kind) for kind in TokenType} == {
        kind.name: int(kind) for kind in gguf.TokenType
    }


def test_the_keys_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_special_tokens({"pad_token": "<pad>", "sep_token": "<sep>", "unk_token": "<unk>"})
    known = {value for key, value in vars(gguf.Keys.Tokenizer).items() if key.isupper()}
    for each in (tokenizer, sentence_piece()):
        assert vocabulary_of(each, ROWS).metadata.keys() <= known


def test_a_tokenizer_that_puts_nothing_before_a_text() -> None:
    metadata = vocabulary_of(byte_level(bos=False), ROWS).metadata
    assert "tokenizer.ggml.bos_token_id" not in metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_what_is_put_around_a_text_is_found_by_asking() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "</s> <s> $A </s>", None, [("<s>", 0), ("</s>", 1)]
    )
    vocabulary = vocabulary_of(tokenizer, ROWS)
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"] is False
    assert vocabulary.metadata["tokenizer.ggml.add_eos_token"] is True
    assert vocabulary.notes == (
        "The tokenizer puts 2 tokens around texts; llama.cpp puts at most one on each side.",
    )


def test_added_tokens_are_control_or_searched_for_as_given() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("\u2581x"), AddedToken("<|user|>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    metadata = vocabulary_of(tokenizer, ROWS).metadata
    assert metadata["tokenizer.ggml.tokens"][278:282] == ["<tool>", " x", "<|user|>", "<call>"]
    kinds = metadata["tokenizer.ggml.token_type"][278:282]
    assert kinds == [TokenType.USER_DEFINED] * 2 + [TokenType.CONTROL] * 2


def test_special_tokens_beyond_the_embedding_are_left_out() -> None:
    tokenizer = byte_level(0 + 20)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    metadata = vocabulary_of(tokenizer, 278).metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 278
    assert "tokenizer.ggml.padding_token_id" not in metadata


def test_no_text_is_there_twice() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("[PAD280]")])
    tokens = vocabulary_of(tokenizer, ROWS).metadata["tokenizer.ggml.tokens"]
    assert tokens[278:281] == ["[PAD280]", "[PAD279]", "[[PAD280]]"]
    assert len(set(tokens)) == ROWS


def test_sentence_piece_tokens_are_scored_in_the_order_of_merges() -> None:
    vocabulary = vocabulary_of(sentence_piece(), ROWS)
    metadata = vocabulary.metadata
    assert vocabulary.notes == ()
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert metadata["tokenizer.ggml.tokens"][259:264] == [
        "\u2581t",
        "he",
        "\u2581the",
        "in",
        "\u2581a",
    ]
    assert metadata["tokenizer.ggml.scores"][258:266] == [-5, 0, -1, -2, -3, -4, -5, -5]
    assert metadata["tokenizer.ggml.token_type"][:4] == [
        *(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE)
    ]
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    assert metadata["tokenizer.ggml.unknown_token_id"] == 0
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert "tokenizer.ggml.merges" not in metadata


@pytest.mark.parametrize(("scheme", "adds"), [("always", True), ("first", True), ("never", False)])
def test_metaspace_says_whether_a_space_is_put_before(scheme: str, adds: bool) -> None:
    tokenizer = sentence_piece()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=scheme, split=False
    )
    metadata = vocabulary_of(tokenizer, ROWS).metadata
    assert metadata["tokenizer.ggml.add_space_prefix"] is adds


# The pattern of Llama 3's tokenizer is the default of this converter.
def _llama3() -> str:
    import inspect

    from transformers.convert_slow_tokenizer import TikTokenConverter

    return str(inspect.signature(TikTokenConverter).parameters["pattern"].default)


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "expected"),
    [
        (_words(QWEN), False, "qwen2"),
        (_words(_llama3()), True, "llama-bpe"),
        (_words(_llama3()), False, "smaug-bpe"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            False,
            "smollm",
        ),
    ],
)
def test_known_ways_to_split_into_words_are_named(
    pre_tokenizer: Any, ignore_merges: bool, expected: str
) -> None:
    tokenizer = byte_level(pre_tokenizer=pre_tokenizer, ignore_merges=ignore_merges)
    vocabulary = vocabulary_of(tokenizer, ROWS)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == expected
    assert vocabulary.notes == ()


def test_an_unknown_way_to_split_is_noted() -> None:
    tokenizer = byte_level(pre_tokenizer=_words(r"\S+|\s+"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    vocabulary = vocabulary_of(tokenizer, ROWS)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == "default"
    assert len(vocabulary.notes) == 2
    assert "splits text into words in a way that llama.cpp may not know" in vocabulary.notes[0]
    assert vocabulary.notes[1] == "The tokenizer normalizes text (NFC); llama.cpp will not."


def test_a_space_before_texts_is_noted() -> None:
    tokenizer = byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    assert vocabulary_of(tokenizer, ROWS).notes == (
        "The tokenizer puts a space before texts; llama.cpp will not.",
    )


def _bpe(**options: Any) -> PreTrainedTokenizerFast:
    merges = options.pop("merges", [("a", "b")])
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, merges, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (character_tokenizer(), "of the kind WordLevel"),
        (_bpe(), "a BPE of characters that has no tokens for bytes"),
        (_bpe(byte_fallback=True), "a BPE of characters that has no tokens for bytes"),
        (_bpe(end_of_word_suffix="</w>"), "marks the parts of words"),
        (_bpe(merges=[]), "a BPE without merges"),
        (SimpleNamespace(), r"a SimpleNamespace without a tokenizer\.json"),
    ],
)
def test_other_kinds_are_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        vocabulary_of(tokenizer, 3)


def _file(tokenizer: PreTrainedTokenizerFast, rows: int = ROWS, **changes: Any) -> GgufFile:
    metadata = vocabulary_of(tokenizer, rows).metadata
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return GgufFile(Path("model.gguf"), 3, metadata, {})


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece()])
def test_a_tokenizers_own_vocabulary_is_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    check_vocabulary(_file(tokenizer), tokenizer)


def test_padding_types_scores_and_spaces_of_added_tokens_are_no_differences() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("\u2581x")])
    tokens = vocabulary_of(tokenizer, ROWS).metadata["tokenizer.ggml.tokens"]
    tokens[278] = "\u2581x"
    tokens[279:] = [f"<unused{index}>" for index in range(ROWS - 279)]
    types = [int(TokenType.NORMAL)] * ROWS
    check_vocabulary(_file(tokenizer, tokens=tokens, token_type=types), tokenizer)
    pieces = sentence_piece()
    check_vocabulary(_file(pieces, scores=[-1000.0] * ROWS), pieces)


def test_what_ends_a_text_and_tokens_added_since_are_no_differences() -> None:
    tokenizer = byte_level()
    file = _file(tokenizer, eos_token_id=7)
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    check_vocabulary(file, tokenizer)
    metadata = {**file.metadata, "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * ROWS}
    with pytest.raises(ModelError, match=r"token 278 is '\[PAD278\]', in the model's '<tool>'"):
        check_vocabulary(GgufFile(file.path, 3, metadata, {}), tokenizer)


def test_a_file_without_vocabulary_passes() -> None:
    check_vocabulary(_file(byte_level(), model="none"), byte_level())
    check_vocabulary(_file(byte_level(), model="none"), character_tokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "it has no list of tokens"),
        ({"model": "llama"}, "of the kind 'llama', the model's of 'gpt2'"),
        ({"tokens": ["<s>", "</s>", "?"]}, "it has 3 tokens, the model's ids up to 277"),
        ({"merges": None}, "it has no merges, the model's 20"),
        ({"merges": ["a b"]}, "it has 1 merges, the model's 20"),
        ({"merges": ["a b"] * 20}, "merge 0 is 'a b', in the model's '\u0120 t'"),
        ({"bos_token_id": 5}, "its texts begin with token 5, the model's with 0"),
    ],
)
def test_other_vocabularies_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_vocabulary(_file(byte_level(), **changes), byte_level())


def test_the_first_differing_token_is_named() -> None:
    tokenizer = byte_level()
    tokens = vocabulary_of(tokenizer, ROWS).metadata["tokenizer.ggml.tokens"]
    tokens[7], tokens[8] = tokens[8], tokens[7]
    with pytest.raises(ModelError, match="token 7 is \"'\", in the model's '&'"):
        check_vocabulary(_file(tokenizer, tokens=tokens), tokenizer)


def _metaspace() -> PreTrainedTokenizerFast:
    tokenizer = sentence_piece()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="never", split=False
    )
    return tokenizer


@needs_llama
@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        byte_level(bos=False),
        byte_level(pre_tokenizer=_words(QWEN)),
        byte_level(pre_tokenizer=_words(_llama3()), ignore_merges=True),
        sentence_piece(),
        _metaspace(),
    ],
    ids=["gpt-2", "no bos", "qwen2", "llama-bpe", "sentencepiece", "metaspace"],
)
def test_llama_cpp_finds_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    loaded = tiny("llama", tokenizer)
    weights, others = base_tensors(loaded, "F32")
    file = tmp_path / "model.gguf"
    write_gguf(file, loaded, weights=weights, others=others, file_type="F32")
    assert llama_tokens(file, TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@needs_llama
def test_llama_cpp_finds_the_embedded_models_tokens(tmp_path: Path) -> None:
    loaded = load_model("embedded")
    weights, others = base_tensors(loaded, "F16")
    file = tmp_path / "model.gguf"
    write_gguf(file, loaded, weights=weights, others=others, file_type="F16")
    evaluation = Path(__file__).parents[2] / "pytest_qlab" / "embedded" / "text" / "evaluation"
    texts = [*TEXTS, *(each.read_text("utf-8") for each in sorted(evaluation.rglob("*.txt")))]
    assert llama_tokens(file, texts) == [loaded.tokenizer.encode(text) for text in texts]
