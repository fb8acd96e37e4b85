"""The noise floor of KL: the base model against itself, computed in another legal way.

Two correct implementations of the same model do not give the same bits, because they add in another
order. What that does to KL bounds what any KL can mean. The other way is what generation does: each
window in two pieces, the second of which reads the keys and values of the first from a cache. Where
a model cannot do that, each window is computed beside a copy of itself, in a batch of two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.measuring.evaluation import dense_head
from pytest_qlab.measuring.forward import targets_of
from pytest_qlab.metrics.divergence import compare_hidden, compare_logits
from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from pytest_qlab.data.windows import Window
    from pytest_qlab.lab import Lab
    from pytest_qlab.models.head import Head

CODE_VERSION = 1
WINDOWS = 8
# More than this is no rounding: the model's cache computes another function.
MOST_NATS = 0.05

Path = Callable[[Any, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class NoiseFloor:
    """KL(base || base computed in another way) per token, nats.

    Attributes:
        mean, median, p99, max: over the scored tokens.
        path: the other way, in words; empty where none of them works, and all numbers are 0.
        windows: how many were compared.
    """

    mean: float
    median: float
    p99: float
    max: float
    path: str
    windows: int

    @property
    def by_metric(self) -> dict[str, float]:
        """The floor of each measure of KL; none where it could not be measured."""
        if not self.path:
            return {}
        return {f"kl.{name}": getattr(self, name) for name in ("mean", "median", "p99", "max")}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> NoiseFloor:
        """The inverse of `to_dict`."""
        return cls(**stored)


def measure_floor(lab: Lab) -> NoiseFloor:
    """Compare the base model with itself on a few of the windows that every candidate is run on.

    They are of the first look, so that a careful assertion that stops there has not paid for more.
    Of the ways that work, the first that adds in another order counts; one may happen not to.
    """
    windows, predictions = lab.windows_of(0), lab.reference.predictions_of(0)
    count = min(len(windows), WINDOWS)
    places = [int((place + 0.5) * len(windows) / count) for place in range(count)]
    pairs = [(windows[place], predictions[place]) for place in places]
    best = NoiseFloor(0.0, 0.0, 0.0, 0.0, "", count)
    for name, path in (
        ("prefilled in two pieces", _in_two_pieces),
        ("in a batch of two", _in_a_batch_of_two),
    ):
        lab.progress(f"noise floor: base model {name}")
        found = _against_itself(lab, pairs, path)
        lab.count_forwards(count)
        if found is None or float(found.mean()) > MOST_NATS:
            continue
        median, p99 = np.quantile(found, [0.5, 0.99], method="inverted_cdf")
        best = NoiseFloor(
            float(found.mean()),
            float(median),
            float(p99),
            float(found.max()),
            f"base model {name}",
            count,
        )
        if best.mean > 0:
            break
    return best


def _against_itself(
    lab: Lab, pairs: Sequence[tuple[Window, Tensor]], path: Path
) -> NDArray[np.float64] | None:
    """KL per token, or None where the model cannot be run that way."""
    try:
        with torch.inference_mode():
            kl = torch.cat(list(_divergences(lab, pairs, path)))
    except Exception as error:  # Somebody's model code: whatever it raises, it cannot do that.
        lab.progress(f"noise floor: this way does not work for the model ({error})")
        return None
    return kl.double().cpu().numpy()


def _divergences(lab: Lab, pairs: Sequence[tuple[Window, Tensor]], path: Path) -> Iterator[Tensor]:
    """KL per token of each window, run in that way."""
    lazy, exact = lab.lazy, lab.reference.exact
    if lazy is not None:
        # One window after the other, because each keeps its keys and values in all blocks; heads
        # are compared when no block is in memory any more.
        with lazy.forwards(), _running(lazy.model, lazy.device, path, exact=exact) as run:
            found = [run(window) for window, _ in pairs]
        head = lab.reference.head
        yield from (_kl(head, *pair, each) for pair, each in zip(pairs, found, strict=True))
        return
    head = lab.reference.head
    with _running(head.model, head.weight.device, path, exact=exact) as run:
        yield from ordered_map(lambda pair: _kl(head, *pair, run(pair[0])), pairs, lab.threads)


def _kl(head: Head, window: Window, expected: Tensor, found: Tensor) -> Tensor:
    expected, targets = expected.to(found.device), targets_of(window).to(found.device)
    if not head.exact:
        return compare_logits(expected, found, targets).kl
    base = dense_head(head)
    return compare_hidden(expected, found, base, base, targets).kl


@contextmanager
def _running(
    model: Any, device: torch.device, path: Path, *, exact: bool
) -> Iterator[Callable[[Window], Tensor]]:
    """As `measuring.forward.predict`, by another path: float32 (scored, hidden or vocabulary)."""
    here = threading.local()  # Windows run in several threads, and the hook is the module's.

    def keep(_module: Any, args: tuple[Tensor, ...]) -> None:
        here.seen.append(args[0][:1])

    def run(window: Window) -> Tensor:
        here.seen = []
        logits = path(model, torch.tensor([window.ids], device=device))
        found = torch.cat(here.seen if exact else [each[:1] for each in logits], dim=1)
        return found[0, window.first_scored - 1 : len(window.ids) - 1].float()

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield run
    finally:
        handle.remove()


def _in_two_pieces(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    half = ids.shape[1] // 2
    first = model(input_ids=ids[:, :half], use_cache=True)
    second = model(input_ids=ids[:, half:], past_key_values=first.past_key_values, use_cache=True)
    return first.logits, second.logits


def _in_a_batch_of_two(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    return (model(input_ids=ids.repeat(2, 1), use_cache=False).logits,)
