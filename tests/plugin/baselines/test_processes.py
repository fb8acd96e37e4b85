"""Saved baselines across workers, and of the model that comes with the plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qlab import Lab
from tests.plugin.baselines.project import Project
from tests.plugin.fakes import results_of


@pytest.mark.slow
def test_workers_save_the_same_bytes_and_compare_alike(project: Project) -> None:
    project.configure(select='"small", "other", "gptq:bits=3"')
    for name, workers in (("one", "-n0"), ("two", "-n2"), ("each", "-n2 --dist=load")):
        result = project.run(f"--qlab-save={name}", *workers.split(), subprocess=True)
        assert result.ret == 0, result.stdout.str()
    texts = {project.file(name).read_bytes() for name in ("one", "two", "each")}
    assert len(texts) == 1
    project.configure(bits=3, select='"small", "other", "gptq:bits=3"')
    arguments = ("--qlab-compare=one", "--qlab-compare-fail=kl.mean:0.002")
    found = []
    for workers in ("-n0", "-n2"):
        result = project.run(*arguments, workers, subprocess=True)
        result.assert_outcomes(passed=8, failed=1)
        result.stdout.fnmatch_lines(["FAILED *test_quality[[]small]*"])
        found.append([project.row(name)["changes"] for name in ("small", "other")])
    assert found[0] == found[1]


EMBEDDED = """
[tool.qlab]
eval = ["prose"]
max_windows = 8
select = ["release"]
[tool.qlab.methods.release]
method = "rtn"
bits = {bits}
"""


@pytest.mark.slow
def test_the_embedded_model_at_fewer_bits_is_a_regression(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLAB_STORE", str(tmp_path / "store"))
    pytester.makepyfile(
        test_it="def test_it(quantized):\n    assert quantized.top1_agreement > 0.1"
    )
    pytester.makepyprojecttoml(EMBEDDED.format(bits=4))
    arguments = ("-p", "no:cacheprovider", "--qlab-json=results.json")
    assert pytester.runpytest_inprocess("--qlab-save=v1", *arguments).ret == 0
    held = ("--qlab-compare=v1", "--qlab-compare-fail=kl.mean:10%,top1_agreement:0.005")
    assert pytester.runpytest_inprocess(*held, *arguments).ret == 0
    assert results_of(pytester)["forwards"] == 0
    pytester.makepyprojecttoml(EMBEDDED.format(bits=3))
    pytester.runpytest_inprocess(*held, *arguments).assert_outcomes(failed=1)
    (row,) = results_of(pytester)["candidates"]
    found = {change["metric"]: change for change in row["changes"]}
    lab = Lab("embedded", evaluation="prose", max_windows=8, store=tmp_path / "store")
    old, new = (lab.candidate(f"rtn:bits={bits}").fidelity.estimates() for bits in (4, 3))
    assert lab.forwards == 0
    for metric in ("kl.mean", "top1_agreement"):
        change = found[metric]
        assert change["outcome"] == "fail"
        assert change["saved"] == pytest.approx(float(old[metric]), rel=1e-5)
        assert change["difference"] == pytest.approx(float(new[metric] - old[metric]), rel=1e-4)
