"""What calibration knows about the inputs of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pytest_qlab.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

STRIPS, SMALLEST_STRIP = 8, 96


@dataclass(frozen=True)
class ChannelRange:
    """How far each input channel reaches, over all calibration tokens; float32 [n] each.

    Attributes:
        minimum, maximum: of the channel.
        mean_abs: mean over tokens of |x|.
    """

    minimum: Tensor
    maximum: Tensor
    mean_abs: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> ChannelRange:
        """Each of the three, changed."""
        return ChannelRange(change(self.minimum), change(self.maximum), change(self.mean_abs))


@dataclass
class LayerStatistics:
    """Statistics of a linear layer's inputs over all calibration tokens, n = in_features.

    Attributes:
        tokens: number of tokens seen; 0 for an expert that was never reached.
        square_sum: float32 [n], sum over tokens of x**2; over `tokens`, the importance of a column
            (llama.cpp's imatrix).
        channels: the range of each input channel, which is also there as `minimum`, `maximum` and
            `mean_abs`; None where only the Gram matrix was asked for.
        gram: float32 [n, n], sum over tokens of x x^T; None where it was not asked for.
        fisher: float32 [m, n], of each of the layer's m x n weights the sum over sequences of the
            squared gradient of the loss, which belongs to the layer and not to its inputs alone;
            None where it was not asked for.
    """

    tokens: int
    square_sum: Tensor
    channels: ChannelRange | None = None
    gram: Tensor | None = None
    fisher: Tensor | None = None

    @property
    def minimum(self) -> Tensor:
        """Float32 [n], of each input channel.

        Raises:
            MethodError: the ranges of channels were not asked for.
        """
        return self._ranges().minimum

    @property
    def maximum(self) -> Tensor:
        """As `minimum`."""
        return self._ranges().maximum

    @property
    def mean_abs(self) -> Tensor:
        """Float32 [n], mean over tokens of |x|; raises as `minimum`."""
        return self._ranges().mean_abs

    def _ranges(self) -> ChannelRange:
        if self.channels is None:
            raise MethodError(
                "The minimum, maximum and mean_abs of input channels were not collected. A method "
                'that reads them has "channels" in its `needs`.'
            )
        return self.channels

    def rescaled(self, scale: Tensor) -> LayerStatistics:
        """Statistics of the inputs x / scale, for a positive scale of shape [n].

        The weight's columns are multiplied by it, so that its gradients are divided.
        """
        return LayerStatistics(
            self.tokens,
            self.square_sum / scale**2,
            None if self.channels is None else self.channels.map(lambda each: each / scale),
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
            self.square_sum.to(device),
            None if self.channels is None else self.channels.map(lambda each: each.to(device)),
            None if self.gram is None else self.gram.to(device),
            None if self.fisher is None else self.fisher.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All fields as tensors, for a safetensors file; `fisher`, which has one, is not in it."""
        stored = {"tokens": torch.tensor(self.tokens), "square_sum": self.square_sum}
        if self.channels is not None:
            stored |= vars(self.channels)
        return stored if self.gram is None else {**stored, "gram": self.gram}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LayerStatistics:
        """The inverse of `tensors`."""
        ranges = [tensors[name] for name in ("minimum", "maximum", "mean_abs") if name in tensors]
        return cls(
            int(tensors["tokens"]),
            tensors["square_sum"],
            ChannelRange(*ranges) if ranges else None,
            tensors.get("gram"),
        )


class Accumulator:
    """Adds up `LayerStatistics` over batches of inputs, one after the other.

    Sums are float32 within a batch; over batches, those of channels are float64. The Gram matrix is
    symmetric: only what is on and to the right of the diagonal is computed, a strip of rows at a
    time.

    Args:
        features: of the inputs, n.
        gram: whether to add up the Gram matrix.
        channels: whether to follow the channels. If not, what is known of each of them is its sum
            of squares, the diagonal of the Gram matrix, which then must be added up.
    """

    def __init__(self, features: int, *, gram: bool, channels: bool = True) -> None:
        if not (gram or channels):
            raise ValueError("there is nothing to add up: neither a Gram matrix nor channels")
        self._features = features
        self._tokens = 0
        self._channels = _Channels(features) if channels else None
        height = max(SMALLEST_STRIP, -(-features // STRIPS))
        self._rows = [slice(at, at + height) for at in range(0, features, height)] if gram else []
        self._strips: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape [..., n]; a batch without tokens changes nothing."""
        tokens = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(tokens):
            return
        self._tokens += len(tokens)
        if self._channels is not None:
            self._channels.add(tokens)
        if not self._strips:
            self._strips = [tokens[:, rows].T @ tokens[:, rows.start :] for rows in self._rows]
            return
        for rows, strip in zip(self._rows, self._strips, strict=True):
            strip.addmm_(tokens[:, rows].T, tokens[:, rows.start :])

    def merge(self, other: Accumulator) -> None:
        """Add everything that `other`, of the same kind, has seen."""
        if (self._channels is None) != (other._channels is None):
            raise ValueError("only one of the two follows channels")
        if not other._tokens:
            return
        self._tokens += other._tokens
        if self._channels is not None and other._channels is not None:
            self._channels.merge(other._channels)
        if not self._strips:
            # Copied, because what was made in inference mode cannot be added to outside of it.
            self._strips = [strip.clone() for strip in other._strips]
            return
        for mine, more in zip(self._strips, other._strips, strict=True):
            mine += more

    def _gram(self) -> Tensor | None:
        if not self._rows:
            return None
        device = self._strips[0].device if self._strips else None
        gram = torch.zeros(self._features, self._features, device=device)
        for rows, strip in zip(self._rows, self._strips, strict=False):
            gram[rows, rows.start :] = strip
            gram[rows.stop :, rows] = strip[:, rows.stop - rows.start :].T
        return gram

    def result(self) -> LayerStatistics:
        """The statistics of everything added so far, where it was; zeros where nothing was."""
        gram = self._gram()
        if self._channels is not None:
            squares, ranges = self._channels.result(self._tokens)
            return LayerStatistics(self._tokens, squares, ranges, gram)
        assert gram is not None
        return LayerStatistics(self._tokens, gram.diagonal().clone(), None, gram)


class _Channels:
    """Range and sums of each channel, which are cheap on their own, and not beside a small Gram."""

    def __init__(self, features: int) -> None:
        self._minimum = torch.full((features,), torch.inf)
        self._maximum = torch.full((features,), -torch.inf)
        self._abs_sum = torch.zeros(features, dtype=torch.float64)
        self._square_sum = torch.zeros(features, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        self._to(tokens.device)
        self._minimum = torch.minimum(self._minimum, tokens.amin(0))
        self._maximum = torch.maximum(self._maximum, tokens.amax(0))
        self._abs_sum += tokens.abs().sum(0)
        self._square_sum += tokens.square().sum(0)

    def merge(self, other: _Channels) -> None:
        self._to(other._minimum.device)
        self._minimum = torch.minimum(self._minimum, other._minimum)
        self._maximum = torch.maximum(self._maximum, other._maximum)
        self._abs_sum += other._abs_sum
        self._square_sum += other._square_sum

    def _to(self, device: torch.device) -> None:
        if self._minimum.device != device:
            self._minimum = self._minimum.to(device)
            self._maximum = self._maximum.to(device)
            self._abs_sum = self._abs_sum.to(device)
            self._square_sum = self._square_sum.to(device)

    def result(self, tokens: int) -> tuple[Tensor, ChannelRange]:
        # Tensors of their own, because a file of statistics holds no tensor twice.
        ends = (self._minimum, self._maximum)
        low, high = ends if tokens else (torch.zeros_like(each) for each in ends)
        mean = (self._abs_sum / max(tokens, 1)).float()
        return self._square_sum.float(), ChannelRange(low, high, mean)
