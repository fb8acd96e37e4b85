"""The store: content-addressed artefacts, built once for all workers and runs.

An entry is a directory named after the hash of everything that determines its content. Whoever
needs it first builds it in a temporary directory and renames it into place, under a file lock that
the kernel releases if the builder dies; all others wait, then read. Every file's digest is written
beside it and checked before its first use, so that nothing partial or damaged is ever read back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from pytest_qlab.errors import (
    CorruptEntryError,
    DataError,
    MethodError,
    MetricError,
    ModelError,
    NotMeasuredError,
    QlabError,
    SpecError,
    StoreError,
    StoreFullError,
)
from pytest_qlab.machine import default_store as default_store

T = TypeVar("T")
MANIFEST = "manifest.json"
RESUMABLE = "resumable"
LAYOUT = 1
_REMEMBERED = (SpecError, ModelError, DataError, MethodError, MetricError, QlabError)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """Hex SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """Artefacts by content hash, shared by all processes that use the same root.

    Args:
        root: directory; created when first written to.
        run_dir: directory of this run, where failed builds are remembered so that no other worker
            repeats them; None outside pytest.
        on_wait: called with a line of text while another process builds what is asked for.

    Attributes:
        built: how often this process built each entry, by 'kind/key'.
        reused: how often it read an entry that was there already.
    """

    def __init__(
        self,
        root: Path,
        *,
        run_dir: Path | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.root = root
        self.built: dict[str, int] = {}
        self.reused = 0
        self._run_dir = run_dir
        self._on_wait = on_wait
        self._verified: set[Path] = set()

    def path(self, kind: str, parts: Mapping[str, Any]) -> Path:
        """Where the entry of that kind with those determining parts is, or would be."""
        return self.root / f"v{LAYOUT}" / kind / content_hash(parts)

    def has(self, kind: str, parts: Mapping[str, Any]) -> bool:
        """Whether the entry is there."""
        return (self.path(kind, parts) / MANIFEST).exists()

    def get(
        self,
        kind: str,
        parts: Mapping[str, Any],
        build: Callable[[Path], None],
        load: Callable[[Path], T],
        *,
        resumable: bool = False,
    ) -> T:
        """Return the loaded entry, building it first if no process has built it yet.

        Args:
            kind: a short name that groups entries, such as `quantized`.
            parts: everything that determines the content, as plain JSON types.
            build: writes the entry's files into the empty directory it is given.
            load: reads them; called without the lock, so it may memory-map.
            resumable: `build` can go on in the directory that it was killed in, or interrupted; it
                gets that one then, and leaves in the end only what belongs to the entry.

        Raises:
            CorruptEntryError: the files differ from what was written.
            StoreFullError: no space was left; nothing partial stays behind.
            StoreError: the directory cannot be written.
            QlabError: what `build` raises; in the same run, other workers get the same error.
        """
        entry = self.path(kind, parts)
        if (entry / MANIFEST).exists():
            self.reused += 1
        else:
            self._build_once(kind, parts, entry, build, resumable=resumable)
        self._verify(entry)
        return load(entry)

    def json(self, kind: str, parts: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """`get` for an entry that is one JSON value."""

        def build(directory: Path) -> None:
            (directory / "value.json").write_text(canonical_json(compute()), encoding="utf-8")

        return self.get(
            kind,
            parts,
            build,
            lambda directory: json.loads((directory / "value.json").read_text(encoding="utf-8")),
        )

    def peek(self, kind: str, parts: Mapping[str, Any], name: str = "value.json") -> Any:
        """A JSON file of an entry, or None if it was not built yet; not counted as a use."""
        file = self.path(kind, parts) / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._corrupt(file.parent, f"{name} cannot be read ({error})") from error

    def entries(self, kind: str) -> Iterator[Mapping[str, Any]]:
        """The determining parts of all finished entries of a kind; damaged ones are left out."""
        for manifest in sorted((self.root / f"v{LAYOUT}" / kind).glob(f"*/{MANIFEST}")):
            try:
                parts = json.loads(manifest.read_text(encoding="utf-8"))["parts"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if isinstance(parts, dict):
                yield parts

    def _build_once(
        self,
        kind: str,
        parts: Mapping[str, Any],
        entry: Path,
        build: Callable[[Path], None],
        *,
        resumable: bool,
    ) -> None:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(kind, entry):
                if (entry / MANIFEST).exists():
                    self.reused += 1
                    return
                self._raise_remembered_failure(entry)
                try:
                    self._build(kind, parts, entry, build, resumable=resumable)
                except QlabError as error:
                    self._remember_failure(entry, error)
                    raise
        except OSError as error:
            raise self._explain(error) from error
        except Exception as error:
            # safetensors reports a full disk with an exception of its own.
            if "No space left" in str(error):
                raise self._explain(OSError(errno.ENOSPC, str(error))) from error
            raise

    def _build(
        self,
        kind: str,
        parts: Mapping[str, Any],
        entry: Path,
        build: Callable[[Path], None],
        *,
        resumable: bool,
    ) -> None:
        # Not mkdtemp, whose directories no other user of a shared store could read.
        own = RESUMABLE if resumable else f"{os.getpid()}-{secrets.token_hex(4)}"
        partial = entry.with_name(f".{entry.name}.{own}")
        self._discard_abandoned(entry, keep=partial)
        partial.mkdir(exist_ok=resumable)
        (partial / MANIFEST).unlink(missing_ok=True)
        try:
            started = time.perf_counter()
            build(partial)
            files = {
                file.relative_to(partial).as_posix(): {
                    "size": file.stat().st_size,
                    "sha256": file_digest(file),
                }
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            }
            manifest = {
                "kind": kind,
                "parts": dict(parts),
                "files": files,
                "seconds": time.perf_counter() - started,
            }
            with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
                json.dump(manifest, stream, indent=1, sort_keys=True)
                stream.flush()
                os.fsync(stream.fileno())
            if entry.exists():
                shutil.rmtree(entry)
            partial.rename(entry)
        except BaseException as error:
            failed = isinstance(error, QlabError | OSError) or "No space left" in str(error)
            if failed or not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        name = f"{kind}/{entry.name}"
        self.built[name] = self.built.get(name, 0) + 1
        self._verified.add(entry)

    def _discard_abandoned(self, entry: Path, keep: Path) -> None:
        """Remove what a killed builder of this entry left; the lock says that it is gone."""
        for partial in entry.parent.glob(f".{entry.name}.*"):
            if partial.is_dir() and partial != keep:
                shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _locked(self, kind: str, entry: Path) -> Iterator[None]:
        lock = FileLock(entry.with_name(f".{entry.name}.lock"))
        try:
            lock.acquire(timeout=1.0)
        except Timeout:
            if self._on_wait is not None:
                self._on_wait(f"waiting for another worker that builds {kind} {entry.name[:12]}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _verify(self, entry: Path) -> None:
        if entry in self._verified:
            return
        try:
            manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
            expected = manifest["files"]
            for name, facts in expected.items():
                file = entry / name
                if not file.is_file():
                    raise self._corrupt(entry, f"{name} is missing")
                if file.stat().st_size != facts["size"]:
                    raise self._corrupt(
                        entry, f"{name} has {file.stat().st_size} bytes, not {facts['size']}"
                    )
                if file_digest(file) != facts["sha256"]:
                    raise self._corrupt(entry, f"{name} differs from what was written")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._corrupt(entry, f"{MANIFEST} cannot be read ({error})") from error
        except OSError as error:
            raise self._explain(error) from error
        self._verified.add(entry)

    @staticmethod
    def _corrupt(entry: Path, why: str) -> CorruptEntryError:
        return CorruptEntryError(
            f"The stored artefact {entry} is damaged: {why}. It was not used. Delete that "
            "directory and run again; the artefact will be built anew."
        )

    def _explain(self, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFullError(
                f"No space is left for artefacts under {self.root}. Nothing partial was kept. Free "
                "some space, delete old artefacts there, or name another directory with "
                "--qlab-store=DIR."
            )
        return StoreError(
            f"The store {self.root} cannot be used: {error}. Name a directory that can be written "
            "with --qlab-store=DIR."
        )

    def _failure_file(self, entry: Path) -> Path | None:
        return None if self._run_dir is None else self._run_dir / "failed" / f"{entry.name}.json"

    def _remember_failure(self, entry: Path, error: QlabError) -> None:
        file = self._failure_file(entry)
        if file is not None and not isinstance(error, StoreError | NotMeasuredError):
            file.parent.mkdir(parents=True, exist_ok=True)
            kind = next(each for each in type(error).__mro__ if each in _REMEMBERED)
            facts = {"kind": kind.__name__, "message": str(error)}
            file.write_text(json.dumps(facts), encoding="utf-8")

    def _raise_remembered_failure(self, entry: Path) -> None:
        file = self._failure_file(entry)
        if file is not None and file.exists():
            facts = json.loads(file.read_text(encoding="utf-8"))
            kinds = {kind.__name__: kind for kind in _REMEMBERED}
            raise kinds[facts["kind"]](facts["message"])
