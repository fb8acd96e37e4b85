"""Saved baselines: what is kept of a release's candidates, as a JSON file that is fit for git.

A file has sums per evaluation window, so that a later candidate can be compared with it window by
window without running the old one again. It has no times and no paths: the same measurements give
the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pytest_qlab.errors import BaselineError, did_you_mean

SCHEMA_VERSION = 1
SUFFIX = ".json"
SUM_DIGITS = 6
"""Significant digits of sums: 5e-7 of a window's sum, far below what windows differ by."""
VALUE_DIGITS = 12
"""Significant digits of counted numbers, such as bytes."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def rounded(value: float, digits: int = SUM_DIGITS) -> float:
    """The number with so many significant digits."""
    return float(f"{float(value):.{digits}g}")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Windows(_Model):
    """What all candidates share of the evaluation windows, one number for each window.

    Attributes:
        digest: hex SHA-256 of the convention and all token ids that are scored.
        domains: names; `domain` has indices into them.
        document: which document it is from. tokens: how many are scored.
        base_nll: sum of the base model's losses, nats. hidden_signal: sum of its squared final
            hidden states, or empty.
    """

    digest: str
    name: str = ""
    convention: str
    domains: list[str]
    domain: list[Count]
    document: list[Count]
    tokens: list[Annotated[int, Field(gt=0)]]
    base_nll: list[NotNegative]
    hidden_signal: list[NotNegative] = Field(default_factory=list)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        count = len(self.tokens)
        own = (self.domain, self.document, self.base_nll)
        if not count or any(len(each) != count for each in own):
            raise ValueError(f"the {count} windows do not have one number each")
        if len(self.hidden_signal) not in (0, count):
            raise ValueError("hidden_signal has not one number for each window")
        if max(self.domain) >= len(self.domains):
            raise ValueError("a window is of no domain")
        return self


class Sums(_Model):
    """What is kept of a candidate's predictions: sums over the tokens of each window.

    Attributes:
        delta: of its losses minus the base model's, nats. kl: of KL(base || candidate), nats.
        tail: tokens of more than 1 nat. agree: tokens with the same most likely token.
        hidden_error, hidden_distance: of the final hidden states, or empty: the squared error, and
            1 - their cosine, whose digits are those that tell candidates apart.
    """

    delta: list[float]
    kl: list[float]
    tail: list[Count]
    agree: list[Count]
    hidden_error: list[NotNegative] = Field(default_factory=list)
    hidden_distance: list[float] = Field(default_factory=list)


class LatencySummary(_Model):
    """Paired rounds in brief: medians in seconds, their ratio with its interval, the machine."""

    p50: Positive
    baseline_p50: Positive
    ratio: Positive
    ratio_lower: Positive
    ratio_upper: Positive
    rounds: Count
    threads: Count
    convention: str
    processor: str
    cores: int
    simulated: bool = False


class SavedCandidate(_Model):
    """One candidate.

    Attributes:
        quantized: key of the packed model in the store.
        calibration: hash of the sequences, where anything depends on them.
        measures: values, for whoever reviews the file and for counted numbers.
        memory_dtype: what memory was measured in; empty if it was not, or by another runtime.
        latency: of a prefill of 128 tokens. latencies: of other phases, by what comes after
            `latency.` in the names of their measures, such as `decode.`.
    """

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    quantized: str = ""
    calibration: str = ""
    measures: dict[str, float] = Field(default_factory=dict)
    memory_dtype: str = ""
    sums: Sums | None = None
    latency: LatencySummary | None = None
    latencies: dict[str, LatencySummary] = Field(default_factory=dict)

    def timed(self, metric: str) -> LatencySummary | None:
        """What a measure such as `latency.decode.p50` is compared by, if it was timed."""
        prefix, dot, _ = metric.removeprefix("latency.").rpartition(".")
        return self.latencies.get(prefix + dot) if dot else self.latency

    def merge(self, other: SavedCandidate) -> None:
        """Take over what another process knows of the same candidate.

        Raises:
            BaselineError: it was made otherwise, or does otherwise.
        """
        twice = self.sums is not None and other.sums is not None and self.sums != other.sums
        ours, theirs = ((each.method, each.options) for each in (self, other))
        texts = {self.calibration, other.calibration} - {""}
        if twice or ours != theirs or len(texts) > 1:
            raise BaselineError(
                f"This run has two candidates of one name made by {self.method}, with other "
                "options or other calibration text, and a baseline holds one. Save them in "
                "separate runs, with a name each."
            )
        self.measures.update(other.measures)
        self.memory_dtype = other.memory_dtype or self.memory_dtype
        self.quantized = other.quantized or self.quantized
        self.calibration = other.calibration or self.calibration
        self.sums = other.sums or self.sums
        self.latency = other.latency or self.latency
        self.latencies.update(other.latencies)


class Subject(_Model):
    """The model that was quantized: its hash and the numbers it computes in; versions."""

    id: str
    name: str
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)


class Baseline(_Model):
    """A file: one model, one set of windows, some candidates."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    generator: Literal["pytest-qlab baseline"] = "pytest-qlab baseline"
    model: Subject
    windows: Windows | None = None
    candidates: dict[str, SavedCandidate] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, candidate in self.candidates.items():
            sums = candidate.sums
            if sums is None:
                continue
            tokens = self.windows.tokens if self.windows is not None else []
            signal = self.windows.hidden_signal if self.windows is not None else []
            own = {len(sums.delta), len(sums.kl), len(sums.tail), len(sums.agree)}
            hidden = {len(sums.hidden_error), len(sums.hidden_distance)}
            if own != {len(tokens)} or hidden not in ({0}, {len(signal)}):
                raise ValueError(f"{name} has not one sum for each of the {len(tokens)} windows")
            counts = zip(tokens, sums.tail, sums.agree, strict=True)
            if any(most < max(found) for most, *found in counts):
                raise ValueError(f"{name} counts more tokens than a window has")
        return self

    def merge(self, other: Baseline) -> None:
        """Take over what another test or process measured.

        Raises:
            BaselineError: of another model, on other windows, or of another candidate of that name.
        """
        ours, theirs = self.windows, other.windows
        same = self.model == other.model
        if ours is not None and theirs is not None:
            same = same and ours.digest == theirs.digest
        if not same:
            raise BaselineError(
                "This run measured several models or evaluation sets, and a baseline holds one of "
                "each. Save them in separate runs, with a name each."
            )
        # A candidate in a foreign runtime has no hidden states, and the base model's losses beside
        # it are computed from whole logits: whatever was first, the file is the same.
        if ours is None or (theirs is not None and theirs.hidden_signal):
            self.windows = theirs
        for name, candidate in other.candidates.items():
            known = self.candidates.get(name)
            if known is None:
                self.candidates[name] = candidate
            else:
                known.merge(candidate)

    def to_text(self) -> str:
        """The file: keys in a fixed order, a line for each number or series."""
        document = self.model_dump(mode="json")
        document["candidates"] = _sorted(document["candidates"])
        for candidate in document["candidates"].values():
            for part in ("options", "measures"):
                candidate[part] = _sorted(candidate[part])
        document["model"]["versions"] = _sorted(document["model"]["versions"])
        return f"{_lines(document, '')}\n"

    def write(self, path: Path) -> str:
        """Write the file atomically.

        Returns:
            `written`, `replaced`, or `unchanged`.
        """
        text = self.to_text()
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before == text:
            return "unchanged"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
        return "written" if before is None else "replaced"

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a file.

        Raises:
            BaselineError: there is none, it is damaged, or of another schema.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BaselineError(f"The baseline {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise BaselineError(f"The baseline {path} is not JSON: {error}. {_REMEDY}") from error
        version = document.get("schema_version") if isinstance(document, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BaselineError(
                f"The baseline {path} has schema version {version}, and this pytest-qlab reads "
                f"version {SCHEMA_VERSION}. Upgrade pytest-qlab, or save the baseline again."
            )
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BaselineError(
                f"The baseline {path} is damaged: {where + ': ' if where else ''}{first['msg']}. "
                f"{_REMEDY}"
            ) from error


_REMEDY = "Restore it from version control, or save it again with --qlab-save."


def _sorted(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: table[key] for key in sorted(table)}


def _lines(value: Any, indent: str) -> str:
    """JSON with a line for each key; a list of numbers or names is one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(_short(value), ensure_ascii=False)
    inner = f"{indent} "
    parts = [
        f"{inner}{json.dumps(key, ensure_ascii=False)}: {_lines(item, inner)}"
        for key, item in value.items()
    ]
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


def _short(value: Any) -> Any:
    """Whole numbers without a fraction."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def check_name(name: str, option: str) -> str:
    """The name, if it can be a file's; without the file's suffix.

    Raises:
        BaselineError: it cannot.
    """
    if not NAME.fullmatch(name):
        raise BaselineError(
            f"{option}: expected a name of letters, digits, '_', '-' and '.', such as release-1.2, "
            f"got {name!r}. Files are in the directory that --qlab-baselines names."
        )
    return name.removesuffix(SUFFIX)


def names_in(directory: Path) -> list[str]:
    """The baselines of a directory in natural order: v1.10 is after v1.9."""
    found = [path.stem for path in directory.glob(f"*{SUFFIX}") if not path.name.startswith(".")]
    return sorted(found, key=_natural)


def _natural(name: str) -> tuple[Any, ...]:
    pieces = re.split(r"(\d+)", name)  # every second one is a number
    return tuple(int(piece) if place % 2 else piece for place, piece in enumerate(pieces))


def find(directory: Path, name: str) -> Path | None:
    """The file of that name, or of the last name where it is empty; None where there is none."""
    if name:
        path = directory / f"{name}{SUFFIX}"
        return path if path.is_file() else None
    names = names_in(directory)
    return directory / f"{names[-1]}{SUFFIX}" if names else None


def missing(directory: Path, name: str) -> str:
    """What to say where `find` finds nothing."""
    known = names_in(directory)
    if not name or not known:
        what = f"baseline {name!r}" if name else "baseline"
        return (
            f"there is no {what} in {directory}. Save one with --qlab-save="
            f"{name or 'NAME'} in a run that passes, and commit it."
        )
    return f"there is no baseline {name!r} in {directory}.{did_you_mean(name, known)}"
