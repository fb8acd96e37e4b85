"""A project that compares a candidate with saved baselines, over a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_qlab import Lab, MethodSpec
from pytest_qlab.methods.rtn import Rtn
from tests.plugin.fakes import results_of

DIRECTORY = "qlab-baselines"
TESTS = """
def test_size(quantized):
    assert quantized.size > 0

def test_quality(quantized):
    assert quantized.perplexity_ratio < 9

def test_again(quantized):
    assert quantized.kl.median < 9
"""
TABLE = """
[tool.qlab]
model = "{model}"
eval = ["{evaluation}"]
calibration = ["{calibration}"]
window_length = 48
calibration_length = 32
threads = 1
select = [{select}]
{more}
[tool.qlab.methods.small]
method = "rtn"
bits = {bits}
group_size = 16
[tool.qlab.methods.other]
method = "rtn"
bits = 8
group_size = 16
"""


def lab_of(inputs: Path) -> Lab:
    return Lab(
        str(inputs / "model"),
        evaluation=str(inputs / "evaluation"),
        calibration=str(inputs / "calibration"),
        window_length=48,
        calibration_length=32,
        threads=1,
        store=inputs / "store",
    )


def small(inputs: Path, bits: int) -> Any:
    method = Rtn.model_validate({"bits": bits, "group_size": 16})
    return lab_of(inputs).candidate(MethodSpec(method, "small"))


class Project:
    """A project that compares `small`, at so many bits, with baselines in its directory."""

    def __init__(self, pytester: pytest.Pytester, inputs: Path) -> None:
        self.pytester = pytester
        self.inputs = inputs
        self.configure()
        pytester.makepyfile(test_it=TESTS)

    def configure(
        self, bits: int = 4, more: str = "", select: str = '"small"', **inputs: str
    ) -> None:
        names = {"model": "model", "evaluation": "evaluation", "calibration": "calibration"}
        paths = {key: (self.inputs / name).as_posix() for key, name in {**names, **inputs}.items()}
        self.pytester.makepyprojecttoml(TABLE.format(bits=bits, more=more, select=select, **paths))

    def write(self, text: str) -> None:
        self.pytester.makepyfile(test_it=text)

    def run(self, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
        run = (
            self.pytester.runpytest_subprocess if subprocess else self.pytester.runpytest_inprocess
        )
        return run("-p", "no:cacheprovider", "--qlab-json=results.json", *arguments)

    def row(self, name: str = "small") -> dict[str, Any]:
        rows = {row["id"]: row for row in results_of(self.pytester)["candidates"]}
        found: dict[str, Any] = rows[name]
        return found

    def changes(self) -> dict[str, dict[str, Any]]:
        return {change["metric"]: change for change in self.row()["changes"]}

    def file(self, name: str) -> Path:
        return self.pytester.path / DIRECTORY / f"{name}.json"


def lines_of(result: pytest.RunResult) -> str:
    """All that was printed, as one line."""
    return " ".join("\n".join([*result.outlines, *result.errlines]).split())
