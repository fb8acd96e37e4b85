"""A calibration text so short that most experts see nothing of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pytest_qlab.calibration.sources import StoredStatistics
from tests.lab.tiny import tiny_lab


@pytest.mark.parametrize(
    "spec",
    ["awq", "static", "smooth+rtn", "squeezellm", "gptq", "spqr", "quip", "quarot+gptq"],
)
def test_experts_that_no_token_reached_are_quantized_all_the_same(
    spec: str, tmp_path: Path
) -> None:
    options = {"calibration_length": 2, "calibration_sequences": 1}
    lab = tiny_lab(tmp_path, "mixtral", **options)
    candidate = lab.candidate(spec)
    assert math.isfinite(candidate.kl.mean)
    unreached = [layer for layer in candidate.layers if layer.output_error is None]
    assert len(unreached) >= 12  # in each block, 6 matrices of two experts
    again = tiny_lab(tmp_path, "mixtral", **options)
    assert again.candidate(spec).kl.mean == candidate.kl.mean
    assert again.store.built == {}


def test_their_statistics_are_stored_as_zeros(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, "mixtral", calibration_length=2, calibration_sequences=1)
    assert math.isfinite(lab.candidate("static").kl.mean)
    (index,) = tmp_path.rglob("layers.json")
    layers = StoredStatistics(index.parent)(0)
    idle = [known for known in layers.values() if not known.tokens]
    assert len(idle) >= 6  # of 12 matrices of 4 experts; two tokens visit two experts each, at most
    for known in idle:
        assert not known.minimum.any()
        assert not known.maximum.any()
        assert not known.square_sum.any()
