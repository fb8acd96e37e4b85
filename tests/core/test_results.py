"""The results document."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qlab.errors import DataError
from pytest_qlab.results import Budget, CandidateResult, Measure, Results, merge_results


def row(identifier: str, **measures: float) -> CandidateResult:
    return CandidateResult(
        id=identifier,
        method=identifier.split("-")[0],
        measures={name: Measure(value=value) for name, value in measures.items()},
    )


def budget(test: str, limit: float, *, ok: bool = True) -> Budget:
    return Budget(test=test, metric="perplexity", value=2.0, op="<", budget=limit, ok=ok)


def test_fragments_of_one_candidate_become_one_row() -> None:
    results = Results()
    results.add(row("rtn-w4", perplexity=3.0))
    later = row("rtn-w4", size=2.0)
    later.budgets = [budget("t", 3.0)]
    later.tests = {"t": "passed"}
    results.add(later)
    results.add(row("gptq-w4"))
    assert [each.id for each in results.candidates] == ["rtn-w4", "gptq-w4"]
    found = results.candidate("rtn-w4")
    assert found is not None
    assert set(found.measures) == {"perplexity", "size"}
    assert found.tests == {"t": "passed"}


def test_what_runs_is_what_is_known_once_speed_was_measured() -> None:
    first, second, third = row("a"), row("a"), row("a")
    first.kernel, first.simulated = "dequantize-matmul", True
    second.kernel, second.simulated = "int4pack 42", False
    first.merge(second)
    first.merge(third)  # which knows nothing of it
    assert (first.kernel, first.simulated) == ("int4pack 42", False)


def test_the_last_attempt_of_a_budget_wins() -> None:
    first, second = row("a"), row("a")
    first.budgets = [budget("t", 3.0, ok=False), budget("u", 3.0)]
    second.budgets = [budget("t", 3.0, ok=True)]
    first.merge(second)
    assert sorted((each.test, each.ok) for each in first.budgets) == [("t", True), ("u", True)]


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    results = Results(model={"id": "m"}, candidates=[row("a", perplexity=1.25)])
    results.write(tmp_path / "deep" / "r.json")
    assert Results.read(tmp_path / "deep" / "r.json") == results
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}', '{"surprise": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="not a results document"):
        Results.read(tmp_path / "r.json")
    with pytest.raises(DataError, match="cannot be read"):
        Results.read(tmp_path / "absent.json")


def test_merging_shards() -> None:
    left = Results(model={"id": "m"}, evaluation={"id": "e"}, candidates=[row("a")], reused=1)
    right = Results(model={"id": "m"}, evaluation={"id": "e"}, candidates=[row("b")], exit_status=1)
    right.built = {"quantized/x": 1}
    merged = merge_results([left, right])
    assert [each.id for each in merged.candidates] == ["a", "b"]
    assert merged.exit_status == 1
    assert merged.built == {"quantized/x": 1}
    assert [each.id for each in left.candidates] == ["a"]
    with pytest.raises(DataError, match="different models"):
        merge_results([left, Results(model={"id": "other"})])
    with pytest.raises(DataError, match="nothing to merge"):
        merge_results([])
