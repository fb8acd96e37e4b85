"""Baselines and the project's files: what these may say, and pages and exports show."""

from __future__ import annotations

import json
import re

import pytest

from pytest_qlab.gate.baselines import Baseline
from tests.plugin.baselines.project import Project

FILES = 'compare = "v1"\ncompare_fail = ["kl.mean:0.002"]\nbaselines = "kept"'


def test_files_may_say_what_is_compared(released: Project, release: Baseline) -> None:
    released.configure(bits=3, more=FILES)
    release.write(released.pytester.path / "kept" / "v1.json")
    released.run().assert_outcomes(passed=2, failed=1)
    released.run("--qlab-compare=@none").assert_outcomes(passed=3)
    released.run("--qlab-compare-fail=kl.mean:9").assert_outcomes(passed=3)
    # What is meant to be is not held to what was before, unless that is asked for.
    released.run("--qlab-save=v2").assert_outcomes(passed=3)
    assert (released.pytester.path / "kept" / "v2.json").exists()
    result = released.run("--qlab-save=v3", "--qlab-compare")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["qlab baseline: v2 (kl.mean:0.002)", "*written kept/v3.json*"])
    result = released.run("--qlab-save=v4", "--qlab-compare=v1")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*nothing was saved as kept/v4.json, because the run did not*"])


def test_what_is_saved_is_said_on_the_command_line(project: Project) -> None:
    project.configure(more='save = "v1"')
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unknown key 'save' in [[]tool.qlab]*"])


def test_pages_show_what_has_changed(released: Project) -> None:
    from pytest_qlab.cli import main

    released.run("--qlab-compare", "--qlab-compare-fail=kl.mean:0.002", "--qlab-html=page.html")
    page = (released.pytester.path / "page.html").read_text(encoding="utf-8")
    assert "Against the baseline v1" in page
    assert "1 measure worse than saved" in page
    change = released.changes()["kl.mean"]
    assert f'data-c="difference" data-v="{change["difference"]!r}"' in page
    file = released.pytester.path / "results.json"
    for form, expected in (
        ("markdown", r"### Against the baseline v1\n\n- small: kl\.mean 0"),
        ("csv", r"kl\.mean\.saved,kl\.mean\.difference,kl\.mean\.outcome"),
    ):
        out = released.pytester.path / form
        assert main(["export", f"--format={form}", "-o", str(out), str(file)]) == 0
        assert re.search(expected, out.read_text(encoding="utf-8"))
    merged = released.pytester.path / "merged.json"
    assert main(["merge", str(file), str(file), f"--json={merged}"]) == 0
    (row,) = json.loads(merged.read_text(encoding="utf-8"))["candidates"]
    assert row["changes"] == list(released.changes().values())
