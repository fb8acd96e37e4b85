"""The table of directions: complete, and plain about what it does not know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_qlab.directions import (
    DIRECTIONS,
    direction_of,
    is_timed,
    known_direction,
    split_domain,
)
from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.serving import Load

MEASURES = Path(__file__).resolve().parents[2] / "docs" / "reference" / "measures.md"


def test_every_documented_measure_has_a_direction_and_no_other() -> None:
    documented: set[str] = set()
    for table in re.split(r"\n\n", MEASURES.read_text(encoding="utf-8")):
        lines = table.strip().splitlines()
        if lines and lines[0].startswith("| measure |"):
            for line in lines[2:]:
                documented.update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    assert documented == set(DIRECTIONS)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("kl.mean", "lower"),
        ("kl.mean[code]", "lower"),
        ("top1_agreement", "higher"),
        ("snr_db[prose]", "higher"),
        ("compression_ratio", "higher"),
        ("bits_per_weight", "lower"),
        ("latency.ratio", "lower"),
        ("throughput.decode_ratio", "higher"),
        ("serving.ttft.p99[8]", "lower"),
        ("serving.tokens_per_second[rate=0.5]", "higher"),
    ],
)
def test_directions(metric: str, better: str) -> None:
    assert direction_of(metric) == better


def test_a_slip_of_the_pen_is_answered_with_the_name_that_was_meant() -> None:
    with pytest.raises(MetricError, match=r"no measure 'kl\.means'.*Did you mean 'kl\.mean'"):
        direction_of("kl.means")
    with pytest.raises(MetricError, match="no measure 'kl_mean'"):
        direction_of("kl_mean")


def test_sizes_have_no_domains() -> None:
    with pytest.raises(MetricError, match=r"size is one number .* no domain 'code'"):
        direction_of("size[code]")


@pytest.mark.parametrize("load", ["code", "0", "rate=", "rate=x", "-1"])
def test_a_load_is_a_number_of_clients_or_a_rate(load: str) -> None:
    with pytest.raises(MetricError, match=r"under a load.*serving\.tpot\.p50\[4\]"):
        direction_of(f"serving.tpot.p50[{load}]")


def test_loads_are_not_domains() -> None:
    assert known_direction("kl.mean[4]") is None
    assert known_direction("throughput.decode[4]") is None


@pytest.mark.parametrize("load", [Load(concurrency=8), Load(rate=0.25), Load(rate=1e-7)])
def test_names_of_loads_are_known(load: Load) -> None:
    assert known_direction(f"serving.ttft.p50[{load.name}]") == "lower"


def test_what_is_timed() -> None:
    timed = {metric for metric in DIRECTIONS if is_timed(metric)}
    assert {"latency.p50", "throughput.decode", "load.cold", "first_generation"} < timed
    assert is_timed("serving.ttft.p50[4]")
    assert not timed & {"kl.mean", "size", "memory.peak", "layer_error"}


def test_somebodys_own_measure_has_no_direction() -> None:
    assert known_direction("my.metric") is None
    assert known_direction("size[code]") is None


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        ("kl.p99[code]", ("kl.p99", "code")),
        ("kl.p99", ("kl.p99", "")),
        ("kl.p99[code", ("kl.p99[code", "")),
    ],
)
def test_domains_are_split_off(metric: str, parts: tuple[str, str]) -> None:
    assert split_domain(metric) == parts
