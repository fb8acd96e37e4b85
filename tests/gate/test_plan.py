"""`--qlab-plan`: what it knows and from where, what it says, and that it loads no model."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_qlab import Lab
from pytest_qlab.data.windows import Window, WindowSet
from pytest_qlab.directions import DIRECTIONS, known_direction
from pytest_qlab.errors import MetricError
from pytest_qlab.gate.baselines import Baseline, SavedCandidate, Subject, Sums, Windows
from pytest_qlab.gate.budgets import ConfiguredBudget
from pytest_qlab.gate.plan import NEVER, Planner, Row, Text
from pytest_qlab.gate.sources import StoredSpreads, saved_spread
from pytest_qlab.gate.spreads import LAWS, Measured, Spread, assumed, at_share
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.specs import parse_specs
from tests.lab.tiny import LETTERS, saved_tiny_model

RTN, COARSE, DYNAMIC = parse_specs(["rtn:bits=4:group_size=8,rtn:bits=3:group_size=8,dynamic"])
SUMMED = ("kl.mean", "kl.tail", "top1_agreement", "log_perplexity_delta", "perplexity_delta")


def write_texts(directory: Path, seed: int) -> Path:
    """Six documents in two domains, each of three windows."""
    drawn = random.Random(seed)
    for number in range(6):
        file = directory / ("odd" if number % 2 else "even") / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(drawn.choices(LETTERS[:-1], k=144)), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a store that has evaluations of two methods on it."""
    path = tmp_path_factory.mktemp("plan")
    saved_tiny_model(path / "model")
    write_texts(path / "text", 1)
    lab = lab_of(path)
    for spec in (RTN, DYNAMIC):
        _ = lab.candidate(spec).fidelity
    return path


def lab_of(place: Path, **options: Any) -> Lab:
    arguments = {
        "evaluation": str(place / "text"),
        "calibration": str(place / "text"),
        "window_length": 48,
        "calibration_length": 32,
        "store": place / "store",
        "threads": 1,
        **options,
    }
    return Lab(str(place / "model"), **arguments)


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be loaded, nor any module of torch made."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pytest_qlab.inputs.load_model", refuse)
    monkeypatch.setattr("torch.nn.Module.__init__", refuse)


def measured_windows(place: Path, column: str) -> tuple[list[float], list[int]]:
    """Means over the tokens of each stored window, and the documents of the windows."""
    rows = lab_of(place).candidate(RTN).fidelity.windows
    return (rows[column] / rows["tokens"]).tolist(), rows["document"].tolist()


# --- sources -------------------------------------------------------------------------------


def test_nothing_is_known_of_a_new_text(place: Path, tmp_path: Path, unloadable: None) -> None:
    lab = lab_of(place, evaluation=str(write_texts(tmp_path / "other", 2)))
    assert StoredSpreads(lab).spread(RTN, "kl.mean") is None
    fresh = lab_of(place, store=tmp_path / "store")
    plan = Planner(fresh, 0.95).plan([(RTN, ConfiguredBudget("*", "kl.mean", 0.1))])
    assert plan.rows[0].spread == assumed("kl.mean")
    assert "18 windows of spread48 from 6 documents; this run takes 18" in plan.render()
    assert "assumed: as on the embedded model" in plan.render()
    assert fresh.forwards == 0
    assert not (tmp_path / "store").exists()


def test_a_candidate_is_known_from_the_store(place: Path, unloadable: None) -> None:
    """Its value, the deviation of its windows, and how much documents add to it."""
    means, documents = measured_windows(place, "kl")
    found = StoredSpreads(lab_of(place)).spread(RTN, "kl.mean")
    assert found is not None
    assert found.source == "itself, 18 windows"
    assert found.value == pytest.approx(np.mean(means))
    deviation = float(np.std(means, ddof=1))
    assert found.deviation(found.value or 0, 47) == pytest.approx(deviation, rel=1e-6)
    by_document = [
        np.mean([m for m, d in zip(means, documents, strict=True) if d == n]) for n in range(6)
    ]
    effect = (np.var(by_document, ddof=1) / 6) / (deviation**2 / 18)
    assert found.correlation == pytest.approx(min(1, max(0, (effect - 1) / 2)), abs=1e-6)


def test_what_is_most_alike_is_taken(place: Path, unloadable: None) -> None:
    stored = StoredSpreads(lab_of(place))
    other = stored.spread(COARSE, "kl.mean")
    assert other is not None
    assert (other.source, other.value) == ("another rtn, 18 windows", None)
    [awq] = parse_specs(["awq:group_size=8"])
    unlike = stored.spread(awq, "kl.mean")
    assert unlike is not None
    assert unlike.source in ("another rtn, 18 windows", "another dynamic, 18 windows")
    # The candidate itself on other windows of the text comes before others on the same.
    sampled = StoredSpreads(lab_of(place, max_windows=7, seed=3)).spread(RTN, "kl.mean")
    assert sampled is not None
    assert sampled.source == "itself, 18 windows"
    of_domain = stored.spread(RTN, "top1_agreement[odd]")
    assert of_domain is not None
    assert of_domain.source == "itself, 9 windows"
    assert stored.spread(RTN, "kl.mean[old]") is None


def test_a_damaged_entry_of_the_store_is_left_out(place: Path, tmp_path: Path) -> None:
    lab = lab_of(place)
    count = len(list(lab.store.entries("fidelity")))
    broken = lab.store.root / "v1" / "fidelity" / "broken"
    broken.mkdir()
    for text in ("{", "[]", '{"parts": 3}'):
        (broken / "manifest.json").write_text(text, encoding="utf-8")
        assert len(list(lab.store.entries("fidelity"))) == count
    assert list(lab.store.entries("nothing")) == []
    (broken / "manifest.json").unlink()
    broken.rmdir()


def baseline_of(found: Fidelity, model: str) -> Baseline:
    """What is saved of a candidate, put together from its window sums."""
    rows = found.windows
    return Baseline(
        model=Subject(id=model, name="tiny", dtype="float32"),
        windows=Windows(
            digest="d",
            convention="spread48",
            domains=["even", "odd"],
            domain=[["even", "odd"].index(found._domains[n]) for n in rows["document"]],
            document=rows["document"].tolist(),
            tokens=rows["tokens"].tolist(),
            base_nll=rows["base_nll"].tolist(),
        ),
        candidates={
            RTN.id: SavedCandidate(
                method="rtn",
                sums=Sums(
                    delta=rows["delta"].tolist(),
                    kl=rows["kl"].tolist(),
                    tail=rows["kl_tail"].tolist(),
                    agree=rows["agree"].tolist(),
                ),
            )
        },
    )


@pytest.mark.parametrize("metric", [*SUMMED, "perplexity_ratio", "perplexity", "kl.mean[odd]"])
def test_a_saved_baseline_says_the_same_as_the_store(place: Path, metric: str) -> None:
    lab = lab_of(place)
    baseline = baseline_of(lab.candidate(RTN).fidelity, lab.model.digest)
    stored = StoredSpreads(lab).spread(RTN, metric)
    saved = saved_spread(baseline, "v1", RTN.id, metric)
    if metric == "kl.tail" and saved is None:  # none was above 1 nat, and sums say no more
        return
    assert stored is not None
    assert saved is not None
    assert saved.source.startswith("itself in v1, ")
    for name in ("factor", "correlation", "value", "base_perplexity"):
        assert getattr(saved, name) == pytest.approx(getattr(stored, name), rel=1e-3, abs=1e-6)
    other = saved_spread(baseline, "v1", COARSE.id, metric)
    assert other is not None
    assert (other.source.split(" in ")[0], other.value) == (RTN.id, None)


def test_a_baseline_does_not_know_quantiles_or_other_models(place: Path, tmp_path: Path) -> None:
    lab = lab_of(place)
    found = lab.candidate(RTN).fidelity
    assert saved_spread(baseline_of(found, "m"), "v1", RTN.id, "kl.p99") is None
    assert saved_spread(baseline_of(found, "m"), "v1", RTN.id, "kl.mean[old]") is None
    empty = lab_of(place, store=tmp_path)
    gates = [(RTN, ConfiguredBudget("*", "kl.mean", 0.1))]
    for model, source in (("another", "assumed"), (lab.model.digest, "itself in v1, 18 windows")):
        planner = Planner(empty, 0.95, [("v1", baseline_of(found, model))])
        spread = planner.plan(gates).rows[0].spread
        assert spread is not None
        assert spread.source == source


# --- laws ----------------------------------------------------------------------------------


def test_every_measure_of_windows_with_an_interval_has_a_law() -> None:
    damage = {metric for metric in DIRECTIONS if known_direction(f"{metric}[code]")}
    assert set(LAWS) == damage - {"kl.max"}


@pytest.mark.parametrize(
    ("metric", "budget", "half"),
    [
        ("kl.mean", 0.02, 0.01),
        ("kl.mean[code]", 0.02, 0.01),
        ("perplexity_delta", 0.5, 0.25),
        ("perplexity_ratio", 1.1, 1.05),
        ("top1_agreement", 0.9, 0.95),
        ("cosine", 0.98, 0.99),
        ("snr_db", 20.0, 23.0103),  # half of the noise
        ("perplexity", 12.0, 11.0),
        ("perplexity", 9.0, None),  # below the base model's 10
        ("perplexity_delta", 0.0, None),
        ("perplexity_ratio", 0.99, None),
        ("top1_agreement", 1.0, None),
        ("base_perplexity", 12.0, None),
    ],
)
def test_half_of_what_a_budget_allows(metric: str, budget: float, half: float | None) -> None:
    found = at_share(metric, budget, 0.5, 10.0)
    assert found == (None if half is None else pytest.approx(half))
    if metric == "perplexity":
        assert at_share(metric, budget, 0.5, None) is None


def measured(value: float, **more: Any) -> Measured:
    fields: dict[str, Any] = {
        "error": 0.02,
        "by_window": 0.01,
        "documents": np.repeat(np.arange(20), 5),
        "kl": 0.04,
        "base_perplexity": 10.0,
        **more,
    }
    return Measured(value, **fields)


@pytest.mark.parametrize(
    ("metric", "value", "more", "damage", "times"),
    [
        ("kl.mean", 0.04, 0.16, 4, 4.0),
        ("kl.p99", 0.3, 0.6, 2, 2.0),
        ("cosine", 0.99, 0.97, 3, 3.0),
        ("log_perplexity_delta", 0.04, 0.16, 4, 2.0),
        ("perplexity_ratio", math.exp(0.04), math.exp(0.16), 4, 2.0),
        ("snr_db", 20.0, 14.0, 4, 1.0),
        ("perplexity", 10.0, 11.0, None, 1.1),
        ("perplexity_delta", 10 * math.expm1(0.04), 20 * math.expm1(0.04), 2, 2.0),
    ],
)
def test_deviations_follow_the_damage(
    metric: str, value: float, more: float, damage: int | None, times: float
) -> None:
    """By which factor windows differ more if there is `damage` times as much of it."""
    found = measured(value).spread(metric, "here", own=True)
    assert found is not None
    # 100 windows with an error of 0.01 have a deviation of 0.1.
    assert found.deviation(value, 100) == pytest.approx(0.1)
    assert found.deviation(more, 100) == pytest.approx(0.1 * times)
    # Documents of 5 windows double the error: an effect of 4, so that 1 + 4 r = 4.
    assert found.correlation == pytest.approx(0.75)


def test_improvements_by_chance_still_have_a_deviation() -> None:
    found = measured(-0.001).spread("log_perplexity_delta", "here", own=True)
    assert found is not None
    assert found.deviation(0.04, 100) == pytest.approx(0.1)  # as of its KL
    assert found.deviation(-0.001, 100) == 0


def test_rates_deviate_as_binomials_with_a_design_effect() -> None:
    found = measured(0.1, effect=4.0).spread("top1_agreement", "here", own=False)
    assert found is not None
    assert found.deviation(0.9, 400) == pytest.approx(2 * math.sqrt(0.9 * 0.1 / 400))
    assert found.value is None


@pytest.mark.parametrize("metric", ["kl.mean", "snr_db", "log_perplexity_delta"])
def test_an_exact_copy_says_nothing_of_others(metric: str) -> None:
    copy = measured(0.0, error=0.0, by_window=0.0, kl=0.0)
    assert copy.spread(metric, "here", own=True) is None


def test_one_window_a_document_shows_no_correlation() -> None:
    found = measured(0.04, documents=np.arange(100)).spread("kl.mean", "here", own=True)
    assert found is not None
    assert found.correlation == LAWS["kl.mean"].correlation


# --- rows ----------------------------------------------------------------------------------

KNOWN = Spread("kl.mean", "itself", 0.3, 0.5, value=0.05)
UNKNOWN = Spread("kl.mean", "assumed", 0.3, 0.5)


@pytest.mark.parametrize(
    ("spread", "half", "two_thirds", "known", "verdict"),
    [
        (KNOWN, 9, 99, 64, "enough: it is kept"),
        (KNOWN, 9, 9, 65, "give --qlab-max-windows=65"),
        (KNOWN, 9, 9, 250, "more text needed: about 2.5 times as much"),
        (KNOWN, 9, 9, NEVER, "cannot be decided: the value is at the budget"),
        (UNKNOWN, 30, 64, None, "enough"),
        (UNKNOWN, 64, 65, None, "enough up to half of the budget"),
        (UNKNOWN, 80, 300, None, "give --qlab-max-windows=80"),
        (UNKNOWN, 150, 300, None, "more text needed: about 1.5 times as much"),
        (UNKNOWN, NEVER, NEVER, None, "needs more documents than this text can show"),
        (UNKNOWN, None, None, None, "cannot be planned before the base model was run"),
        (None, None, None, None, "exact, needs no windows"),
    ],
)
def test_verdicts(
    spread: Spread | None,
    half: float | None,
    two_thirds: float | None,
    known: float | None,
    verdict: str,
) -> None:
    metric = "kl.mean" if spread else "size"
    budget = ConfiguredBudget("*", metric, 0.06)
    row = Row("m", budget, spread, 64, 100, half, two_thirds, known)
    assert row.verdict == verdict


def test_a_budget_that_is_missed_is_enough_too() -> None:
    row = Row("m", ConfiguredBudget("*", "kl.mean", 0.04), KNOWN, 64, 100, 9, 9, 30)
    assert row.verdict == "enough: it is not kept"
    high = Spread("top1_agreement", "itself", 1.6, 0.5, value=0.95)
    row = Row("m", ConfiguredBudget("*", "top1_agreement", 0.9), high, 64, 100, 9, 9, 30)
    assert row.verdict == "enough: it is kept"
    assert Row("m", ConfiguredBudget("*", "latency.p50", 1), None, 64, 100).verdict == (
        "timed in rounds, not windows"
    )


def window_set(documents: list[int], domains: list[str]) -> WindowSet:
    """Windows of 47 scored tokens of those documents, which are of those domains."""
    names = tuple((str(number), domain) for number, domain in enumerate(domains))
    windows = tuple(Window(number, tuple(range(48)), 1) for number in documents)
    return WindowSet("", "spread48", names, windows, "")


def test_documents_are_counted_as_windows_are_spread() -> None:
    """Ten documents, of 1 to 10 windows, in two domains."""
    text = Text(window_set([n for n in range(10) for _ in range(n + 1)], ["a", "b"] * 5), 20)
    assert (text.total, text.given, text.share) == (55, 20, 1.0)
    assert text.documents_at(55) == 10
    assert text.documents_at(110) == 20  # of twice as much text
    for count in (2, 5, 11, 30):
        members = [n for n in range(10) for _ in range(n + 1)]
        expected = {members[int(place * 55 / count)] for place in range(count)}
        assert text.documents_at(count) == len(expected)
    single = Text(window_set([0] * 64, ["a"]), 64)
    assert single.documents_at(64) == 8  # blocks of eight neighbours stand in
    assert single.documents_at(8) == 1
    domain = Text(window_set([0, 0, 0, 1], ["a", "b"]), 4, "b")
    assert (domain.share, domain.documents_at(1)) == (0.25, 1)
    with pytest.raises(MetricError, match=r"No window of the text belongs to a domain 'bb'"):
        Text(window_set([0, 1], ["a", "b"]), 2, "bb")


# --- the command line ----------------------------------------------------------------------

BUDGETS = """
[tool.qlab]
select = ["rtn:bits=4:group_size=8", "dynamic"]
window_length = 48
[tool.qlab.budgets]
"*" = { "kl.mean" = 0.5, size = 1e9, "top1_agreement[odd]" = 0.2 }
"""


@pytest.fixture
def project(
    pytester: pytest.Pytester, place: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_qlab.plugin,xdist.plugin")
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyprojecttoml(BUDGETS)
    pytester.makepyfile("def test_nothing(): raise AssertionError")
    return pytester


def planned(project: pytest.Pytester, place: Path, *more: str) -> pytest.RunResult:
    return project.runpytest_inprocess(
        "--qlab-plan",
        f"--qlab-model={place / 'model'}",
        f"--qlab-eval={place / 'text'}",
        f"--qlab-calibration={place / 'text'}",
        f"--qlab-store={place / 'store'}",
        *more,
    )


def test_the_plan_is_printed_and_nothing_runs(
    project: pytest.Pytester, place: Path, unloadable: None
) -> None:
    before = sorted((place / "store").rglob("*"))
    result = planned(project, place, "-n2")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "method * budget * value * spread of windows * at 1/2 * at 2/3 * at value*",
            "rtn-w4g8 * kl.mean <= 0.5 * 0.* itself, 18 windows * enough: it is kept",
            "rtn-w4g8 * size <= 1e+09 * exact, needs no windows",
            "rtn-w4g8 * top1_agreement[[]odd] >= 0.2 * itself, 9 windows *",
            "dynamic-w8a8 * kl.mean <= 0.5 * itself, 18 windows *",
            "Windows that decide a budget with 0.95 confidence and 0.95 power*",
            "The text has 18 windows of spread48 from 6 documents; this run takes 18.",
        ]
    )
    result.stdout.no_fnmatch_line("*test session starts*")
    result.stdout.no_fnmatch_line("assumed:*")
    assert sorted((place / "store").rglob("*")) == before


def test_more_confidence_needs_more_windows(
    project: pytest.Pytester, place: Path, unloadable: None
) -> None:
    def needed(confidence: str) -> int:
        result = planned(project, place, f"--qlab-confidence={confidence}", "--qlab-max-windows=3")
        [line] = [each for each in result.outlines if each.startswith("rtn") and "kl.mean" in each]
        return int(line.split("windows")[1].split()[0].replace(",", ""))

    assert needed("0.8") < needed("0.999")


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ("[tool.qlab]\n", [], "*there are no budgets to hold methods to. Write some*kl.mean*"),
        (BUDGETS.replace("odd", "old"), [], "*belongs to a domain 'old'. Did you mean 'odd'?*"),
        (BUDGETS, ["--qlab-compare=v1"], "*there is no baseline 'v1'*"),
        (BUDGETS, ["--qlab-model=nowhere/at/all"], "*nowhere/at/all*"),
    ],
)
def test_what_cannot_be_planned_is_a_usage_error(
    project: pytest.Pytester, place: Path, table: str, arguments: list[str], message: str
) -> None:
    project.makepyprojecttoml(table)
    result = planned(project, place, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
