"""`PREPROCESSING+METHOD`: change the blocks first, then quantize them by any method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import SerializeAsAny, model_serializer, model_validator

from pytest_qlab.errors import SpecError
from pytest_qlab.methods.base import Method, QuantizedLayer, Stream
from pytest_qlab.methods.configured import Statistic
from pytest_qlab.methods.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.methods.blocks import BlockContext

_REST = 1.0
"""Cost of the transforms beside the method's own."""


class Composed(Method):
    """Preprocessings in the order in which they are applied, and the method that quantizes.

    Its options, as plain values, are the method's under their own names and those of a
    preprocessing behind its name: `{"bits": 3, "quarot.seed": 1}`.

    Raises:
        SpecError: these do not go together; what would is said.
    """

    preprocessings: tuple[SerializeAsAny[Preprocessing], ...]
    method: SerializeAsAny[Method]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check(self.preprocessings, self.method)
        return self

    @model_serializer(mode="plain")
    def _options(self) -> dict[str, Any]:
        of_preprocessings = {
            f"{each.name}.{key}": value
            for each in self.preprocessings
            for key, value in each.model_dump(mode="json").items()
        }
        return {**self.method.model_dump(mode="json"), **of_preprocessings}

    # What is a class variable of other methods depends here on what is composed.

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the parts: `quarot+gptq`."""
        return "+".join(each.name for each in (*self.preprocessings, self.method))

    @property
    def summary(self) -> str:  # type: ignore[override]
        """The parts' summaries."""
        return "; then ".join(each.summary for each in (*self.preprocessings, self.method))

    @property
    def cost(self) -> float:  # type: ignore[override]
        """The method's, and a little for the transforms."""
        return self.method.cost + _REST

    @property
    def stored_dtype(self) -> str | None:  # type: ignore[override]
        """The method's."""
        return self.method.stored_dtype

    @property
    def id(self) -> str:
        """The ids of the parts: `quarot-seed=1+gptq-w3g128`."""
        return "+".join(each.id for each in (*self.preprocessings, self.method))

    def identity(self) -> dict[str, Any]:
        """The identities of the parts, in order."""
        return {
            "method": self.name,
            "preprocessings": [each.identity() for each in self.preprocessings],
            "inner": self.method.identity(),
        }

    @property
    def wanted_statistics(self) -> frozenset[Statistic]:
        """The method's, or the preprocessings' where it wants none."""
        return self.method.wanted_statistics or self.original_statistics

    @property
    def stream(self) -> Stream:
        """The method's; the original model's if only preprocessings calibrate."""
        if self.method.stream == "none" and self.original_statistics:
            return "original"
        return self.method.stream

    @property
    def original_statistics(self) -> frozenset[Statistic]:
        """What the preprocessings need, and the method if it calibrates on the original model."""
        found = self.method.original_statistics
        return found.union(*(each.needs for each in self.preprocessings))

    def assign(self, model: nn.Module) -> dict[str, Method]:
        """As the method says."""
        return self.method.assign(model)

    def transform_block(self, block: BlockContext) -> None:
        """All preprocessings one after the other, then what the method itself changes."""
        for each in self.preprocessings:
            each.transform_block(block)
        self.method.transform_block(block)

    def groups_of(self, block: BlockContext) -> list[list[str]]:
        """As the method says."""
        return self.method.groups_of(block)

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        """The method's; see `Method.quantize`."""
        return self.method.quantize(weight, statistics, name=name)

    def quantize_shared(
        self, weights: Mapping[str, Tensor], statistics: LayerStatistics | None
    ) -> list[QuantizedLayer]:
        """The method's; see `Method.quantize_shared`."""
        return self.method.quantize_shared(weights, statistics)


def _check(preprocessings: tuple[Preprocessing, ...], method: Method) -> None:
    names = [each.name for each in preprocessings]
    whole = "+".join([*names, method.name])
    if not names:
        raise SpecError(f"There is no preprocessing in front of {method.name!r} to compose.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"{whole!r} has {twice!r} twice. Name each preprocessing once.")
    if isinstance(method, Composed):
        raise SpecError(f"{whole!r}: {method.name!r} is composed already; name one method last.")
    kind = type(method)
    if kind.import_model is not Method.import_model or kind.engine is not Method.engine:
        raise SpecError(
            f"{whole!r} cannot be composed: {method.name!r} takes a whole model or a finished "
            "file, and what is changed block by block does not reach it. Take a method that "
            "quantizes layer by layer, such as rtn, gptq, ggml or gguf."
        )
    for place, each in enumerate(preprocessings):
        if each.changes_basis:
            undone = next((p.name for p in preprocessings[:place] if p.scales_norms), None)
            if undone is not None:
                raise SpecError(
                    f"{whole!r}: {each.name!r} fuses the norms' weights into the layers behind "
                    f"them, which undoes what {undone!r} did there. Take one of the two."
                )
            _check_followers(whole, each.name, preprocessings[place + 1 :], method)


def _check_followers(
    whole: str, name: str, later: tuple[Preprocessing, ...], method: Method
) -> None:
    """Nothing that calibrates on the original model can follow a change of basis."""
    for each in later:
        if each.needs:
            advice = "Take one of the two." if each.scales_norms else f"Put {each.name!r} first."
            raise SpecError(
                f"{whole!r}: {each.name!r} calibrates on the original model's inputs, which "
                f"{name!r} changes. {advice}"
            )
    if method.original_statistics:
        raise SpecError(
            f"{whole!r}: {method.name!r} calibrates on the original model's inputs, which {name!r} "
            "changes. Methods that need no calibration, such as rtn, and methods that calibrate on "
            "the quantized blocks themselves, such as gptq, can follow it."
        )
