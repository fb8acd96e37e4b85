"""`gguf_file`: a quantized model that exists already, compared like one that was made here."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_qlab.errors import DataError
from pytest_qlab.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.methods.pipeline import QuantizedModel
    from pytest_qlab.models.load import LoadedModel


class GgufFile(Method):
    """A GGUF file, whoever made it, dequantized by this package and mapped to the base model.

    `--qlab-candidate=NAME=path/to/model.gguf` stands for a configuration of this method.

    Options:
        path: the file.
    """

    name: ClassVar[str] = "gguf_file"
    summary: ClassVar[str] = "a finished GGUF file, beside the model it was made from"
    reference: ClassVar[str] = "ggml-org/llama.cpp, docs/gguf.md"
    in_all: ClassVar[bool] = False
    cost: ClassVar[float] = 0.2

    path: str

    def _id_parts(self) -> list[str]:
        return [Path(self.path).stem]

    def identity(self) -> dict[str, Any]:
        """The file's content, wherever it lies."""
        return {"method": self.name, "version": self.version, "file": _digest_of(self.path)}

    def import_model(
        self,
        loaded: LoadedModel,
        directory: Path,
        progress: Callable[[str], None],
        statistics: StatisticsSource | None = None,
    ) -> QuantizedModel:
        """Read the file; see `Method.import_model`.

        Raises:
            DataError: it is no valid GGUF file.
            ModelError: it is not of the base model, or of an architecture that is not supported.
        """
        from pytest_qlab.engines.gguf.importer import read_model
        from pytest_qlab.engines.gguf.reader import GgufFile as Reader

        started = time.perf_counter()
        progress(f"{self.id}: reading {self.path}")
        found = read_model(Reader.open(Path(self.path)), loaded)
        found.seconds = time.perf_counter() - started
        return found


def _digest_of(path: str) -> str:
    try:
        state = Path(path).stat()
    except OSError as error:
        raise DataError(
            f"The GGUF file {path} cannot be read: {error.strerror}. Check the path."
        ) from error
    return _digest(path, state.st_size, state.st_mtime_ns)


@lru_cache
def _digest(path: str, size: int, changed: int) -> str:
    from pytest_qlab.store import file_digest

    return file_digest(Path(path))
