from __future__ import annotations

import enum
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest

from pytest_qlab.estimate import Estimate
from pytest_qlab.running.payload import plain, through_json
from pytest_qlab.xdist.plan import PlanEntry, is_exclusive, make_plan, read_plan, write_plan


class Word(enum.StrEnum):
    YES = "yes"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Estimate(0.5, metric="m"), 0.5),
        (numpy.float64(0.5), 0.5),
        (numpy.int32(3), 3),
        (numpy.bool_(True), True),
        (Word.YES, "yes"),
        (Path("a"), "a"),
        (Decimal("1.5"), "1.5"),
        ({1: (numpy.float32(2.0), {3})}, {"1": [2.0, [3]]}),
        (None, None),
    ],
)
def test_whatever_crosses_is_of_a_plain_type(value: object, expected: object) -> None:
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)


def test_a_payload_is_what_json_makes_of_it() -> None:
    found = through_json(
        {"a": Estimate(math.inf, metric="m"), ("t", 1): b"x", "n": [numpy.ones(2)]}
    )
    assert json.loads(json.dumps(found)) == found
    assert found["a"] == math.inf


def test_a_plan_is_read_back_as_written(tmp_path: Path) -> None:
    plan = {
        "t.py::a": PlanEntry(),
        "t.py::b[gptq]": PlanEntry("gptq", 8.0, True, "gptq", {"bits": 3}),
    }
    write_plan(plan, tmp_path, "gw0")
    (tmp_path / "plan-a.json").write_text("damaged", encoding="utf-8")
    assert read_plan(tmp_path) == plan
    assert read_plan(tmp_path / "nowhere") == {}


EXCLUSIVE = """
import functools
import pytest

def test_fast(quantized): assert quantized.latency.p50 < 1
def test_inner(quantized): assert all(c.throughput > 1 for c in [quantized])
def test_quality(quantized): assert quantized.perplexity_delta < 1
def test_served(quantized): assert quantized.serving(4).ttft.p90 < 1
def test_cold(quantized): assert quantized.load.cold < 1
def test_first(quantized): assert quantized.first_generation < 1
def test_file(quantized): import json; json.load(quantized)
def test_unrelated(): latency = 3; print(latency)
def test_words(): print(int.latency)
def test_phase(quantized): assert quantized.latency.decode.p99 < 0.05
def test_named(quantized, benchmark): benchmark(quantized.model)
def test_stranger(benchmark): benchmark(len, "")

@pytest.mark.qlab_exclusive
def test_marked(): pass

@pytest.mark.qlab(exclusive=False)
def test_unmarked(quantized): print(quantized.latency)

def wrapped(function):
    @functools.wraps(function)
    def call(*arguments, **more): return function(*arguments, **more)
    return call

class TestClass:
    @wrapped
    def test_method(self, quantized): print(quantized.latency)
"""


def test_exclusive_tests_are_recognised(pytester: pytest.Pytester) -> None:
    items: list[Any] = pytester.getitems(EXCLUSIVE)
    found = {item.originalname for item in items if is_exclusive(item)}
    timed = {"test_fast", "test_inner", "test_served", "test_cold", "test_first", "test_method"}
    timed.add("test_phase")
    assert found == {*timed, "test_marked", "test_named"}
    for item in items:
        item.config.workerinput = {}  # Under xdist, pytest-benchmark times nothing.
    found = {item.originalname for item in items if is_exclusive(item)}
    assert found == {*timed, "test_marked"}


def test_the_plan_groups_tests_by_candidate(pytester: pytest.Pytester) -> None:
    items = pytester.getitems(
        """
        import pytest

        @pytest.mark.qlab(methods=["rtn", "gptq"])
        def test_q(quantized): pass
        def test_b(baseline): pass
        def test_p(): pass
        """
    )
    plan = {name.split("::")[1]: entry for name, entry in make_plan(items).items()}
    assert plan["test_q[rtn-w4g128]"].group == "rtn-w4g128"
    assert plan["test_q[rtn-w4g128]"].options["bits"] == 4
    assert plan["test_q[gptq-w4g128]"].cost > plan["test_q[rtn-w4g128]"].cost
    assert plan["test_b"].group == "none"
    assert plan["test_p"].group is None
