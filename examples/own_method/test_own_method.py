"""What a method has to show before it is worth a row in a table.

pytest examples/own_method --qlab-methods=clip_rtn
"""

from typing import ClassVar

from pytest_qlab import Candidate, Lab
from pytest_qlab.testing import MethodConformance


class TestClipRtn(MethodConformance):
    """Packing, sizes, determinism, odd shapes, extreme weights, damaged ones: over 60 tests."""

    specs: ClassVar = ("clip_rtn", "clip_rtn:bits=2:group_size=-1")


def test_quality(quantized: Candidate) -> None:
    """The same budget for every method of the run."""
    assert quantized.perplexity_ratio < 1.5


def test_better_than_rounding(qlab: Lab) -> None:
    """It has to earn its calibration: less output error than rounding on the same grid."""
    own, plain = qlab.candidate("clip_rtn:bits=3"), qlab.candidate("rtn:bits=3")
    assert own.bits_per_weight == plain.bits_per_weight
    assert own.layer_error < plain.layer_error
