"""A release gate in three lines: what pytest-qlab is for.

pytest examples/test_release.py --qlab-methods=gptq,awq -n auto
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that collecting the tests imports no torch
    from pytest_qlab import Candidate


def test_release_quality(quantized: Candidate) -> None:
    assert quantized.perplexity_ratio < 1.10
    assert quantized.snr_db > 12
    assert quantized.cosine > 0.95
