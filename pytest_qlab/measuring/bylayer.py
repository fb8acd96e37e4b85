"""What is known of a candidate layer by layer: errors, and the share of each in the damage.

Both are computed once, kept in the store, and shared by all workers and later runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_qlab.measuring.attribution import CODE_VERSION as ATTRIBUTION_VERSION
from pytest_qlab.measuring.attribution import Attribution, Layer, affordable, attribute
from pytest_qlab.measuring.layers import LayerError, LayerErrors, measure_layers

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.estimate import Estimate

LAYERS_VERSION = 1


class WeightMeasures:
    """`snr_db` and `cosine` of all quantized weights, against the original ones."""

    def __init__(self, estimates: Mapping[str, Estimate]) -> None:
        self.snr_db = estimates["weights.snr_db"]
        self.cosine = estimates["weights.cosine"]


class ByLayer:
    """The quantized layers of one candidate."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate

    @cached_property
    def errors(self) -> LayerErrors:
        """The errors of all layers, and what they add up to."""
        candidate = self._candidate
        lab, checkpoint = candidate.lab, candidate.checkpoint
        stored = lab.store.json(
            "layers", self._error_parts(), lambda: measure_layers(lab, checkpoint).to_dict()
        )
        found = LayerErrors.from_dict(stored)
        candidate.note(found.total.estimates(candidate.id))
        return found

    @property
    def known_errors(self) -> LayerErrors | None:
        """`errors` if they were asked for before; computes nothing."""
        return self.__dict__.get("errors")

    def estimates(self) -> dict[str, Estimate]:
        """`weights.snr_db`, `weights.cosine` and `layer_error`, over all layers."""
        return self.errors.total.estimates(self._candidate.id)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer with its errors and its `kl`."""
        return tuple(
            Layer(**vars(each), _attribution=lambda: self.attribution)
            for each in self.errors.layers
        )

    def worst(self, count: int) -> list[LayerError]:
        """The layers with the largest output error, if they were measured before; else none."""
        errors = self.known_errors
        if errors is None:
            stored = self._candidate.lab.store.peek("layers", self._error_parts())
            if stored is None:
                return []
            errors = LayerErrors.from_dict(stored)
        reached = [layer for layer in errors.layers if layer.output_error]
        return sorted(reached, key=lambda layer: layer.output_error or 0.0, reverse=True)[:count]

    @cached_property
    def attribution(self) -> Attribution:
        """The KL that each quantized layer causes alone, and all together."""
        lab, checkpoint = self._candidate.lab, self._candidate.checkpoint
        stored = lab.store.json(
            "attribution", self._attribution_parts(), lambda: attribute(lab, checkpoint).to_dict()
        )
        return Attribution.from_dict(stored)

    @property
    def known_attribution(self) -> Attribution | None:
        """`attribution` if it was asked for before; computes nothing."""
        return self.__dict__.get("attribution")

    def affordable_attribution(self) -> Attribution | None:
        """`attribution` if it is known, or costs no more than an evaluation does."""
        candidate, lab = self._candidate, self._candidate.lab
        known = self.known_attribution is not None or lab.store.has(
            "attribution", self._attribution_parts()
        )
        return self.attribution if known or affordable(lab, candidate.checkpoint) else None

    def _error_parts(self) -> dict[str, Any]:
        candidate, lab = self._candidate, self._candidate.lab
        return {
            "quantized": lab.quantized_identity(candidate.method),
            "calibration": lab.calibration_input.identity,
            "code": LAYERS_VERSION,
        }

    def _attribution_parts(self) -> dict[str, Any]:
        candidate, lab = self._candidate, self._candidate.lab
        return {
            "reference": lab.reference.identity(),
            "quantized": lab.quantized_identity(candidate.method),
            "code": ATTRIBUTION_VERSION,
        }
