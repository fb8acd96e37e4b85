"""What a comparison is made on: model, evaluation windows, calibration sequences; read when used.

Keys of artefacts are made from the files' digests, so that a run in which everything is already in
the store loads no model and tokenizes no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_qlab.data.text import Document, Split, load_documents
from pytest_qlab.data.windows import (
    WindowSet,
    calibration_sequences,
    check_windows,
    digest_of_windows,
    looks_of,
    make_windows,
)
from pytest_qlab.errors import DataError, ModelError
from pytest_qlab.estimate import CONTIGUOUS
from pytest_qlab.models.load import (
    LoadedModel,
    context_length,
    digest_of,
    from_memory,
    load_model,
    load_tokenizer,
    model_digest,
    open_lazily,
    size_of,
)
from pytest_qlab.store import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pytest_qlab.models.lazy import LazyModel

WINDOWS_VERSION = 1


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids that methods may look at, in sequences of one length.

    Raises:
        DataError: there is no sequence, or they differ in length.
    """

    name: str
    sequences: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        lengths = {len(sequence) for sequence in self.sequences}
        if len(lengths) != 1 or lengths == {0}:
            raise DataError(
                f"The calibration set {self.name!r} has {len(self.sequences)} sequences of "
                f"{', '.join(map(str, sorted(lengths))) or 'no'} tokens. At least one sequence is "
                "needed, and all must have one length of at least 1: cut them alike."
            )

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class InputOptions:
    """Options of `Lab` that say how text becomes windows and sequences."""

    text_key: str = "text"
    convention: str = "spread"
    window_length: int = 512
    max_windows: int = 64
    calibration_length: int = 512
    calibration_sequences: int = 128
    seed: int = 0
    sampling: str = "spread"


class ModelInput:
    """The model under test: a name that is loaded on use, or a module that is already there."""

    def __init__(
        self,
        model: str | PreTrainedModel | LoadedModel,
        tokenizer: Any = None,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._given = model
        self._tokenizer = tokenizer
        self.dtype = dtype
        self.device = device
        if isinstance(model, LoadedModel):  # it is used as it is
            parameter = next(model.model.parameters())
            self.dtype = str(parameter.dtype).removeprefix("torch.")
            self.device = str(parameter.device)
        self._revision = revision
        self._trust = trust_remote_code

    @property
    def name(self) -> str:
        """What the user called it."""
        if isinstance(self._given, str):
            return self._given
        if isinstance(self._given, LoadedModel):
            return self._given.name
        return type(self._given).__name__

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model in memory."""
        if isinstance(self._given, LoadedModel):
            return self._given
        if isinstance(self._given, str):
            return load_model(
                self._given,
                dtype=self.dtype,
                device=self.device,
                revision=self._revision,
                trust_remote_code=self._trust,
            )
        return from_memory(
            self._given, self._tokenizer, self.name, dtype=self.dtype, device=self.device
        )

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return not isinstance(self._given, str) or "loaded" in self.__dict__

    @cached_property
    def nbytes(self) -> int | None:
        """Bytes of the weights in the dtype it computes in, from the files' headers; or None."""
        if not isinstance(self._given, str):
            return None
        return size_of(self._given, dtype=self.dtype, revision=self._revision)

    @cached_property
    def lazy(self) -> LazyModel:
        """The model, to be read block by block.

        Raises:
            ModelError: it is in memory already, or cannot be read like that.
        """
        if not isinstance(self._given, str):
            raise ModelError(
                "A model that is in memory already cannot be read block by block. Give its "
                "directory, or leave --qlab-stream at auto."
            )
        return open_lazily(
            self._given,
            dtype=self.dtype,
            device=self.device,
            revision=self._revision,
            trust_remote_code=self._trust,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded without the model where that is possible."""
        if self._tokenizer is not None:
            return self._tokenizer
        if isinstance(self._given, str):
            return load_tokenizer(
                self._given, revision=self._revision, trust_remote_code=self._trust
            )
        return self.loaded.tokenizer

    @cached_property
    def context(self) -> int | None:
        """The longest sequence that the model takes; None where it has no limit."""
        if isinstance(self._given, str):
            return context_length(
                self._given, revision=self._revision, trust_remote_code=self._trust
            )
        return context_length(self.loaded.model)

    def fitting(self, length: int) -> int:
        """`length`, or the model's context where that is shorter."""
        return length if self.context is None else min(length, self.context)

    @cached_property
    def digest(self) -> str:
        """Hash of the weights, the configuration and the tokenizer."""
        own = "" if self._tokenizer is None else digest_of(None, self._tokenizer)
        if isinstance(self._given, str):
            return content_hash([model_digest(self._given, self._revision), own])
        return content_hash([self.loaded.digest, own])


class EvaluationInput:
    """Evaluation text: names or paths, documents, or finished windows."""

    def __init__(
        self,
        given: str | Sequence[str] | Sequence[Document] | WindowSet,
        model: ModelInput,
        options: InputOptions,
    ) -> None:
        if isinstance(given, WindowSet):
            check_windows(given)
        self._given = given
        self._model = model
        self._options = options

    @property
    def name(self) -> str:
        """What the user called it."""
        return self._given.name if isinstance(self._given, WindowSet) else _name(self._given)

    @property
    def convention(self) -> str:
        """The windows' convention and length, as printed beside every number."""
        if isinstance(self._given, WindowSet):
            return self._given.convention
        name = self._options.convention.rstrip("0123456789")
        length = int(self._options.convention[len(name) :] or self._options.window_length)
        return f"{name}{self._model.fitting(length)}{self._label}"

    @property
    def requested_convention(self) -> str:
        """`convention` as it was asked for: known without a look at the model, whose context may be
        shorter.
        """
        if isinstance(self._given, WindowSet):
            return self._given.convention
        return f"{self._options.convention}{self._label}"

    @property
    def _label(self) -> str:
        return CONTIGUOUS if self._options.sampling == "contiguous" else ""

    @cached_property
    def documents(self) -> list[Document]:
        """The texts."""
        if isinstance(self._given, WindowSet):
            raise DataError("Finished windows were given, so there is no text to show.")
        return read_documents(self._given, split="evaluation", text_key=self._options.text_key)

    @cached_property
    def windows(self) -> WindowSet:
        """The token windows that are scored."""
        return self._cut(self._options.max_windows)

    @cached_property
    def all_windows(self) -> WindowSet:
        """All windows that the text has, of which `windows` are a sample."""
        return self._cut(0)

    def _cut(self, maximum: int) -> WindowSet:
        if isinstance(self._given, WindowSet):
            return self._given
        return make_windows(
            self.documents,
            self._model.tokenizer,
            convention=self._options.convention,
            length=self._model.fitting(self._options.window_length),
            maximum=maximum,
            seed=self._options.seed,
            sampling=self._options.sampling,
            model_length=self._model.context,
            name=self.name,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the windows, as plain JSON types."""
        if isinstance(self._given, WindowSet):
            # Not its own digest, which `dataclasses.replace` would leave as it was.
            windows = self._given
            digest = digest_of_windows(windows.convention, windows.documents, windows.windows)
            # The seed says in which order they are drawn, and so what each look has.
            return {"windows": digest, "seed": self._options.seed}
        options = self._options
        return {
            "version": WINDOWS_VERSION,
            "documents": _digest_documents(self.documents),
            "convention": options.convention,
            "length": options.window_length,
            "maximum": options.max_windows,
            "seed": options.seed,
            "sampling": options.sampling,
        }

    def looks(self, count: int) -> tuple[tuple[int, ...], ...]:
        """The order in which that many windows are drawn, see `looks_of`."""
        return looks_of(count, self._options.seed)


class CalibrationInput:
    """Calibration text: names or paths, documents, or finished sequences."""

    def __init__(
        self,
        given: str | Sequence[str] | Sequence[Document] | CalibrationSet,
        model: ModelInput,
        options: InputOptions,
    ) -> None:
        self._given = given
        self._model = model
        self._options = options

    @property
    def name(self) -> str:
        """What the user called it."""
        return self._given.name if isinstance(self._given, CalibrationSet) else _name(self._given)

    @cached_property
    def documents(self) -> list[Document]:
        """The texts; none where finished sequences were given."""
        if isinstance(self._given, CalibrationSet):
            return []
        return read_documents(self._given, split="calibration", text_key=self._options.text_key)

    @cached_property
    def set(self) -> CalibrationSet:
        """The token sequences."""
        if isinstance(self._given, CalibrationSet):
            return self._given
        sequences = calibration_sequences(
            self.documents,
            self._model.tokenizer,
            length=self._model.fitting(self._options.calibration_length),
            maximum=self._options.calibration_sequences,
            seed=self._options.seed,
        )
        return CalibrationSet(self.name, tuple(map(tuple, sequences)))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the sequences, as plain JSON types."""
        if isinstance(self._given, CalibrationSet):
            return {"sequences": content_hash([list(ids) for ids in self._given.sequences])}
        options = self._options
        return {
            "version": WINDOWS_VERSION,
            "documents": _digest_documents(self.documents),
            "length": options.calibration_length,
            "maximum": options.calibration_sequences,
            "seed": options.seed,
        }


def read_documents(
    given: str | Sequence[str] | Sequence[Document], *, split: Split, text_key: str
) -> list[Document]:
    """Documents from names or paths (also several, separated by commas), or as they are given."""
    names: list[str | Document] = [given] if isinstance(given, str) else list(given)
    documents: list[Document] = []
    for each in names:
        if isinstance(each, Document):
            documents.append(each)
            continue
        for name in filter(None, (piece.strip() for piece in each.split(","))):
            documents += load_documents(
                name,
                split=split,
                text_key=text_key,
            )
    if not documents:
        raise DataError(
            f"There is no {split} text: nothing was given. Name a built-in set (embedded, prose, "
            "code, chat), a data set (wikitext2, c4, ptb) or a file."
        )
    return documents


def _digest_documents(documents: Sequence[Document]) -> str:
    return content_hash([[each.id, each.domain, each.text] for each in documents])


def _name(given: str | Sequence[str] | Sequence[Document]) -> str:
    if isinstance(given, str):
        return given
    names = [each if isinstance(each, str) else each.domain for each in given]
    return ",".join(dict.fromkeys(names))
