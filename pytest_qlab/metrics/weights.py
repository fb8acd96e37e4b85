"""How far quantized weights, and the outputs of their layers, are from the original ones.

A layer's output error on calibration inputs X is ||(W - W') X||^2 = tr(D G D^T) with D = W - W'
and the Gram matrix G = sum over tokens of x x^T; the relative error divides by tr(W G W^T). All are
sums, so that the error of a model is that of its layers added up, not a mean of decibels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import Estimate
from pytest_qlab.finite import is_finite
from pytest_qlab.metrics.fidelity import SNR_CAP_DB

_ROWS = 1024


@dataclass(frozen=True)
class WeightError:
    """Sums over the weights of a layer, or of several.

    Attributes:
        signal: sum of w^2; candidate_signal: of w'^2; product: of w w'; error: of (w - w')^2.
        output_signal: tr(W G W^T); output_error: tr(D G D^T); None where G was not given.
        layers: how many layers; weights: how many weights.
    """

    signal: float
    candidate_signal: float
    product: float
    error: float
    output_signal: float | None
    output_error: float | None
    layers: int
    weights: int

    @property
    def snr_db(self) -> float:
        """10 log10(sum w^2 / sum (w - w')^2); 200 dB for an exact copy and at most."""
        return _decibels(self.signal, self.error)

    @property
    def cosine(self) -> float:
        """Of the angle between all weights before and after; 1 for an exact copy."""
        if self.error == 0:
            return 1.0
        length = math.sqrt(self.signal * self.candidate_signal)
        return max(-1.0, min(1.0, self.product / length)) if length else 0.0

    @property
    def relative_output_error(self) -> float | None:
        """tr(D G D^T) / tr(W G W^T); None without a Gram matrix, or if the output is zero."""
        if self.output_error is None or not self.output_signal:
            return None
        return self.output_error / self.output_signal

    def estimates(self, candidate: str = "") -> dict[str, Estimate]:
        """weights.snr_db, weights.cosine, and layer_error where it is known; exact."""
        values = {
            "weights.snr_db": (self.snr_db, "dB"),
            "weights.cosine": (self.cosine, ""),
            "layer_error": (self.relative_output_error, ""),
        }
        detail = f"{self.weights:,} weights in {self.layers} layers"
        return Estimate.exactly(values, candidate=candidate, n=self.weights, detail=detail)


def _decibels(signal: float, error: float) -> float:
    if error == 0:
        return SNR_CAP_DB
    if signal == 0:
        return -SNR_CAP_DB
    return max(-SNR_CAP_DB, min(SNR_CAP_DB, 10 * math.log10(signal / error)))


def weight_error(
    weight: Tensor, dequantized: Tensor, gram: Tensor | None = None, *, name: str = "a layer"
) -> WeightError:
    """Compare a layer's weights, (out, in) each, before and after; sums are float64.

    Args:
        gram: float32 (in, in), the sum of x x^T over calibration tokens.

    Raises:
        MetricError: shapes differ, or a value is not finite.
    """
    rows, columns = weight.shape
    if dequantized.shape != weight.shape or (gram is not None and gram.shape != (columns, columns)):
        raise MetricError(
            f"The weights of {name} have shape {tuple(weight.shape)} before and "
            f"{tuple(dequantized.shape)} after quantization"
            f"{'' if gram is None else f', and its Gram matrix {tuple(gram.shape)}'}. The layer "
            "must keep its shape, and the statistics must be of its inputs."
        )
    totals = torch.zeros(6, dtype=torch.float64)
    for start in range(0, rows, _ROWS):
        before = weight[start : start + _ROWS].double()
        after = dequantized[start : start + _ROWS].double()
        moved = before - after
        parts = [before * before, after * after, before * after, moved * moved]
        if gram is not None:
            # The product is float32: its error of 1e-6 is far below what it is compared with.
            parts += [before * (before.float() @ gram), moved * (moved.float() @ gram)]
        sums = [part.sum() for part in parts]
        totals[: len(sums)] += torch.stack(sums).cpu()
    if not is_finite(totals):
        raise MetricError(
            f"The weights of {name}, or its calibration statistics, contain NaN or infinity. Check "
            "the checkpoint, and quantize in float32."
        )
    signal, moved_signal, product, error, output_signal, output_error = totals.tolist()
    return WeightError(
        signal,
        moved_signal,
        product,
        error,
        # A Gram matrix has no negative eigenvalues; rounding may say otherwise.
        None if gram is None else max(0.0, output_signal),
        None if gram is None else max(0.0, output_error),
        layers=1,
        weights=weight.numel(),
    )


def total(errors: Iterable[WeightError]) -> WeightError:
    """The error of several layers together; output errors only if all layers have them.

    Raises:
        MetricError: there are no layers.
    """
    found = list(errors)
    if not found:
        raise MetricError("No quantized layer was given, so weights have no error to add up.")
    outputs = [e.output_signal for e in found], [e.output_error for e in found]
    signals, moved = ([x for x in column if x is not None] for column in outputs)
    known = len(signals) == len(found)
    return WeightError(
        math.fsum(e.signal for e in found),
        math.fsum(e.candidate_signal for e in found),
        math.fsum(e.product for e in found),
        math.fsum(e.error for e in found),
        math.fsum(signals) if known else None,
        math.fsum(moved) if known else None,
        layers=sum(e.layers for e in found),
        weights=sum(e.weights for e in found),
    )
