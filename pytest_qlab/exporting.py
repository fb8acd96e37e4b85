"""Writing a candidate as a GGUF file; what no such file can hold is said before hours of work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytest_qlab.calibration.statistics import Accumulator
from pytest_qlab.engines.gguf.writer import expressible, type_of, write_gguf
from pytest_qlab.errors import MethodError
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.composed import Composed
from pytest_qlab.methods.configured import follows_channels
from pytest_qlab.models.structure import all_linears

if TYPE_CHECKING:
    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.candidate import Candidate

TRIAL_ROWS = 16


def save_gguf(candidate: Candidate, path: Path) -> tuple[str, ...]:
    """See `Candidate.save_gguf`."""
    refuse_inexpressible(candidate)
    checkpoint = candidate.checkpoint
    packed = {**checkpoint.layers(), **checkpoint.embeddings()}
    rounded = next((name for name, layer in packed.items() if layer.activation), None)
    if rounded is not None:
        raise _rounds_inputs(candidate.id, rounded)
    if checkpoint.rotation is not None:
        raise _rotates(candidate.id)
    return write_gguf(
        path,
        candidate.lab.described,
        weights={name: layer.weight for name, layer in packed.items()},
        others=checkpoint.others(),
        file_type=str(getattr(candidate.method, "type", "")),
    )


def refuse_inexpressible(candidate: Candidate) -> None:
    """Raise what `save_gguf` would raise in the end, as far as it shows without quantizing.

    Of one layer's width, random rows are quantized: formats and groups do not depend on values.

    Raises:
        MissingExtraError, ModelError, MethodError: see `Candidate.save_gguf`.
    """
    model, method = candidate.lab.described.model, candidate.method
    expressible(model)
    if isinstance(method, Composed) and any(each.changes_basis for each in method.preprocessings):
        raise _rotates(candidate.id)
    if type(method).import_model is not Method.import_model:
        return
    site = min(all_linears(model), key=lambda each: each.in_features)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(TRIAL_ROWS, site.in_features, generator=generator) / site.in_features**0.5
    assigned = method.assign(model)[site.name]
    found = assigned.quantize(weight, _any_statistics(method, weight, generator), name=site.name)
    if found.activation is not None:
        raise _rounds_inputs(candidate.id, site.name)
    type_of(found.weight, site.name)


def _any_statistics(
    method: Method, weight: torch.Tensor, generator: torch.Generator
) -> LayerStatistics | None:
    wanted = method.wanted_statistics
    if not wanted:
        return None
    inputs = torch.randn(2 * TRIAL_ROWS, weight.shape[1], generator=generator)
    accumulator = Accumulator(
        weight.shape[1], gram="gram" in wanted, channels=follows_channels(wanted)
    )
    accumulator.add(inputs)
    found = accumulator.result()
    found.fisher = torch.ones_like(weight) if "fisher" in wanted else None
    return found


def _rounds_inputs(candidate: str, layer: str) -> MethodError:
    return MethodError(
        f"{candidate} quantizes the inputs of {layer}, which a GGUF file cannot say. Write a "
        "method that quantizes weights alone."
    )


def _rotates(candidate: str) -> MethodError:
    return MethodError(
        f"{candidate} rotates hidden states between the first and the last block, which a GGUF "
        "file cannot say. Write a method without a rotation."
    )
