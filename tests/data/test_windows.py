"""Windows: every token where the convention says it is, and deterministic sampling."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.data.text import Document
from pytest_qlab.data.windows import (
    Window,
    calibration_sequences,
    make_windows,
    systematic_sample,
)
from pytest_qlab.errors import DataError
from tests.architectures import character_tokenizer

PLAIN = character_tokenizer()
WITH_BOS = character_tokenizer(adds_bos=True)
ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _document(length: int, name: str = "d", domain: str = "prose") -> Document:
    text = "".join(ALPHABET[(i * i + i) % len(ALPHABET)] for i in range(length))
    return Document(name, domain, text)


def _ids(text: str) -> list[int]:
    return [int(i) for i in PLAIN.encode(text)]


def test_spread_windows_tile_each_document_by_itself() -> None:
    documents = [_document(250, "a"), _document(130, "b", "code"), _document(20, "c")]
    windows = make_windows(documents, PLAIN, length=100, maximum=0)
    assert windows.documents == (("a", "prose"), ("b", "code"), ("c", "prose"))
    # 250 = 100 + 100 + 50; the tail of b scores 29 and c 19: both are dropped.
    assert [(w.document, len(w.ids), w.first_scored) for w in windows.windows] == [
        (0, 100, 1),
        (0, 100, 1),
        (0, 50, 1),
        (1, 100, 1),
    ]
    first = [i for w in windows.windows[:3] for i in w.ids]
    assert first == _ids(documents[0].text)
    assert windows.scored == 99 + 99 + 49 + 99


def test_spread_windows_begin_with_bos_if_the_tokenizer_says_so() -> None:
    document = _document(230)
    windows = make_windows([document], WITH_BOS, length=100, maximum=0).windows
    assert [w.ids[0] for w in windows] == [0, 0, 0]
    assert [i for w in windows for i in w.ids[1:]] == _ids(document.text)
    assert [w.scored for w in windows] == [99, 99, 32]
    without = make_windows([document], WITH_BOS, length=100, maximum=0, bos=False).windows
    assert [i for w in without for i in w.ids] == _ids(document.text)[:200]
    forced = make_windows([document], PLAIN, length=100, maximum=0, bos=True).windows
    assert forced == windows


def test_the_tail_is_kept_from_32_scored_tokens_on() -> None:
    for tail, expected in [(32, 1), (33, 2)]:
        windows = make_windows([_document(100 + tail)], PLAIN, length=100, maximum=0).windows
        assert len(windows) == expected


def test_short_windows_are_kept_when_they_are_full() -> None:
    windows = make_windows([_document(40)], PLAIN, length=8, maximum=0).windows
    assert [len(w.ids) for w in windows] == [8] * 5


def test_gptq2048_joins_the_documents_and_drops_the_tail() -> None:
    documents = [_document(3000, "a"), _document(2000, "b")]
    windows = make_windows(documents, WITH_BOS, convention="gptq2048", maximum=0)
    joined = [0, *_ids(documents[0].text + "\n\n" + documents[1].text)]
    assert [list(w.ids) for w in windows.windows] == [joined[:2048], joined[2048:4096]]
    assert [w.first_scored for w in windows.windows] == [1, 1]
    assert windows.documents == (("window-1", "prose"), ("window-2", "prose"))
    mixed = [documents[0], _document(2000, "b", "code")]
    names = make_windows(mixed, WITH_BOS, convention="gptq2048", maximum=0).documents
    assert {domain for _, domain in names} == {"mixed"}


def test_joined_windows_are_no_longer_than_the_model() -> None:
    documents = [_document(600)]
    windows = make_windows(
        documents, PLAIN, convention="gptq2048", maximum=0, model_length=256
    ).windows
    assert [len(w.ids) for w in windows] == [256, 256]
    spread = make_windows(documents, PLAIN, length=512, maximum=0, model_length=300).windows
    assert [len(w.ids) for w in spread] == [300, 300]


def test_llamacpp512_scores_255_tokens_after_an_overwritten_bos() -> None:
    document = _document(1100)
    windows = make_windows([document], WITH_BOS, convention="llamacpp512", maximum=0).windows
    joined = [0, *_ids(document.text)]
    assert [list(w.ids) for w in windows] == [joined[:512], [0, *joined[513:1024]]]
    assert [w.scored for w in windows] == [255, 255]
    plain = make_windows([document], PLAIN, convention="llamacpp512", maximum=0).windows
    assert list(plain[1].ids) == _ids(document.text)[512:1024]


def test_the_digest_follows_everything_that_is_scored() -> None:
    documents = [_document(900, "a"), _document(900, "b")]
    digests = {
        make_windows(documents, PLAIN, maximum=0).digest,
        make_windows(documents, PLAIN, maximum=1).digest,
        make_windows(documents, PLAIN, length=256, maximum=0).digest,
        make_windows(documents, WITH_BOS, maximum=0).digest,
        make_windows(documents[::-1], PLAIN, maximum=0).digest,
        make_windows(documents, PLAIN, convention="llamacpp512", maximum=0).digest,
    }
    assert len(digests) == 6
    again = make_windows(documents, PLAIN, maximum=0, name="other")
    assert again.digest == make_windows(documents, PLAIN, maximum=0).digest


@given(total=st.integers(1, 500), maximum=st.integers(0, 100), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_systematic_sampling_is_even_ordered_and_repeatable(
    total: int, maximum: int, seed: int
) -> None:
    windows = [Window(i, (i, i), 1) for i in range(total)]
    sample = systematic_sample(windows, maximum, seed)
    chosen = [w.document for w in sample]
    assert sample == systematic_sample(windows, maximum, seed)
    assert len(sample) == (min(total, maximum) if maximum else total)
    gaps = {b - a for a, b in pairwise(chosen)}
    step = total / len(sample)
    assert all(gap >= 1 and step - 1 < gap < step + 1 for gap in gaps)
    assert 0 <= chosen[0] < step


def test_sampling_gives_each_window_the_same_chance() -> None:
    windows = [Window(i, (i, i), 1) for i in range(10)]
    counts = [0] * 10
    for seed in range(3000):
        for window in systematic_sample(windows, 3, seed):
            counts[window.document] += 1
    # 900 expected, standard deviation 25: five of them either way.
    assert all(775 < count < 1025 for count in counts)


def test_too_little_text_is_an_error_with_numbers() -> None:
    with pytest.raises(DataError, match=r"1 documents with 20 characters .* window of 512 tokens"):
        make_windows([_document(20)], PLAIN)
    with pytest.raises(DataError, match="'spread'"):
        make_windows([_document(500)], PLAIN, convention="gptq2048")
    with pytest.raises(DataError, match="too short"):
        make_windows([], PLAIN)


def test_bad_options() -> None:
    documents = [_document(600)]
    with pytest.raises(DataError, match="Did you mean 'gptq2048'"):
        make_windows(documents, PLAIN, convention="gptq")
    with pytest.raises(DataError, match="at least 2 tokens"):
        make_windows(documents, PLAIN, length=1)
    with pytest.raises(DataError, match=r"0 \(all\) or more"):
        make_windows(documents, PLAIN, maximum=-1)
    nameless = character_tokenizer()
    nameless.bos_token = None
    with pytest.raises(DataError, match="has none"):
        make_windows(documents, nameless, bos=True)


def test_calibration_sequences_cut_the_shuffled_stream() -> None:
    documents = [_document(100 + i, str(i)) for i in range(20)]
    sequences = calibration_sequences(documents, PLAIN, length=64, maximum=1000, seed=4)
    assert {len(s) for s in sequences} == {64}
    assert len(sequences) == sum(100 + i + 1 for i in range(20)) // 64
    stream = [i for s in sequences for i in s]
    ends = [i for i, token in enumerate(stream) if token == 1]
    lengths = [b - a - 1 for a, b in pairwise([-1, *ends])]
    assert len(set(lengths)) == len(lengths)
    assert set(lengths) <= {100 + i for i in range(20)}
    assert lengths != sorted(lengths)
    assert sequences == calibration_sequences(documents, PLAIN, length=64, maximum=1000, seed=4)
    assert sequences != calibration_sequences(documents, PLAIN, length=64, maximum=1000, seed=5)
    assert sequences[:3] == calibration_sequences(documents, PLAIN, length=64, maximum=3, seed=4)


def test_calibration_sequences_put_bos_before_each_document() -> None:
    documents = [_document(99, str(i)) for i in range(4)]
    stream = calibration_sequences(documents, WITH_BOS, length=400, maximum=1)[0]
    assert [i for i, token in enumerate(stream) if token == 0] == [0, 100, 200, 300]


def test_calibration_with_too_little_text() -> None:
    with pytest.raises(DataError, match="51 tokens in all do not fill one sequence of 64"):
        calibration_sequences([_document(50)], PLAIN, length=64)
    with pytest.raises(DataError, match="must be at least 1"):
        calibration_sequences([_document(50)], PLAIN, length=0)
