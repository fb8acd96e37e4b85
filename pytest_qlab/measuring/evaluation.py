"""Run a candidate over the evaluation windows and compare it with the base model by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_qlab.errors import EngineError, ModelError
from pytest_qlab.measuring.forward import predict, targets_of
from pytest_qlab.measuring.streamed import predicting
from pytest_qlab.metrics.divergence import (
    DenseHead,
    HiddenComparison,
    TokenComparison,
    compare_hidden,
    compare_logits,
    compare_states,
    join_comparisons,
)
from pytest_qlab.metrics.tokens import TokenArrays
from pytest_qlab.models.head import Head, head_of
from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.engines.base import Engine
    from pytest_qlab.lab import Lab
    from pytest_qlab.measuring.parts import Parts


def comparable_head(lab: Lab, model: Any) -> Head:
    """The head of `model`.

    Raises:
        ModelError: its logits are made in another way than the base model's.
    """
    return _comparable(lab, head_of(model))


def _comparable(lab: Lab, head: Head) -> Head:
    if head.exact != lab.reference.exact:
        raise ModelError(
            "The quantized model's logits are made from its hidden states in another way than the "
            "base model's, so the two cannot be compared."
        )
    return head


def evaluate(lab: Lab, head: Head, look: int) -> TokenArrays:
    """Per-token comparisons of a model with the base model over the windows that one look adds.

    One forward pass for each window yields every fidelity measure; no [tokens, vocabulary] matrix
    is made unless the model's logits cannot be computed from its hidden states.

    Args:
        lab: whose evaluation windows they are.
        head: of the model, as `comparable_head` finds it.
        look: number of the look.
    """
    windows, expected = lab.windows_of(look), lab.reference.predictions_of(look)
    return _compare(lab, head, look, expected, lambda place: predict(head, windows[place]))


def evaluate_streamed(
    lab: Lab, parts: Parts, look: int, directory: Path, progress: Callable[[str], None]
) -> TokenArrays:
    """`evaluate` for a model that is read block by block, to the bit; one pass over its blocks.

    Args:
        parts: of the model, for this call only.
        directory: for hidden states; made, and removed in the end.
        progress: called with a line for each block.

    Raises:
        ModelError: its logits are made in another way than the base model's.
    """
    windows, expected = lab.windows_of(look), lab.reference.predictions_of(look)
    with predicting(parts, windows, directory, threads=lab.threads, progress=progress) as ended:
        return _compare(lab, _comparable(lab, ended.head), look, expected, ended.predict)


def _compare(
    lab: Lab, head: Head, look: int, expected: Sequence[Tensor], run: Callable[[int], Tensor]
) -> TokenArrays:
    """Compare what `run` predicts for the window at each place of a look with what is expected."""
    windows = lab.windows_of(look)
    base_head = lab.reference.head
    base_dense, dense = dense_head(base_head), dense_head(head)

    def compare(place: int) -> tuple[TokenComparison, HiddenComparison | None]:
        found = run(place)
        base = expected[place].to(found.device)
        targets = targets_of(windows[place]).to(found.device)
        if not head.exact:
            return compare_logits(base, found, targets), None
        tokens = compare_hidden(base, found, base_dense, dense, targets)
        return tokens, compare_states(base, found)

    comparisons: list[TokenComparison] = []
    states: list[HiddenComparison] = []
    places = range(len(windows))
    with torch.inference_mode():
        for number, (tokens, state) in enumerate(ordered_map(compare, places, lab.threads), 1):
            comparisons.append(tokens)
            if state is not None:
                states.append(state)
            if number % 16 == 0:
                lab.progress(f"evaluating: window {number}/{len(windows)}")
    lab.count_forwards(len(windows))
    documents = [window.document for window in windows]
    return TokenArrays.collect(comparisons, documents, states or None)


def evaluate_engine(lab: Lab, engine: Engine, look: int) -> TokenArrays:
    """Per-token comparisons of another runtime's logits with the base model's, as `evaluate`.

    The runtime gives no hidden states, so those are not compared.

    Raises:
        EngineError: it gives logits of another shape than it was asked for.
    """
    windows, head = lab.windows_of(look), lab.reference.head
    comparisons: list[TokenComparison] = []
    pairs = zip(windows, lab.reference.predictions_of(look), strict=True)
    for number, (window, expected) in enumerate(pairs, 1):
        targets, start = targets_of(window), 0
        pieces: list[TokenComparison] = []
        for piece in engine.logits(window.ids, window.first_scored - 1):
            rows = slice(start, start + len(piece))
            start = rows.stop
            base = expected[rows].to(head.weight.device)
            base = head.logits_from_hidden(base) if head.exact else base
            pieces.append(compare_logits(base.cpu(), piece, targets[rows]))
        if start != window.scored:
            raise EngineError(
                f"{engine.name} gave predictions for {start} tokens of a window of which "
                f"{window.scored} are scored. Use another version of it."
            )
        comparisons.append(join_comparisons(pieces))
        if number % 16 == 0:
            lab.progress(f"evaluating with {engine.name}: window {number}/{len(windows)}")
    lab.count_forwards(len(windows))
    return TokenArrays.collect(comparisons, [window.document for window in windows])


def dense_head(head: Head) -> DenseHead:
    """The head as the streaming comparison wants it."""
    return DenseHead(head.weight, head.bias, head.scale, head.soft_cap)
