"""What calibration knows about the inputs of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

STRIPS, SMALLEST_STRIP = 8, 96


@dataclass
class LayerStatistics:
    """Statistics of a linear layer's inputs over all calibration tokens, n = in_features.

    Attributes:
        tokens: number of tokens seen; 0 for an expert that was never reached.
        minimum, maximum: float32 [n], per input channel.
        mean_abs: float32 [n], mean over tokens of |x|.
        square_sum: float32 [n], sum over tokens of x**2; over `tokens`, the importance of a column
            (llama.cpp's imatrix).
        gram: float32 [n, n], sum over tokens of x x^T; None where only channels were asked for.
        fisher: float32 [m, n], of each of the layer's m x n weights the sum over sequences of the
            squared gradient of the loss, which belongs to the layer and not to its inputs alone;
            None where it was not asked for.
    """

    tokens: int
    minimum: Tensor
    maximum: Tensor
    mean_abs: Tensor
    square_sum: Tensor
    gram: Tensor | None = None
    fisher: Tensor | None = None

    def rescaled(self, scale: Tensor) -> LayerStatistics:
        """Statistics of the inputs x / scale, for a positive scale of shape [n].

        The weight's columns are multiplied by it, so that its gradients are divided.
        """
        return LayerStatistics(
            self.tokens,
            self.minimum / scale,
            self.maximum / scale,
            self.mean_abs / scale,
            self.square_sum / scale**2,
            None if self.gram is None else self.gram / scale / scale[:, None],
            None if self.fisher is None else self.fisher / scale**2,
        )

    def rescaled_rows(self, scale: Tensor) -> LayerStatistics:
        """Statistics of a layer whose weight's rows were divided by a positive scale of shape [m].

        Those of the inputs stay; gradients are multiplied by it.
        """
        if self.fisher is None:
            return self
        return replace(self, fisher=self.fisher * scale[:, None] ** 2)

    def to(self, device: torch.device) -> LayerStatistics:
        """The same statistics on another device."""
        return LayerStatistics(
            self.tokens,
            self.minimum.to(device),
            self.maximum.to(device),
            self.mean_abs.to(device),
            self.square_sum.to(device),
            None if self.gram is None else self.gram.to(device),
            None if self.fisher is None else self.fisher.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All fields as tensors, for a safetensors file; `fisher`, which has one, is not in it."""
        stored = {
            "tokens": torch.tensor(self.tokens),
            "minimum": self.minimum,
            "maximum": self.maximum,
            "mean_abs": self.mean_abs,
            "square_sum": self.square_sum,
        }
        return stored if self.gram is None else {**stored, "gram": self.gram}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LayerStatistics:
        """The inverse of `tensors`."""
        return cls(
            int(tensors["tokens"]),
            tensors["minimum"],
            tensors["maximum"],
            tensors["mean_abs"],
            tensors["square_sum"],
            tensors.get("gram"),
        )


class Accumulator:
    """Adds up `LayerStatistics` over batches of inputs, one after the other.

    Sums are float32 within a batch; over batches, those of channels are float64. The Gram matrix is
    symmetric: only what is on and to the right of the diagonal is computed, a strip of rows at a
    time.
    """

    def __init__(self, features: int, *, gram: bool) -> None:
        self._tokens = 0
        self._minimum = torch.full((features,), torch.inf)
        self._maximum = torch.full((features,), -torch.inf)
        self._abs_sum = torch.zeros(features, dtype=torch.float64)
        self._square_sum = torch.zeros(features, dtype=torch.float64)
        height = max(SMALLEST_STRIP, -(-features // STRIPS))
        self._rows = [slice(at, at + height) for at in range(0, features, height)] if gram else []
        self._strips: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape [..., n]; a batch without tokens changes nothing."""
        tokens = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(tokens):
            return
        self._to(tokens.device)
        self._tokens += len(tokens)
        self._minimum = torch.minimum(self._minimum, tokens.amin(0))
        self._maximum = torch.maximum(self._maximum, tokens.amax(0))
        self._abs_sum += tokens.abs().sum(0)
        self._square_sum += tokens.square().sum(0)
        if not self._strips:
            self._strips = [tokens[:, rows].T @ tokens[:, rows.start :] for rows in self._rows]
            return
        for rows, strip in zip(self._rows, self._strips, strict=True):
            strip.addmm_(tokens[:, rows].T, tokens[:, rows.start :])

    def merge(self, other: Accumulator) -> None:
        """Add everything that `other` has seen."""
        if not other._tokens:
            return
        self._to(other._minimum.device)
        self._tokens += other._tokens
        self._minimum = torch.minimum(self._minimum, other._minimum)
        self._maximum = torch.maximum(self._maximum, other._maximum)
        self._abs_sum += other._abs_sum
        self._square_sum += other._square_sum
        if not self._strips:
            # Copied, because what was made in inference mode cannot be added to outside of it.
            self._strips = [strip.clone() for strip in other._strips]
            return
        for mine, more in zip(self._strips, other._strips, strict=True):
            mine += more

    def _to(self, device: torch.device) -> None:
        if self._minimum.device != device:
            self._minimum = self._minimum.to(device)
            self._maximum = self._maximum.to(device)
            self._abs_sum = self._abs_sum.to(device)
            self._square_sum = self._square_sum.to(device)

    def _gram(self) -> Tensor | None:
        if not self._rows:
            return None
        features = len(self._minimum)
        gram = torch.zeros(features, features)
        for rows, strip in zip(self._rows, self._strips, strict=False):
            gram[rows, rows.start :] = strip
            gram[rows.stop :, rows] = strip[:, rows.stop - rows.start :].T
        return gram

    def result(self) -> LayerStatistics:
        """The statistics of everything added so far, on the CPU; zeros where nothing was."""
        # Tensors of their own, because a file of statistics holds no tensor twice.
        ends = (self._minimum, self._maximum)
        low, high = ends if self._tokens else (torch.zeros_like(each) for each in ends)
        return LayerStatistics(
            self._tokens,
            low.cpu(),
            high.cpu(),
            (self._abs_sum / max(self._tokens, 1)).float().cpu(),
            self._square_sum.float().cpu(),
            self._gram(),
        )
