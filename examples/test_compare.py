"""The comparison: every method of --qlab-methods on the same model and text, measured in full.

    pytest examples/test_compare.py -n auto --html=report.html --self-contained-html

The budgets are wide: they catch a method that is broken, not one that is merely worse. A release
gate is a file like this with your own numbers; see examples/test_release.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that collecting the tests imports no torch
    from pytest_qlab import Candidate


def test_quality(quantized: Candidate) -> None:
    """One pass over the evaluation text gives every one of these."""
    assert quantized.perplexity_ratio < 1.5
    assert quantized.kl.mean < 0.5
    assert quantized.top1_agreement > 0.6


def test_size(quantized: Candidate) -> None:
    """Counted from the bytes that are stored: codes, scales, zeros and all that stays as it was."""
    assert quantized.compression_ratio >= 1
    assert quantized.memory.peak < 64 * 2**20


def test_layers(quantized: Candidate) -> None:
    """Which layers did it: errors of weights and of outputs on the calibration text."""
    assert quantized.layer_error < 0.5
    assert all(layer.snr_db > 5 for layer in quantized.layers)


def test_latency(quantized: Candidate) -> None:
    """Runs alone, at the end. A dagger marks kernels that only pretend to run the packed bits."""
    assert quantized.latency.p50 > 0
