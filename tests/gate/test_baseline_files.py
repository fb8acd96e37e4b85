"""The files of saved baselines: read as written, always the same bytes, refused if damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.errors import BaselineError
from pytest_qlab.gate.baselines import (
    Baseline,
    LatencySummary,
    SavedCandidate,
    Subject,
    Sums,
    Windows,
    check_name,
    find,
    missing,
    names_in,
    rounded,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SIZES = st.floats(min_value=0, max_value=1e9)
COUNTS = st.integers(0, 20)
TEXT = st.text(max_size=8)


@st.composite
def baselines(draw: st.DrawFn) -> Baseline:
    count = draw(st.integers(1, 5))
    hidden = draw(st.booleans())

    def series(each: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(each, min_size=count, max_size=count))

    windows = Windows(
        digest=draw(TEXT),
        name=draw(TEXT),
        convention=draw(TEXT),
        domains=["a", "b"],
        domain=series(st.integers(0, 1)),
        document=series(COUNTS),
        tokens=series(st.integers(20, 500)),
        base_nll=series(SIZES),
        hidden_signal=series(SIZES) if hidden else [],
    )

    def candidate() -> SavedCandidate:
        sums = Sums(
            delta=series(FINITE),
            kl=series(FINITE),
            tail=series(COUNTS),
            agree=series(COUNTS),
            hidden_error=series(SIZES) if hidden else [],
            hidden_distance=series(FINITE) if hidden else [],
        )
        return SavedCandidate(
            method=draw(TEXT),
            options=draw(st.dictionaries(TEXT, st.none() | st.booleans() | COUNTS | TEXT)),
            measures=draw(st.dictionaries(TEXT, FINITE)),
            memory_dtype=draw(TEXT),
            sums=sums if draw(st.booleans()) else None,
            latency=latency() if draw(st.booleans()) else None,
            latencies={"decode.": latency()} if draw(st.booleans()) else {},
        )

    def latency() -> LatencySummary:
        times = draw(st.lists(st.floats(1e-9, 1e3), min_size=5, max_size=5))
        return LatencySummary(
            p50=times[0],
            baseline_p50=times[1],
            ratio=times[2],
            ratio_lower=times[3],
            ratio_upper=times[4],
            rounds=draw(COUNTS),
            threads=1,
            convention=draw(TEXT),
            processor=draw(TEXT),
            cores=2,
        )

    names = draw(st.lists(TEXT, unique=True, max_size=3))
    return Baseline(
        model=Subject(id=draw(TEXT), name=draw(TEXT), dtype="float32", versions={"torch": "2"}),
        windows=windows,
        candidates={name: candidate() for name in names},
    )


def example() -> Baseline:
    """Two windows, one candidate with everything."""
    return Baseline(
        model=Subject(id="m", name="model", dtype="float32", versions={"torch": "2"}),
        windows=Windows(
            digest="d",
            name="text",
            convention="spread48",
            domains=["prose", "code"],
            domain=[0, 1],
            document=[0, 3],
            tokens=[47, 40],
            base_nll=[120.5, 99.25],
            hidden_signal=[10.5, 11.5],
        ),
        candidates={
            "small": SavedCandidate(
                method="rtn",
                options={"bits": 4},
                quantized="q",
                calibration="c",
                measures={"size": 1000.0, "kl.mean": 0.02},
                memory_dtype="bfloat16",
                sums=Sums(
                    delta=[0.5, -0.25],
                    kl=[1.5, 1.25],
                    tail=[1, 0],
                    agree=[40, 39],
                    hidden_error=[0.5, 0.25],
                    hidden_distance=[0.1, 0.2],
                ),
                latency=LatencySummary(
                    p50=0.001,
                    baseline_p50=0.0011,
                    ratio=0.9,
                    ratio_lower=0.88,
                    ratio_upper=0.93,
                    rounds=400,
                    threads=1,
                    convention="prefill128",
                    processor="P",
                    cores=2,
                ),
            )
        },
    )


@settings(max_examples=60, deadline=None)
@given(baseline=baselines())
def test_a_file_is_read_as_it_was_written(
    baseline: Baseline, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    path.unlink(missing_ok=True)
    assert baseline.write(path) == "written"
    found = Baseline.read(path)
    assert found == baseline
    assert found.to_text() == baseline.to_text()
    assert json.loads(path.read_text(encoding="utf-8")) == baseline.model_dump(mode="json")
    assert found.write(path) == "unchanged"


def test_the_order_in_which_things_were_measured_leaves_no_trace() -> None:
    one = example()
    one.candidates["other"] = one.candidates["small"].model_copy(deep=True)
    two = example()
    two.candidates = dict.fromkeys(("other", "small"), two.candidates["small"])
    two.candidates["small"].measures = {"kl.mean": 0.02, "size": 1000.0}
    assert list(one.candidates) != list(two.candidates)
    assert one.to_text() == two.to_text()


def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "v1.json"
    assert example().write(path) == "written"
    before = path.read_bytes()
    changed = example()
    changed.candidates["small"].measures["size"] = 1001.0

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no space left"):
            changed.write(path)
    assert path.read_bytes() == before
    assert names_in(path.parent) == ["v1"]
    assert changed.write(path) == "replaced"
    assert Baseline.read(path) == changed


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (1234567.0, 6, 1234570.0),
        (0.00012345649, 6, 0.000123456),
        (-9.9999996, 6, -10.0),
        (0.0, 6, 0.0),
        (123456789012.0, 12, 123456789012.0),
    ],
)
def test_numbers_keep_so_many_digits(value: float, digits: int, expected: float) -> None:
    assert rounded(value, digits) == expected


# Damage


def paths_of(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value is: keys and places."""
    yield path
    if isinstance(document, dict):
        for key, value in document.items():
            yield from paths_of(value, (*path, key))
    elif isinstance(document, list):
        for place, value in enumerate(document):
            yield from paths_of(value, (*path, place))


def changed_at(document: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    copy = json.loads(json.dumps(document))
    if not path:
        return change(copy)
    inside = copy
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = change(inside[path[-1]])
    return copy


def damaged(path: Path, text: str | bytes) -> str:
    """The message with which a file of that content is refused."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BaselineError) as caught:
        Baseline.read(path)
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


DOCUMENT = json.loads(example().to_text())
# What may be of any name or type: options are as methods have them, hashes are only compared.
FREE = {("candidates", "small", "options", "bits")}
PATHS = [path for path in paths_of(DOCUMENT) if path not in FREE]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    text = example().to_text().rstrip()
    for length in [0, *random.Random(0).sample(range(1, len(text)), 60), len(text) - 1]:
        message = damaged(tmp_path / "v1.json", text[:length])
        assert "v1.json is not JSON" in message
        assert "--qlab-save" in message


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)) or "all")
def test_a_value_of_another_type_is_refused(path: tuple[Any, ...], tmp_path: Path) -> None:
    optional = path and path[-1] in ("windows", "sums", "latency")
    for wrong in ({"a": 1}, [[1]], True, None, "text", 1.5, -3, float("nan"), float("inf")):

        def put(old: Any, wrong: Any = wrong) -> Any:
            return wrong

        old: Any = DOCUMENT
        for step in path:
            old = old[step]
        allowed = (
            (isinstance(old, str) and isinstance(wrong, str))
            or (isinstance(old, bool) and isinstance(wrong, bool))
            or (isinstance(old, float | int) and wrong in (1.5, -3) and may_be(path, wrong))
            or (optional and wrong is None and path[-1] != "windows")
            or (path and path[-1] in ("options", "measures") and wrong == {"a": 1})
        )
        if not allowed:
            damaged(tmp_path / "v1.json", json.dumps(changed_at(DOCUMENT, path, put)))


def may_be(path: tuple[Any, ...], value: float) -> bool:
    """Whether a number may be that: differences and measures may, counts and times may not."""
    free = {"delta", "kl", "hidden_distance", "measures"} & set(path)
    positive = {"base_nll", "hidden_signal", "hidden_error"} & set(path)
    timed = path[-1] in ("p50", "baseline_p50", "ratio", "ratio_lower", "ratio_upper")
    whole = path[-1] == "cores" and value == -3
    return bool(free or ((positive or timed) and value > 0) or whole)


@pytest.mark.parametrize("longer", [True, False])
@pytest.mark.parametrize(
    "path",
    [path for path in PATHS if path and isinstance(path[-1], str) and path[-1] != "domains"],
    ids=lambda path: ".".join(path),
)
def test_series_of_other_lengths_are_refused(
    path: tuple[Any, ...], longer: bool, tmp_path: Path
) -> None:
    def change(values: Any) -> Any:
        return [*values, values[0]] if longer else values[:-1]

    value: Any = DOCUMENT
    for step in path:
        value = value[step]
    if isinstance(value, list):
        message = damaged(tmp_path / "v1.json", json.dumps(changed_at(DOCUMENT, path, change)))
        assert "is damaged" in message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("windows", "domain"), [0, 2], "no domain"),
        (("candidates", "small", "sums", "agree"), [48, 39], "more tokens than a window has"),
        (("candidates", "small", "sums", "tail"), [48, 0], "more tokens than a window has"),
        (("windows", "hidden_signal"), [], "one sum for each of the 2 windows"),
        (("windows",), None, "one sum for each of the 0 windows"),
        (("schema_version",), 2, "schema version 2.*Upgrade pytest-qlab"),
        (("generator",), "something else", "damaged: generator"),
    ],
)
def test_what_cannot_be_is_refused(
    path: tuple[str, ...], value: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "v1.json"
    file.write_text(json.dumps(changed_at(DOCUMENT, path, lambda old: value)), encoding="utf-8")
    with pytest.raises(BaselineError, match=message):
        Baseline.read(file)


@pytest.mark.parametrize("key", sorted({key for p in PATHS for key in p if isinstance(key, str)}))
def test_unknown_keys_are_refused(key: str, tmp_path: Path) -> None:
    """Written by hand, or by a version that keeps more."""
    for path in PATHS:
        if path and path[-1] == key and path[-2:-1] not in (("options",), ("measures",)):
            document = changed_at(DOCUMENT, path[:-1], lambda old: {**old, f"{key}_": 1})
            if path[:-1] != ("model", "versions"):
                damaged(tmp_path / "v1.json", json.dumps(document))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"[" * 200_000, b"9" * 10_000, b"<<<<<<< HEAD"]
)
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    damaged(tmp_path / "v1.json", content)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="cannot be read"):
        Baseline.read(tmp_path)


# Merging


def test_processes_add_up() -> None:
    timed, evaluated = example(), example()
    timed.windows = timed.candidates["small"].sums = None
    timed.candidates["small"].measures = {"size": 1000.0}
    timed.candidates["small"].calibration = ""
    evaluated.candidates["small"].latency = None
    evaluated.candidates["small"].memory_dtype = ""
    evaluated.candidates["small"].measures = {"kl.mean": 0.02}
    for first, second in ((timed, evaluated), (evaluated, timed)):
        merged = first.model_copy(deep=True)
        merged.merge(second.model_copy(deep=True))
        assert merged == example()


def test_a_candidate_of_a_foreign_runtime_leaves_the_windows_as_they_are() -> None:
    """It has no hidden states, and the base model's losses beside it differ in the last digits."""
    foreign = example()
    assert foreign.windows is not None
    foreign.windows.hidden_signal, foreign.windows.base_nll = [], [120.501, 99.25]
    foreign.candidates = {"gguf": foreign.candidates["small"].model_copy(deep=True)}
    sums = foreign.candidates["gguf"].sums
    assert sums is not None
    sums.hidden_error = sums.hidden_distance = []
    texts = set()
    for first, second in ((example(), foreign), (foreign, example())):
        merged = first.model_copy(deep=True)
        merged.merge(second)
        assert merged.windows == example().windows
        Baseline.model_validate(merged.model_dump())
        texts.add(merged.to_text())
    assert len(texts) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda other: setattr(other.model, "id", "another"),
        lambda other: setattr(other.model, "dtype", "bfloat16"),
        lambda other: setattr(other.windows, "digest", "another"),
        lambda other: setattr(other.candidates["small"], "calibration", "another"),
        lambda other: setattr(other.candidates["small"], "options", {"bits": 3}),
        lambda other: setattr(other.candidates["small"].sums, "kl", [1.5, 1.26]),
    ],
)
def test_a_file_holds_one_of_each(change: Callable[[Baseline], None]) -> None:
    other = example()
    change(other)
    with pytest.raises(BaselineError, match="Save them in separate runs, with a name each"):
        example().merge(other)


# Names


def test_the_last_is_the_last_in_natural_order(tmp_path: Path) -> None:
    for name in ("v1.9", "v1.10", "v1.2", "2024", "release", ".hidden", "v1.10-rc1"):
        (tmp_path / f"{name}.json").write_text("{}", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    assert names_in(tmp_path) == ["2024", "release", "v1.2", "v1.9", "v1.10", "v1.10-rc1"]
    assert find(tmp_path, "") == tmp_path / "v1.10-rc1.json"
    assert find(tmp_path, "v1.2") == tmp_path / "v1.2.json"
    assert find(tmp_path, "v1") is None
    assert "Did you mean 'release'?" in missing(tmp_path, "relaese")
    assert "--qlab-save=NAME" in missing(tmp_path / "nowhere", "")
    assert names_in(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "@last", "a b", "-x", "ä", "a\n"])
def test_a_name_is_one_of_a_file(name: str) -> None:
    with pytest.raises(BaselineError, match="--qlab-save: expected a name of letters"):
        check_name(name, "--qlab-save")


def test_the_suffix_may_be_given() -> None:
    assert check_name("v1.2.json", "--qlab-compare") == "v1.2"
    assert check_name("v1.2", "--qlab-compare") == "v1.2"
