"""What a method has to show before it is worth a row in a table.

pytest examples/own_method --qlab-methods=clip_rtn
"""

from pytest_qlab import Candidate, Lab


def test_quality(quantized: Candidate) -> None:
    """The same budget for every method of the run."""
    assert quantized.perplexity_ratio < 1.5


def test_better_than_rounding(qlab: Lab) -> None:
    """It has to earn its calibration: less output error than rounding on the same grid."""
    own, plain = qlab.candidate("clip_rtn:bits=3"), qlab.candidate("rtn:bits=3")
    assert own.bits_per_weight == plain.bits_per_weight
    assert own.layer_error < plain.layer_error
