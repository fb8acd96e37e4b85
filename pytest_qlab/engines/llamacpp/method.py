"""`llamacpp`: llama.cpp's own quantizer and its own kernels, in one file that it made itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator

from pytest_qlab.errors import MethodError
from pytest_qlab.methods.base import Method, Statistic
from pytest_qlab.methods.ggml import in_capitals
from pytest_qlab.methods.mixes import Mix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from pytest_qlab.calibration.sources import StatisticsSource
    from pytest_qlab.engines.base import Engine, EngineLoad
    from pytest_qlab.methods.pipeline import QuantizedModel
    from pytest_qlab.models.load import LoadedModel

MODEL_FILE = "model.gguf"
_FILE_TYPES = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}


class LlamaCpp(Method):
    """The model quantized by llama.cpp and run by llama.cpp, on the CPU in a process of its own.

    The bits are those of `gguf` with the same type. What differs is that quality and latency are
    those of llama.cpp's kernels, which quantize the inputs of most matrix products to 8 bits.

    Options:
        type: the mix, named as the files are: Q4_K_M, Q3_K_S, IQ4_XS.
        imatrix: give llama.cpp the mean square of each column's inputs as importance matrix, for
            the decoder's linear layers.
    """

    name: ClassVar[str] = "llamacpp"
    summary: ClassVar[str] = "quantized and run by llama.cpp itself, if it is installed"
    reference: ClassVar[str] = "ggml-org/llama.cpp, through llama-cpp-python"
    cost: ClassVar[float] = 1.0
    positional: ClassVar[str | None] = "type"
    stored_dtype: ClassVar[str | None] = "float32"
    in_all: ClassVar[bool] = False

    type: Annotated[Mix, BeforeValidator(in_capitals)] = "Q4_K_M"
    imatrix: bool = False

    @property
    def wanted_statistics(self) -> frozenset[Statistic]:
        """The inputs' squares, for the importance matrix only."""
        return frozenset({"channels"}) if self.imatrix else frozenset()

    def identity(self) -> dict[str, Any]:
        """The options and the version of llama-cpp-python: another may quantize otherwise."""
        return {**super().identity(), "llama_cpp_python": _installed_version()}

    def import_model(
        self,
        loaded: LoadedModel,
        directory: Path,
        progress: Callable[[str], None],
        statistics: StatisticsSource | None = None,
    ) -> QuantizedModel:
        """Leave llama.cpp's file in `directory`, and read it; see `Method.import_model`.

        Args:
            statistics: needed with `imatrix`.

        Raises:
            MissingExtraError: llama-cpp-python or gguf is not installed.
            ModelError: the architecture is not supported.
            EngineError: llama.cpp fails.
        """
        from pytest_qlab.engines.gguf.importer import read_model
        from pytest_qlab.engines.gguf.reader import GgufFile
        from pytest_qlab.engines.gguf.writer import base_tensors, write_gguf
        from pytest_qlab.engines.llamacpp.engine import quantize_file

        started = time.perf_counter()
        importance = self._importance(loaded, statistics) if self.imatrix else None
        base, target = directory / "base.gguf", directory / MODEL_FILE
        weights, others = base_tensors(loaded, "F32")
        try:
            progress(f"{self.id}: writing the base model for llama.cpp")
            write_gguf(base, loaded, weights=weights, others=others, file_type="F32")
            progress(f"{self.id}: llama.cpp quantizes")
            quantize_file(
                base,
                target,
                _FILE_TYPES.get(self.type, f"MOSTLY_{self.type}"),
                weights=sum(each.numel() for each in loaded.model.parameters()),
                pure=self.type == "MXFP4",
                importance=importance,
            )
        finally:
            base.unlink(missing_ok=True)
        found = read_model(GgufFile.open(target), loaded)
        found.seconds = time.perf_counter() - started
        found.kernel = "llama.cpp"
        return found

    def engine(self, directory: Path, *, threads: int = 1) -> Engine:
        """llama.cpp with the checkpoint's file open in it; see `Method.engine`."""
        from pytest_qlab.engines.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine(directory / MODEL_FILE, threads=threads)

    def time_load(
        self, directory: Path, ids: Sequence[int], *, steady: int, threads: int = 1
    ) -> EngineLoad:
        """llama.cpp's loading of the checkpoint's file; see `Method.time_load`."""
        from pytest_qlab.engines.llamacpp.engine import time_load

        return time_load(directory / MODEL_FILE, ids, steady=steady, threads=threads)

    def _importance(
        self, loaded: LoadedModel, statistics: StatisticsSource | None
    ) -> dict[str, Tensor]:
        """Mean squares of the inputs of every decoder matrix, by the name of its tensor."""
        import torch

        from pytest_qlab.engines.gguf.names import gguf_names
        from pytest_qlab.models.structure import decoder_blocks

        if statistics is None:
            raise MethodError(f"{self.id} needs calibration text, and there is none.")
        places = gguf_names(loaded.model).places
        importance = {}
        for index, _ in enumerate(decoder_blocks(loaded.model)):
            for name, known in statistics(index).items():
                square = known.square_sum / known.tokens if known.tokens else None
                importance[places[f"{name}.weight"].tensor] = (
                    torch.ones_like(known.square_sum) if square is None else square
                )
        return importance


def _installed_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None  # which the run will say
