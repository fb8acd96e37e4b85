"""The Lab: one model, one evaluation set, one calibration set, one store, one device.

It works in a notebook or a script without pytest:

    lab = Lab("path/to/model", evaluation="wikitext2")
    lab.candidate("gptq:bits=3").perplexity_delta

Everything is computed when it is first asked for, and kept in the store.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_qlab.building import build_checkpoint
from pytest_qlab.candidate import Candidate
from pytest_qlab.checkpoint import Checkpoint, open_checkpoint
from pytest_qlab.errors import SpecError
from pytest_qlab.inputs import (
    CalibrationInput,
    CalibrationSet,
    EvaluationInput,
    InputOptions,
    ModelInput,
)
from pytest_qlab.machine import processor_of
from pytest_qlab.measuring.floor import CODE_VERSION as FLOOR_VERSION
from pytest_qlab.measuring.floor import NoiseFloor, measure_floor
from pytest_qlab.measuring.reference import Reference
from pytest_qlab.measuring.runnable import speed_base
from pytest_qlab.methods.base import Method
from pytest_qlab.models.load import device_kind
from pytest_qlab.original import OriginalModel
from pytest_qlab.parallel import one_thread_per_operation
from pytest_qlab.specs import MethodSpec, parse_specs
from pytest_qlab.store import Store, content_hash, default_store
from pytest_qlab.streaming import Streaming

if TYPE_CHECKING:
    from pytest_qlab.calibration.gradients import StoredGradients
    from pytest_qlab.calibration.sources import StoredStatistics
    from pytest_qlab.data.text import Document
    from pytest_qlab.data.windows import Window, WindowSet
    from pytest_qlab.metrics.latency import PairedLatency
    from pytest_qlab.models.lazy import LazyModel
    from pytest_qlab.models.load import LoadedModel
    from pytest_qlab.settings import Settings

QUANTIZED_VERSION = 5


class Lab:
    """Measures quantization methods on one model and one text.

    Args:
        model: `embedded`, a directory, a hub id, a causal language model in memory (then give its
            `tokenizer`), or a `LoadedModel`.
        tokenizer: overrides the model's own.
        evaluation, calibration: names (`embedded`, `prose`, `wikitext2`, ...), paths, documents, or
            finished windows and sequences.
        dtype: in which everything is computed; quality is measured in float32 unless you say so.
        store: directory of artefacts; by default the user's cache directory.
        threads: windows and sequences that run at the same time; results do not depend on it.
        configurations: named method configurations, as in `[tool.qlab.methods]`.
        simulated_latency: `flag`, `skip` or `fail` where no kernel runs the packed bits.
        stream: whether the model is read block by block, to be quantized and for measures of
            damage, so that it need not fit in memory: `auto` where it would not, `always`, or
            `never`. The bits are the same.
        progress: called with a line of text during long work.
        run_dir: directory shared by the workers of one pytest run.
        options: the rest of what is in `InputOptions`, by keyword.
    """

    def __init__(
        self,
        model: Any = "embedded",
        *,
        tokenizer: Any = None,
        evaluation: str | Sequence[str] | Sequence[Document] | WindowSet = "embedded",
        calibration: str | Sequence[str] | Sequence[Document] | CalibrationSet = "embedded",
        dtype: str = "float32",
        device: str = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
        store: str | Path | None = None,
        threads: int | None = None,
        configurations: Mapping[str, Mapping[str, Any]] | None = None,
        simulated_latency: str = "flag",
        stream: str = "auto",
        progress: Callable[[str], None] | None = None,
        run_dir: Path | None = None,
        **options: Any,
    ) -> None:
        one_thread_per_operation()
        self.progress = progress or (lambda line: None)
        self.threads = threads or max(1, os.cpu_count() or 1)
        self.simulated_latency = simulated_latency
        self.forwards = 0
        self._forwards_lock = threading.Lock()
        self._configurations = dict(configurations or {})
        self._candidates: dict[MethodSpec, Candidate] = {}
        self.timed: dict[str, PairedLatency] = {}  # the rounds that were read last, by phase
        self.model = ModelInput(
            model,
            tokenizer,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self._streaming = Streaming(stream, self.model, self.progress)
        input_options = InputOptions(**options)
        self.evaluation = EvaluationInput(evaluation, self.model, input_options)
        self.calibration_input = CalibrationInput(calibration, self.model, input_options)
        self.store = Store(
            Path(store).expanduser().absolute() if store is not None else default_store(),
            run_dir=run_dir,
            on_wait=self.progress,
        )
        self.reference = Reference(self)
        self._original = OriginalModel(self, self._streaming)

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        run_dir: Path | None = None,
        progress: Callable[[str], None] | None = None,
        **overrides: Any,
    ) -> Lab:
        """The lab that the command line and configuration files describe.

        `overrides` replace `model`, `tokenizer`, `evaluation` or `calibration`.
        """
        described: dict[str, Any] = {
            "model": settings.model,
            "evaluation": settings.evaluation,
            "calibration": settings.calibration,
            **overrides,
        }
        return cls(
            dtype=settings.dtype,
            device=settings.device,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            store=settings.store,
            threads=settings.threads,
            configurations=settings.configurations,
            simulated_latency=settings.simulated_latency,
            stream=settings.stream,
            progress=progress,
            run_dir=run_dir,
            text_key=settings.text_key,
            convention=settings.convention,
            window_length=settings.window_length,
            max_windows=settings.max_windows,
            calibration_length=settings.calibration_length,
            calibration_sequences=settings.calibration_sequences,
            seed=settings.seed,
            sampling=settings.sampling,
            **described,
        )

    @property
    def base_model(self) -> Any:
        """The model before quantization, in evaluation mode.

        Raises:
            MetricError: the model is read block by block.
        """
        self.check_whole("Base models to be run as a whole")
        return self.loaded.model

    @cached_property
    def speed_base(self) -> Any:
        """The base model as its speed is measured: computing in bfloat16 where that is fast.

        Raises:
            MetricError: the model is read block by block.
        """
        self.check_whole("Measures of speed and memory (latency, throughput, serving, memory)")
        return speed_base(self.base_model)

    @property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer and the dtypes of its checkpoint."""
        return self.model.loaded

    @property
    def described(self) -> LoadedModel:
        """What is known of the model; its weights are not there if it is read block by block."""
        return self.loaded if self.lazy is None else self.lazy.loaded

    @property
    def lazy(self) -> LazyModel | None:
        """The model, to be read block by block; None if it is to be loaded.

        Raises:
            ModelError: it is always to be read block by block, and cannot be.
        """
        return self._streaming.lazy()

    def check_whole(self, what: str) -> None:
        """Refuse what needs the whole model, see `Streaming.check_whole`."""
        self._streaming.check_whole(what)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def eval_data(self) -> WindowSet:
        """The evaluation windows."""
        return self.evaluation.windows

    @cached_property
    def looks(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the evaluation windows, in the order in which they are drawn.

        Once the base model was run, no text is needed to know them.
        """
        count = self.reference.facts().get("evaluation", {}).get("windows")
        return self.evaluation.looks(count or len(self.eval_data.windows))

    def windows_of(self, look: int) -> list[Window]:
        """The evaluation windows that one look adds, in the order of the documents."""
        windows = self.eval_data.windows
        return [windows[number] for number in self.looks[look]]

    def _floor_parts(self) -> dict[str, Any]:
        return {"reference": self.reference.part(0), "code": FLOOR_VERSION}

    @cached_property
    def noise_floor(self) -> NoiseFloor:
        """KL of the base model from itself, computed in another legal way; measured once."""
        stored = self.store.json(
            "noise_floor", self._floor_parts(), lambda: measure_floor(self).to_dict()
        )
        return NoiseFloor.from_dict(stored)

    @property
    def calibration(self) -> CalibrationSet:
        """The calibration sequences."""
        found = self.calibration_input.set
        self.store.json(
            "calibration",
            self._calibration_identity(),
            lambda: {"sequences": len(found.sequences), "tokens": found.tokens},
        )
        return found

    def _calibration_identity(self) -> dict[str, Any]:
        return {"model": self.model.digest, "calibration": self.calibration_input.identity}

    @property
    def baseline(self) -> Candidate:
        """The model itself, through the same path as every candidate."""
        return self.candidate("none")

    def candidate(self, spec: str | MethodSpec | Method) -> Candidate:
        """The candidate that a method specification names, such as `gptq:bits=3`.

        Raises:
            SpecError: the specification is not understood, or names several methods.
        """
        if isinstance(spec, Method):
            spec = MethodSpec(spec)
        elif isinstance(spec, str):
            found = parse_specs([spec], self._configurations)
            if len(found) != 1:
                raise SpecError(
                    f"{spec!r} names {len(found)} methods; a candidate is one. Give one NAME with "
                    "its options, for example gptq:bits=3."
                )
            spec = found[0]
        if spec not in self._candidates:
            self._candidates[spec] = Candidate(self, spec)
        return self._candidates[spec]

    @property
    def candidates(self) -> dict[str, Candidate]:
        """The candidates that were asked for so far, by id."""
        return {spec.id: candidate for spec, candidate in self._candidates.items()}

    def count_forwards(self, number: int = 1) -> None:
        """Note that the model was run on that many windows or sequences."""
        with self._forwards_lock:
            self.forwards += number

    def base_identity(self) -> dict[str, Any]:
        """What determines the base model's numbers, as plain JSON types."""
        return {
            "model": self.model.digest,
            "dtype": self.model.dtype,
            "device": device_kind(self.model.device),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    def statistics(self, *, gram: bool) -> StoredStatistics:
        """Statistics of the base model's activations on the calibration text.

        One pass serves every method: Gram matrices are collected even if they are not wanted yet,
        unless they are large.
        """
        return self._original.statistics(gram=gram)

    def gradients(self) -> StoredGradients:
        """Squared gradients of the base model's loss on the calibration text; computed once.

        Raises:
            MethodError: they are not in the store yet, and the model is read block by block.
        """
        return self._original.gradients()

    def quantized_identity(self, method: Method) -> dict[str, Any]:
        """What determines a quantized model's bits, as plain JSON types."""
        parts = {**self.base_identity(), **method.identity(), "code": QUANTIZED_VERSION}
        if method.stream != "none":
            parts["calibration"] = self.calibration_input.identity
        return parts

    def checkpoint(self, method: Method) -> Checkpoint:
        """The model quantized by `method`, built if no process has built it before."""
        lazy = self._streaming.lazy_for(method)

        def build(directory: Path) -> None:
            statistics = self._original.told_to(method)
            build_checkpoint(directory, self, method, statistics, lazy)

        return self.store.get(
            "quantized",
            self.quantized_identity(method),
            build,
            open_checkpoint,
            resumable=lazy is not None,
        )

    @cached_property
    def _environment(self) -> dict[str, Any]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "processor": processor_of(self.model.device),
            "cores": os.cpu_count(),
            "device": self.model.device,
            "dtype": self.model.dtype,
        }

    def describe(self) -> dict[str, Any]:
        """Model, evaluation set, calibration set and environment, for the results document."""
        facts = self.reference.facts()
        parts = self._calibration_identity()
        sequences = self.store.peek("calibration", parts) or {}
        floor = self.store.peek("noise_floor", self._floor_parts())
        return {
            "model": {"id": self.model.digest, "name": self.model.name, **facts.get("model", {})},
            "evaluation": {
                "id": content_hash(self.evaluation.identity),
                "name": self.evaluation.name,
                **facts.get("evaluation", {}),
                **({} if floor is None else {"noise_floor": floor}),
            },
            "calibration": {
                "id": content_hash(self.calibration_input.identity),
                "name": self.calibration_input.name,
                **sequences,
            },
            "environment": self._environment,
        }

    def close(self) -> None:
        """Let go of all models; what was measured stays in the store."""
        self.__dict__.pop("speed_base", None)
        for candidate in self._candidates.values():
            candidate.release()
