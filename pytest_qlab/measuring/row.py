"""A candidate's row of the results document: what was measured so far, and nothing computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qlab.measuring.runnable import known_kernel_use
from pytest_qlab.results import CandidateResult, LayerRow, Measure
from pytest_qlab.store import content_hash

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.checkpoint import Checkpoint
    from pytest_qlab.measuring.bylayer import ByLayer
    from pytest_qlab.measuring.damage import Damage


def row_of(candidate: Candidate, *, damage: Damage, layers: ByLayer) -> CandidateResult:
    """Everything measured so far, as a fragment of the document."""
    row = CandidateResult(
        id=candidate.id,
        method=candidate.method.name,
        options=candidate.method.model_dump(mode="json"),
        measures={
            name: Measure(**each.to_dict()) for name, each in sorted(candidate.measured.items())
        },
    )
    checkpoint: Checkpoint | None = candidate.__dict__.get("checkpoint")
    if checkpoint is not None:
        kernels = known_kernel_use(candidate)
        row.kernel = str(kernels or checkpoint.kernel)
        row.simulated = (kernels or checkpoint).simulated
        row.seconds["quantize"] = checkpoint.seconds
        row.keys["quantized"] = checkpoint.directory.name
    _add_layers(row, layers, checkpoint)
    if damage.seen:
        row.keys["reference"] = content_hash(candidate.lab.reference.identity())
    return row


def _add_layers(row: CandidateResult, layers: ByLayer, checkpoint: Checkpoint | None) -> None:
    errors, attribution = layers.known_errors, layers.known_attribution
    if errors is not None:
        row.layers = [LayerRow(**vars(layer)) for layer in errors.layers]
    elif attribution is not None and checkpoint is not None:
        row.layers = [
            LayerRow(name=each.name, shape=each.shape, bits_per_weight=each.bits_per_weight)
            for each in checkpoint.size.layers
        ]
    if attribution is not None:
        for each in row.layers:
            each.kl = attribution.layers[each.name]
        row.additivity = attribution.summary()
