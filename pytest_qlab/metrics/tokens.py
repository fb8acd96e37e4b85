"""Per-token comparisons of a candidate with its baseline, and their sums over windows.

All fidelity measures are computed from these arrays. They are stored as plain tensors, so that
measures, intervals and budgets can be computed again without any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.divergence import HiddenComparison, TokenComparison

TAIL_NATS = 1.0
_HIDDEN = ("hidden_signal", "hidden_error", "hidden_cosine")

WINDOW_SUMS = np.dtype(
    [
        ("window", np.int64),
        ("document", np.int64),
        ("tokens", np.int64),
        ("base_nll", np.float64),
        ("base_nll_squared", np.float64),
        ("candidate_nll", np.float64),
        ("candidate_nll_squared", np.float64),
        ("delta", np.float64),
        ("delta_squared", np.float64),
        ("kl", np.float64),
        ("kl_squared", np.float64),
        ("kl_tail", np.int64),
        ("agree", np.int64),
        ("hidden_signal", np.float64),
        ("hidden_error", np.float64),
        ("hidden_cosine", np.float64),
        ("hidden_cosine_squared", np.float64),
    ]
)
"""One row for each window with scored tokens: its number, its document, and sums over its tokens.

`delta` sums candidate_nll - base_nll; `kl_tail` counts tokens with more than 1 nat; the hidden
columns are 0 where hidden states were not compared.
"""


@dataclass(frozen=True, eq=False)
class TokenArrays:
    """N scored tokens of W windows, in the windows' order.

    Attributes:
        base_nll, candidate_nll, kl: float32 (N,), nats.
        agree: bool (N,), whether both models find the same token most likely.
        window: int32 (N,), the window of each token. document: int32 (W,), that of each window.
        hidden_signal, hidden_error, hidden_cosine: float32 (N,), as `HiddenComparison`; None where
            hidden states were not compared.
    """

    base_nll: NDArray[np.float32]
    candidate_nll: NDArray[np.float32]
    kl: NDArray[np.float32]
    agree: NDArray[np.bool_]
    window: NDArray[np.int32]
    document: NDArray[np.int32]
    hidden_signal: NDArray[np.float32] | None = None
    hidden_error: NDArray[np.float32] | None = None
    hidden_cosine: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        per_token = self._per_token()
        lengths = {name: len(array) for name, array in per_token.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays of tokens differ in length: {lengths}")
        if len(self.base_nll) == 0:
            raise MetricError(
                "No token was scored, so there is nothing to measure. Give more evaluation text "
                "(--qlab-eval), or windows that are long enough to have scored tokens."
            )
        if self.window.min() < 0 or self.window.max() >= len(self.document):
            raise ValueError("a token belongs to a window that has no document")
        missing = [name for name in _HIDDEN if getattr(self, name) is None]
        if missing and len(missing) < len(_HIDDEN):
            raise ValueError(f"hidden states are compared by all three arrays; missing: {missing}")
        for name, array in per_token.items():
            self._check_finite(name, array)

    def _check_finite(self, name: str, array: NDArray[Any]) -> None:
        bad = np.flatnonzero(~np.isfinite(array))
        if bad.size:
            raise MetricError(
                f"{name} is NaN or infinite for {bad.size:,} of {array.size:,} scored tokens, "
                f"first in window {int(self.window[bad[0]])}; such tokens are not averaged away. "
                "The candidate gives no probability to what the baseline expects, or its numbers "
                "overflow: evaluate in float32 (--qlab-dtype=float32) and check its layers."
            )

    def _per_token(self) -> dict[str, NDArray[Any]]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "document"}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def has_hidden(self) -> bool:
        """Whether hidden states were compared."""
        return self.hidden_signal is not None

    @property
    def identical(self) -> bool:
        """Whether the candidate did exactly what the baseline does, on every token."""
        same = np.array_equal(self.base_nll, self.candidate_nll)
        moved = self.kl.any() or (self.hidden_error is not None and self.hidden_error.any())
        return bool(same and not moved and self.agree.all())

    @cached_property
    def windows(self) -> NDArray[np.void]:
        """Sums over each window with scored tokens, of dtype `WINDOW_SUMS`."""
        count = len(self.document)
        tokens = np.bincount(self.window, minlength=count)
        rows = np.zeros(count, dtype=WINDOW_SUMS)
        rows["window"], rows["document"], rows["tokens"] = np.arange(count), self.document, tokens

        def fill(name: str, values: NDArray[Any], *, squared: bool = True) -> None:
            exact = values.astype(np.float64)
            rows[name] = np.bincount(self.window, weights=exact, minlength=count)
            if squared:
                rows[f"{name}_squared"] = np.bincount(
                    self.window, weights=np.square(exact), minlength=count
                )

        fill("base_nll", self.base_nll)
        fill("candidate_nll", self.candidate_nll)
        fill("delta", self.candidate_nll.astype(np.float64) - self.base_nll)
        fill("kl", self.kl)
        fill("kl_tail", self.kl > TAIL_NATS, squared=False)
        fill("agree", self.agree, squared=False)
        if self.hidden_signal is not None:
            assert self.hidden_error is not None
            assert self.hidden_cosine is not None
            fill("hidden_signal", self.hidden_signal, squared=False)
            fill("hidden_error", self.hidden_error, squared=False)
            fill("hidden_cosine", self.hidden_cosine)
        return rows[tokens > 0]

    def of_documents(self, documents: Sequence[int]) -> Self | None:
        """Only the tokens of these documents, windows renumbered; None if there are none."""
        kept = np.isin(self.document, np.asarray(documents))
        tokens = kept[self.window]
        if not tokens.any():
            return None
        renumbered = (np.cumsum(kept) - 1).astype(np.int32)
        arrays = {name: array[tokens] for name, array in self._per_token().items()}
        arrays["window"] = renumbered[arrays["window"]]
        return type(self)(**arrays, document=self.document[kept])

    @classmethod
    def joined(cls, parts: Sequence[Self], places: Sequence[Sequence[int]]) -> Self:
        """All windows of several parts, in the order of their places.

        Args:
            parts: disjoint sets of windows, each in the order of its places.
            places: for each part, the place of each of its windows among those of all.
        """
        if len(parts) == 1:
            return parts[0]
        place = np.concatenate([np.asarray(each, dtype=np.int64) for each in places])
        rank = np.argsort(np.argsort(place)).astype(np.int32)
        firsts = np.cumsum([0, *(len(part.document) for part in parts[:-1])])
        window = np.concatenate(
            [rank[part.window + first] for part, first in zip(parts, firsts, strict=True)]
        )
        order = np.argsort(window, kind="stable")
        per_token = [part._per_token() for part in parts]
        arrays = {
            name: np.concatenate([each[name] for each in per_token])[order]
            for name in per_token[0]
            if name != "window"
        }
        document = np.concatenate([part.document for part in parts])[np.argsort(place)]
        return cls(**arrays, window=window[order], document=document)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as plain tensors, for safetensors."""
        arrays = {**self._per_token(), "document": self.document}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`.

        Raises:
            MetricError: an array is missing or unknown.
        """
        known = {f.name for f in fields(cls)}
        required = known - set(_HIDDEN)
        if not required <= set(tensors) <= known:
            raise MetricError(
                f"The stored evaluation has the arrays {', '.join(sorted(tensors))}, but needs "
                f"{', '.join(sorted(required))}. It was written by another version: delete it "
                "and run again."
            )
        return cls(**{name: tensor.numpy() for name, tensor in tensors.items()})

    @classmethod
    def collect(
        cls,
        comparisons: Sequence[TokenComparison],
        documents: Sequence[int],
        hidden: Sequence[HiddenComparison] | None = None,
    ) -> Self:
        """Join the comparisons of all windows, given in order with the document of each.

        Raises:
            MetricError: no token was scored, or a value is not finite.
        """
        if len(documents) != len(comparisons) or len(comparisons) != len(hidden or comparisons):
            raise ValueError("there must be one comparison and one document for each window")
        if not comparisons:
            raise MetricError("No window was evaluated. Give more evaluation text (--qlab-eval).")

        def joined(parts: Sequence[object], name: str) -> NDArray[Any]:
            array: NDArray[Any] = torch.cat([getattr(part, name) for part in parts]).cpu().numpy()
            return array

        lengths = [len(comparison.kl) for comparison in comparisons]
        extra = {}
        if hidden is not None:
            extra = {f"hidden_{n}": joined(hidden, n) for n in ("signal", "error", "cosine")}
        return cls(
            **{n: joined(comparisons, n) for n in ("base_nll", "candidate_nll", "kl", "agree")},
            window=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            document=np.asarray(documents, dtype=np.int32),
            **extra,
        )
