"""The store: built once, whatever happens; never a partial or damaged artefact read back."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_qlab.errors import CorruptEntryError, MethodError, StoreError, StoreFullError
from pytest_qlab.store import MANIFEST, Store, canonical_json, content_hash, default_store

PARTS = {"a": 1, "b": ["x", 2.5]}


def read(directory: Path) -> str:
    return (directory / "data.txt").read_text(encoding="utf-8")


def write(text: str) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        (directory / "data.txt").write_text(text, encoding="utf-8")

    return build


def test_builds_once_then_reads(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    assert first.get("kind", PARTS, write("one"), read) == "one"
    assert second.get("kind", PARTS, write("two"), read) == "one"
    assert sum(first.built.values()) == 1
    assert first.reused == 0
    assert second.built == {}
    assert second.reused == 1


def test_different_parts_are_different_entries(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.json("k", {"x": 1}, lambda: "one") == "one"
    assert store.json("k", {"x": 2}, lambda: "two") == "two"
    assert store.json("other", {"x": 1}, lambda: "three") == "three"


def test_equal_parts_hash_equally_whatever_their_order() -> None:
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_an_error_with_the_remedy(tmp_path: Path, damage: str) -> None:
    Store(tmp_path).get("kind", PARTS, write("some text"), read)
    entry = Store(tmp_path).path("kind", PARTS)
    file = entry / "data.txt"
    if damage == "flip":
        file.write_text("some texT", encoding="utf-8")
    elif damage == "truncate":
        file.write_text("some", encoding="utf-8")
    elif damage == "delete":
        file.unlink()
    else:
        (entry / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(CorruptEntryError, match="Delete that directory") as caught:
        Store(tmp_path).get("kind", PARTS, write("new"), read)
    assert str(entry) in str(caught.value)


def test_no_space_left(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "half").write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path)
    with pytest.raises(StoreFullError, match="--qlab-store"):
        store.get("kind", PARTS, build, read)
    assert not store.has("kind", PARTS)
    assert not list(store.path("kind", PARTS).parent.glob(f".{'*'}half"))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    assert store.get("kind", PARTS, write("whole"), read) == "whole"


def test_safetensors_reports_a_full_disk_too(tmp_path: Path) -> None:
    """The library raises its own error type, with the system's message in its text."""

    class SafetensorError(Exception):
        pass

    def build(directory: Path) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    with pytest.raises(StoreFullError):
        Store(tmp_path).get("kind", PARTS, build, read)


def test_unwritable_root(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be used"):
        Store(blocker / "store").get("kind", PARTS, write("x"), read)


def test_failed_build_is_not_repeated_by_other_workers(tmp_path: Path) -> None:
    calls = []

    def build(directory: Path) -> None:
        calls.append(directory)
        raise MethodError("the layer is odd")

    for _ in range(2):
        store = Store(tmp_path / "store", run_dir=tmp_path / "run")
        with pytest.raises(MethodError, match="the layer is odd"):
            store.get("kind", PARTS, build, read)
    assert len(calls) == 1
    with pytest.raises(MethodError, match="the layer is odd"):
        Store(tmp_path / "store", run_dir=tmp_path / "next").get("kind", PARTS, build, read)
    assert len(calls) == 2


def _worker(root: str, log: str, seconds: float) -> None:
    def build(directory: Path) -> None:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()}\n")
        (directory / "data.txt").write_text("half", encoding="utf-8")
        time.sleep(seconds)
        (directory / "data.txt").write_text("built", encoding="utf-8")

    Store(Path(root)).get("kind", PARTS, build, read)


def test_processes_share_one_build(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(str(tmp_path / "s"), str(log), 0.3)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(log.read_text(encoding="utf-8").splitlines()) == 1


def test_killed_builder_loses_only_its_build(tmp_path: Path) -> None:
    root, log = tmp_path / "s", tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    doomed = context.Process(target=_worker, args=(str(root), str(log), 60.0))
    doomed.start()
    deadline = time.monotonic() + 60
    while not list(root.rglob("data.txt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert doomed.pid is not None
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join(60)
    assert not Store(root).has("kind", PARTS)
    store = Store(root)
    assert store.get("kind", PARTS, write("again"), read) == "again"
    entry = store.path("kind", PARTS)
    assert [path.name for path in entry.parent.iterdir() if path.is_dir()] == [entry.name]
    assert json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["parts"] == PARTS


def test_default_store_can_be_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QLAB_STORE", str(tmp_path / "x"))
    assert default_store() == tmp_path / "x"
    monkeypatch.delenv("QLAB_STORE")
    assert default_store().name == "pytest-qlab"


def test_the_default_store_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QLAB_STORE", "~/artefacts")  # as YAML passes it, with no shell to expand it
    assert default_store() == tmp_path / "artefacts"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLAB_STORE", "artefacts")
    assert default_store() == tmp_path / "artefacts"


def test_entries_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = Store(tmp_path)
        store.get("kind", PARTS, write("x"), read)
    finally:
        os.umask(before)
    assert store.path("kind", PARTS).stat().st_mode & 0o777 == 0o755


def crash(error: BaseException) -> Callable[[Path], None]:
    """Leaves a piece of work, then ends like that."""

    def build(directory: Path) -> None:
        (directory / "piece").write_text("half", encoding="utf-8")
        raise error

    return build


def finish(seen: list[str]) -> Callable[[Path], None]:
    """Notes the pieces that are there, and makes an entry of them."""

    def build(directory: Path) -> None:
        seen.extend(sorted(path.name for path in directory.iterdir()))
        (directory / "piece").unlink(missing_ok=True)
        write("whole")(directory)

    return build


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_a_resumable_build_goes_on_where_it_was_interrupted(
    tmp_path: Path, error: BaseException
) -> None:
    seen: list[str] = []
    with pytest.raises(type(error)):
        Store(tmp_path).get("kind", PARTS, crash(error), read, resumable=True)
    assert not Store(tmp_path).has("kind", PARTS)
    assert Store(tmp_path).get("kind", PARTS, finish(seen), read, resumable=True) == "whole"
    assert seen == ["piece"]
    entry = Store(tmp_path).path("kind", PARTS)
    assert [path for path in entry.parent.iterdir() if path.is_dir()] == [entry]


@pytest.mark.parametrize("error", [MethodError("no"), OSError(errno.ENOSPC, "full")])
def test_a_resumable_build_that_failed_begins_anew(tmp_path: Path, error: Exception) -> None:
    seen: list[str] = []
    with pytest.raises((MethodError, StoreFullError)):
        Store(tmp_path).get("kind", PARTS, crash(error), read, resumable=True)
    assert Store(tmp_path).get("kind", PARTS, finish(seen), read, resumable=True) == "whole"
    assert seen == []


def test_another_kind_of_build_discards_what_could_be_resumed(tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get("kind", PARTS, crash(KeyboardInterrupt()), read, resumable=True)
    assert Store(tmp_path).get("kind", PARTS, finish(seen), read) == "whole"
    assert seen == []
    entry = Store(tmp_path).path("kind", PARTS)
    assert [path for path in entry.parent.iterdir() if path.is_dir()] == [entry]


def test_a_build_killed_before_it_was_put_in_place_is_whole_when_resumed(tmp_path: Path) -> None:
    def killed(directory: Path) -> None:
        (directory / MANIFEST).write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get("kind", PARTS, killed, read, resumable=True)
    Store(tmp_path).get("kind", PARTS, write("whole"), read, resumable=True)
    assert Store(tmp_path).get("kind", PARTS, write("other"), read) == "whole"
