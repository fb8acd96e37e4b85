"""Sizes against sums made by hand."""

from __future__ import annotations

import pytest

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.size import LayerSize, Size


def four_bit_model() -> Size:
    """Two layers of 128 x 256 at 4 bits with 2 groups a row, and an embedding in bfloat16.

    Bytes of a layer: 128 * 256 / 2 codes, 128 * 2 * 2 scales, 128 * 2 / 2 zeros.
    """
    packed = 16_384 + 512 + 128
    return Size.of(
        [("a", (128, 256), packed), ("b", (128, 256), packed)],
        {"embedding": 1000 * 256 * 2, "norm": 256 * 2},
        parameters=2 * 128 * 256 + 1000 * 256 + 256,
        base_bytes=2 * (2 * 128 * 256 + 1000 * 256 + 256),
    )


def test_four_bits_in_groups_of_128() -> None:
    found = four_bit_model().estimates("rtn-w4g128")
    total = 2 * 17_024 + 512_512
    values = {name: float(estimate) for name, estimate in found.items()}
    assert values["size"] == total
    assert values["bits_per_weight"] == 4 + 16 / 128 + 4 / 128  # codes, scales, zeros
    assert values["model_bits_per_weight"] == pytest.approx(8 * total / 321_792)
    assert values["compression_ratio"] == pytest.approx(2 * 321_792 / total)
    for estimate in found.values():
        assert estimate.lower == estimate.upper == float(estimate)
        assert estimate.candidate == "rtn-w4g128"
    assert found["size"].detail == "643,584 -> 546,560 bytes"
    assert found["compression_ratio"].unit == ""
    assert found["bits_per_weight"].unit == "bits"


def test_layers_have_their_own_bits() -> None:
    assert LayerSize("a", (3, 5), 8).bits_per_weight == 8 * 8 / 15
    assert four_bit_model().layers[1].elements == 32_768


def test_a_copy_compresses_by_nothing() -> None:
    found = Size.of([], {"all": 2000}, parameters=1000, base_bytes=2000)
    assert found.compression_ratio == 1
    assert found.model_bits_per_weight == 16
    assert found.bits_per_weight is None
    assert "bits_per_weight" not in found.estimates()


@pytest.mark.parametrize(
    ("layers", "others", "parameters", "base"),
    [
        ([], {}, 10, 20),
        ([("a", (2, 2), -1)], {"b": 5}, 10, 20),
        ([("a", (0, 2), 1)], {}, 10, 20),
        ([("a", (2, 2), 1)], {}, 3, 20),
        ([("a", (2, 2), 1)], {"b": -5}, 10, 20),
        ([("a", (2, 2), 1)], {}, 10, 0),
    ],
)
def test_impossible_sizes_are_refused(
    layers: list[tuple[str, tuple[int, int], int]],
    others: dict[str, int],
    parameters: int,
    base: int,
) -> None:
    with pytest.raises(MetricError, match="no sizes of a model"):
        Size.of(layers, others, parameters=parameters, base_bytes=base)
