"""Which layers did it, in units of what is judged: the KL that each quantized layer causes alone.

One quantized layer at a time is put into the base model, in the original model's terms, and the
forward is continued from the hidden states in front of its block. The sum of these divergences
beside that of the whole candidate says how far the layers' errors add up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.checkpoint import (
    instantiate,
    place_embeddings,
    replace_parameter,
    structural_copy,
)
from pytest_qlab.kernels.packed import set_materialized
from pytest_qlab.measuring.evaluation import dense_head
from pytest_qlab.measuring.forward import predict
from pytest_qlab.measuring.layers import LayerError
from pytest_qlab.measuring.resume import Resumable
from pytest_qlab.measuring.swapped import swapped
from pytest_qlab.metrics.anchored import Anchor
from pytest_qlab.models.head import Head, head_of
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears
from pytest_qlab.parallel import ordered_map
from pytest_qlab.results import Additivity

if TYPE_CHECKING:
    from pytest_qlab.checkpoint import Checkpoint
    from pytest_qlab.data.windows import Window
    from pytest_qlab.lab import Lab
    from pytest_qlab.methods.base import QuantizedLayer

CODE_VERSION = 1
WINDOWS, SCORED = 8, 96
ANCHOR_BYTES = 2**29
ADDITIVE_WITHIN = 0.25
# A layer's name up to the number of its block.
_BLOCK = re.compile(r"(.*?\.\d+(?=\.))?")


@dataclass(frozen=True)
class Attribution:
    """The error budget of a candidate; divergences are KL(base || ...) per token, nats.

    Attributes:
        layers: KL of the base model with only that layer quantized, by name, in model order.
        embeddings: the same of a quantized input embedding (with a head that is tied to it) and
            output head.
        rest: the same of all other parameters that the candidate changed; 0 where it changed none,
            and where a method folded scales or rotated, which the layers' own terms take back.
        total: KL of the whole candidate on the same tokens, run in torch.
        control: KL of the base model with nothing replaced, run as the others are: 0, exactly.
        resumed: whether forwards could be continued; False if continued ones were found to give
            other bits, so that all forwards ran from the start.
        windows, tokens: on how much of the evaluation text.
    """

    layers: dict[str, float]
    embeddings: dict[str, float]
    rest: float
    total: float
    control: float
    resumed: bool
    windows: int
    tokens: int

    @property
    def sum(self) -> float:
        """What the parts cause, each alone, added up."""
        return sum(self.layers.values()) + sum(self.embeddings.values()) + self.rest

    @property
    def additivity(self) -> float:
        """`sum` over `total`: 1 where errors add up, less where they reinforce each other.

        It is 1 by definition where both are 0.
        """
        if self.total == 0:
            return 1.0 if self.sum == 0 else float("inf")
        return self.sum / self.total

    @property
    def additive(self) -> bool:
        """Whether `sum` is within a quarter of `total`, so that shares can be taken literally."""
        return abs(self.additivity - 1) <= ADDITIVE_WITHIN

    def largest(self, count: int = 3) -> list[tuple[str, float]]:
        """Name and KL of the parts that cause most, largest first; parts that cause none are not.

        All changed parameters that are in no matrix are one part, `(other parameters)`.
        """
        parts = {**self.layers, **self.embeddings, "(other parameters)": self.rest}
        ranked = sorted(parts.items(), key=lambda part: part[1], reverse=True)
        return [(name, kl) for name, kl in ranked[:count] if kl > 0]

    def summary(self) -> Additivity:
        """All but the layers, for the results document."""
        return Additivity(
            sum=self.sum,
            total=self.total,
            embeddings=self.embeddings,
            rest=self.rest,
            windows=self.windows,
            tokens=self.tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; layers in a list, since JSON's objects are stored without an order."""
        return {**asdict(self), "layers": list(self.layers.items())}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Attribution:
        """The inverse of `to_dict`."""
        return cls(**{**stored, "layers": dict(stored["layers"])})


@dataclass(frozen=True, eq=False, repr=False)
class Layer(LayerError):
    """A quantized layer with the KL that it causes alone, which is computed when first read."""

    _attribution: Callable[[], Attribution]

    # Not the source: two layers are equal if what was measured on them is.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layer) and _measured(self) == _measured(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in _measured(self).items())
        return f"Layer({fields})"

    @property
    def kl(self) -> float:
        """KL(base || base with only this layer quantized) per token, nats.

        All layers are computed with the first that is asked for.
        """
        return self._attribution().layers[self.name]


def _measured(layer: LayerError) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in LayerError.__dataclass_fields__}


def beginnings(windows: Sequence[Window]) -> list[Window]:
    """Of `WINDOWS` windows at equal distances, what scores their first `SCORED` tokens."""
    count = min(len(windows), WINDOWS)
    chosen = [windows[int((place + 0.5) * len(windows) / count)] for place in range(count)]
    return [replace(each, ids=each.ids[: each.first_scored + SCORED]) for each in chosen]


def runs(linears_of_blocks: Sequence[int], windows: int) -> float:
    """How many forward passes over a window `attribute` takes, continued ones as their share."""
    blocks = len(linears_of_blocks)
    shares = sum(count * (blocks - index) / blocks for index, count in enumerate(linears_of_blocks))
    return windows * (shares + 2)


def affordable(lab: Lab, checkpoint: Checkpoint) -> bool:
    """Whether `attribute` can run, on no more tokens than the evaluation of one candidate does."""
    if lab.lazy is not None:
        return False
    blocks = Counter(_BLOCK.match(name)[0] for name in checkpoint.index["layers"])  # type: ignore[index]
    windows = lab.eval_data.windows
    some = beginnings(windows)
    tokens = sum(len(window.ids) for window in some) / len(some)
    whole = sum(len(window.ids) for window in windows)
    return tokens * runs(list(blocks.values()), len(some)) <= whole


def attribute(lab: Lab, checkpoint: Checkpoint) -> Attribution:
    """Measure every quantized part of a checkpoint alone, and all of them together.

    Raises:
        MetricError: the model is read block by block.
    """
    lab.check_whole("Attributions of the damage to layers")
    return _Swaps(lab, checkpoint).measure()


class _Swaps:
    """The base model's side of all swaps: a model to swap in, windows, predictions."""

    def __init__(self, lab: Lab, checkpoint: Checkpoint) -> None:
        self._lab, self._checkpoint = lab, checkpoint
        self._windows = beginnings(lab.eval_data.windows)
        self._tokens = sum(window.scored for window in self._windows)
        self._model = structural_copy(lab.base_model)
        self._head = head_of(self._model)
        self._anchors = self._anchored()
        self._blocks = decoder_blocks(self._model)
        self._resumable = Resumable(self._model)

    def _map(self, function: Callable[[int], Any]) -> list[Any]:
        self._lab.count_forwards(len(self._windows))
        return list(ordered_map(function, range(len(self._windows)), self._lab.threads))

    def _logits(self, head: Head, predicted: Tensor) -> Tensor:
        """Float32 (T, V), as the evaluation makes them."""
        if not head.exact:
            return predicted
        return dense_head(head).logits_tile(predicted, 0, head.weight.shape[0])

    def _anchored(self) -> Callable[[int], Anchor]:
        """The base model's distributions over each window, kept unless the vocabulary is large."""
        head = self._head
        predictions = self._map(lambda place: predict(head, self._windows[place]))

        def anchor(place: int) -> Anchor:
            with torch.inference_mode():
                return Anchor(self._logits(head, predictions[place]))

        if 8 * self._tokens * head.weight.shape[0] > ANCHOR_BYTES:
            return anchor
        kept = [anchor(place) for place in range(len(predictions))]
        return lambda place: kept[place]

    def _kl(self, head: Head, run: Callable[[int], Tensor]) -> float:
        """Mean over all tokens of the divergence of what `run` predicts for each window."""

        def one(place: int) -> float:
            logits = self._logits(head, run(place))
            return float(self._anchors(place).kl(logits).sum())

        return float(sum(self._map(one))) / self._tokens

    def _kl_of_model(self, model: Any) -> float:
        head = head_of(model)
        set_materialized(model, True)
        return self._kl(head, lambda place: predict(head, self._windows[place]))

    def _continuing(self, start: int, states: Sequence[Any]) -> Callable[[int], Tensor]:
        """What runs a window's forward from a block on; `states` are those in front of it."""
        return lambda place: self._resumable.run(lambda: self._plain(place), start, states[place])

    def measure(self) -> Attribution:
        checkpoint, base = self._checkpoint, self._lab.base_model
        quantized, scales = checkpoint.layers(), checkpoint.scales()
        others, rotations = checkpoint.others(), checkpoint.rotations()
        control, resumed = self._control(), True
        if control != 0:
            control, resumed = self._kl(self._head, self._plain), False
        layers: dict[str, float] = {}
        states: list[Any] = [None] * len(self._windows)
        for index, (prefix, block) in enumerate(self._blocks):
            self._lab.progress(f"attributing damage: block {index + 1}/{len(self._blocks)}")
            run = self._continuing(index, states) if resumed else self._plain
            for site in quantizable_linears(block, prefix):
                bias = others.get(f"{site.name}.bias")
                module = swapped(
                    site,
                    quantized[site.name],
                    bias,
                    scales.get(site.name, {}),
                    rotations.get(site.name),
                )
                site.replace(self._model, module)
                layers[site.name] = self._kl(self._head, run)
                setattr(site.parent, site.attribute, site.module)
            if resumed:
                states = self._advance(index, states, range(len(states)))
        embeddings = {
            name: self._kl_of_model(self._with_embedding(name, layer))
            for name, layer in checkpoint.embeddings().items()
        }
        return Attribution(
            layers=layers,
            embeddings=embeddings,
            rest=0.0 if scales or rotations else self._rest(others, set(quantized)),
            total=self._kl_of_model(instantiate(checkpoint, base)),
            control=control,
            resumed=resumed,
            windows=len(self._windows),
            tokens=self._tokens,
        )

    def _plain(self, place: int) -> Tensor:
        return predict(self._head, self._windows[place])

    def _advance(self, index: int, states: Sequence[Any], places: Iterable[int]) -> list[Any]:
        """What block `index` puts out for some windows, given what the block before it did."""

        def one(place: int) -> Any:
            return self._resumable.boundary(lambda: self._plain(place), index, states[place])

        return list(ordered_map(one, places, self._lab.threads))

    def _control(self) -> float:
        """The largest divergence of forwards that are continued from a block, nothing replaced.

        Two windows take turns, so that what a model keeps from one forward for the next shows.
        """
        worst, places = 0.0, range(min(len(self._windows), 2))
        states: list[Any] = [None] * len(places)
        self._lab.count_forwards(len(places))
        try:
            for index in range(len(self._blocks)):
                run = self._continuing(index, states)
                for place in places:
                    with torch.inference_mode():
                        found = self._anchors(place).kl(self._logits(self._head, run(place)))
                        worst = max(worst, float(found.max()))
                states = self._advance(index, states, places)
        except Exception:  # Model code that cannot be run like this; whole forwards remain.
            return float("inf")
        return worst

    def _with_embedding(self, name: str, layer: QuantizedLayer) -> Any:
        model = structural_copy(self._lab.base_model)
        with torch.no_grad():
            place_embeddings(model, {name: layer}, next(model.parameters()))
        return model.eval()

    def _rest(self, others: Mapping[str, Tensor], quantized: set[str]) -> float:
        """What parameters cause that belong to no quantized matrix."""
        model = structural_copy(self._lab.base_model)
        changed = False
        for name, original in list(model.named_parameters()):
            if name not in others or name.removesuffix(".bias") in quantized:
                continue
            value = others[name].to(dtype=original.dtype, device=original.device)
            if not torch.equal(value, original):
                changed = True
                replace_parameter(model, name, value)
        return self._kl_of_model(model) if changed else 0.0
