"""Which layers did it: the error of every quantized layer, in the original model's terms.

A method may have scaled a layer's columns and rows, and rotated its inputs and outputs, before it
was quantized. That is taken back here, so that all methods are compared on the same weights and
the same calibration inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_qlab.metrics.weights import WeightError, total, weight_error
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_qlab.checkpoint import Checkpoint
    from pytest_qlab.lab import Lab
    from pytest_qlab.models.rotation import LayerRotation


@dataclass(frozen=True)
class LayerError:
    """One quantized layer.

    Attributes:
        name: dotted name in the model.
        shape: (out_features, in_features).
        bits_per_weight: all that is stored for it.
        snr_db: signal-to-noise ratio of its weights, dB.
        cosine: between its weights before and after.
        output_error: relative squared error of its output on the calibration inputs of the original
            model; None where calibration did not reach it.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    snr_db: float
    cosine: float
    output_error: float | None


@dataclass(frozen=True)
class LayerErrors:
    """All layers, and what they add up to."""

    layers: tuple[LayerError, ...]
    total: WeightError

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"layers": [asdict(layer) for layer in self.layers], "total": asdict(self.total)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> LayerErrors:
        """The inverse of `to_dict`."""
        layers = (
            LayerError(**{**layer, "shape": tuple(layer["shape"])}) for layer in stored["layers"]
        )
        return cls(tuple(layers), WeightError(**stored["total"]))


def original_terms(
    weight: Tensor, scales: Mapping[str, Tensor], rotation: LayerRotation | None = None
) -> Tensor:
    """A dequantized weight (m, n) as it acts on the original inputs and outputs.

    A fold made W' = diag(1/row) W diag(column), so W = diag(row) W' diag(1/column); a rotation
    after it is taken back before. Columns that were multiplied by 0 have no original terms and
    are 0: what they read is 0 in the original model.
    """
    if rotation is not None:
        weight = rotation.original(weight.double()).to(weight.dtype)
    if "column" in scales:
        column = scales["column"]
        weight = torch.where(column == 0, 0, weight / column)
    if "row" in scales:
        weight = weight * scales["row"][:, None]
    return weight


def measure_layers(lab: Lab, checkpoint: Checkpoint) -> LayerErrors:
    """Compare every layer of a checkpoint with the base model's, one block after the other."""
    statistics = lab.statistics(gram=True)
    scales, rotations = checkpoint.scales(), checkpoint.rotations()
    layers: list[LayerError] = []
    errors: list[WeightError] = []
    for index, (name, block) in enumerate(_blocks(lab)):
        known = statistics(index)
        sites = quantizable_linears(block, name)
        quantized = checkpoint.layers({site.name for site in sites})
        for site in sites:
            packed = quantized[site.name].weight
            found = weight_error(
                site.weight().cpu(),
                original_terms(
                    packed.dequantize(), scales.get(site.name, {}), rotations.get(site.name)
                ),
                known[site.name].gram,
                name=site.name,
            )
            errors.append(found)
            layers.append(
                LayerError(
                    name=site.name,
                    shape=packed.shape,
                    bits_per_weight=packed.bits_per_weight,
                    snr_db=found.snr_db,
                    cosine=found.cosine,
                    output_error=found.relative_output_error,
                )
            )
    return LayerErrors(tuple(layers), total(errors))


def _blocks(lab: Lab) -> Iterator[tuple[str, nn.Module]]:
    """The base model's blocks with their names; each can be read until the next is asked for."""
    lazy = lab.lazy
    if lazy is None:
        yield from decoder_blocks(lab.base_model)
        return
    for name, block in lazy.blocks:
        with lazy.resident(block):
            yield name, block
