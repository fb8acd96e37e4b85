"""The conformance suite finds what is wrong with a method, and says so."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

HEAD = """
import torch
from typing import ClassVar
from pytest_qlab import QuantizedLayer, register_method
from pytest_qlab.formats.base import PackedWeight, register_format
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.methods.base import Statistic
from pytest_qlab.methods.inputs import check_statistics
from pytest_qlab.testing import MethodConformance, ToyMethod


class Base(ToyMethod):
    name: ClassVar[str] = "{name}"
"""
TAIL = """

register_method(Mine)


class TestMine(MethodConformance):
    specs = {specs}
"""
GOOD = "class Mine(Base): pass"
BROKEN = {
    "draws from the global seed": (
        """
class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        noise = 1e-3 * weight.abs().amax() * torch.randn(weight.shape)
        return super().quantize(weight + noise, statistics, name=name)
""",
        "test_it_is_deterministic",
    ),
    "changes its weight": (
        """
class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        found = super().quantize(weight, statistics, name=name)
        weight.zero_()
        return found
""",
        "test_odd_shapes",
    ),
    "takes NaN": (
        """
class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        return super().quantize(weight.nan_to_num(0, 0, 0), statistics, name=name)
""",
        "test_weights_that_are_not_finite_are_refused",
    ),
    "hides bits": (
        """
@register_format
class Hidden(PlainWeight):
    format: ClassVar[str] = "hidden"
    nbytes = property(lambda self: self.weight.numel() // 4)

class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        found = super().quantize(weight, statistics, name=name)
        return QuantizedLayer(Hidden(found.weight.dequantize()))
""",
        "test_no_better_than_rate_distortion_theory",
    ),
    "hides bytes of the file": (
        """
@register_format
class Hidden(PlainWeight):
    format: ClassVar[str] = "hidden"
    nbytes = property(lambda self: 2 * self.weight.numel())

class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        found = super().quantize(weight, statistics, name=name)
        return QuantizedLayer(Hidden(found.weight.dequantize()))
""",
        "test_size_is_what_is_written",
    ),
    "fails on zeros": (
        """
class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        scale = weight.abs().amax()
        found = super().quantize((weight / scale).nan_to_num(1), statistics, name=name)
        return QuantizedLayer(PlainWeight(found.weight.dequantize() * scale.clamp(min=1e-9)))
""",
        "test_zeros_stay_zeros",
    ),
    "knows one scale": (
        """
class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        return QuantizedLayer(PlainWeight((weight.clamp(-4, 4) * 8).round() / 8))
""",
        "test_scales_do_not_matter",
    ),
    "ignores its bits": (
        """
class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        if self.bits == 8:
            return super().quantize(weight * 1.5, statistics, name=name)
        return super().quantize(weight, statistics, name=name)
""",
        "test_more_bits_cost_less_error",
    ),
    "never checks its statistics": (
        """
class Mine(Base):
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels"})

    def quantize(self, weight, statistics, *, name=""):
        busy = 1.0 if statistics is None else statistics.mean_abs.amax().nan_to_num(2)
        return super().quantize(weight * (1 + 0.01 * busy / (1 + busy)), statistics, name=name)
""",
        "test_statistics_that_are_missing_or_wrong_are_refused",
    ),
    "looks at channels that it did not ask for": (
        """
class Mine(Base):
    needs: ClassVar[frozenset[Statistic]] = frozenset({"gram"})

    def quantize(self, weight, statistics, *, name=""):
        check_statistics(statistics, weight, name, "mine", gram=True)
        busy = statistics.mean_abs.amax()
        return super().quantize(weight * (1 + 0.01 * busy / (1 + busy)), statistics, name=name)
""",
        "test_it_is_deterministic",
    ),
    "cannot be read back": (
        """
@register_format
class Lossy(PlainWeight):
    format: ClassVar[str] = "lossy"

    def tensors(self):
        return {"weight": self.weight.to(torch.bfloat16)}

    @classmethod
    def from_tensors(cls, tensors, metadata):
        return cls(tensors["weight"].float())

class Mine(Base):
    def quantize(self, weight, statistics, *, name=""):
        found = super().quantize(weight, statistics, name=name)
        return QuantizedLayer(Lossy(found.weight.dequantize()))
""",
        "test_round_trip_through_disk",
    ),
}


UNTESTABLE = {
    "()": "names no method",
    "'mina'": "Unknown method 'mina'",
    "'llamacpp'": "does not quantize layer by layer",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one run of the suite over all methods above prints."""
    directory = tmp_path_factory.mktemp("suite")
    sources = {"sound": GOOD, **{fault.replace(" ", "_"): BROKEN[fault][0] for fault in BROKEN}}
    for number, (name, method) in enumerate(sources.items()):
        head, tail = HEAD.format(name=f"mine{number}"), TAIL.format(specs=f'"mine{number}"')
        (directory / f"test_{name}.py").write_text(head + method + tail, encoding="utf-8")
    for number, specs in enumerate(UNTESTABLE):
        text = HEAD.format(name=f"other{number}") + GOOD + TAIL.format(specs=specs)
        (directory / f"test_{number}.py").write_text(text, encoding="utf-8")
    arguments = ["-q", "--tb=short", "-rf", "-p", "no:cacheprovider", f"--rootdir={directory}"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--continue-on-collection-errors", directory],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == pytest.ExitCode.TESTS_FAILED, found.stdout + found.stderr
    return found.stdout


def failures(output: str, name: str) -> list[str]:
    return re.findall(rf"^FAILED \S*test_{name}\.py::TestMine::(\w+)", output, re.MULTILINE)


def test_a_sound_method_passes(output: str) -> None:
    assert failures(output, "sound") == []


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_are_found(output: str, fault: str) -> None:
    assert BROKEN[fault][1] in failures(output, fault.replace(" ", "_"))


@pytest.mark.parametrize("message", UNTESTABLE.values())
def test_what_cannot_be_tested_is_said(output: str, message: str) -> None:
    assert message in " ".join(output.split())
