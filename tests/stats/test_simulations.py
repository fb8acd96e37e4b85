"""The statistics hold: smaller versions of what scripts/simulate_gates.py prints.

Synthetic candidates damage a few documents far more than the others, and the windows of a document
alike. One slow test is about the embedded model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pytest_qlab.metrics import spreads
from pytest_qlab.metrics.tokens import TokenArrays
from scripts.simulate_gates import Plan, embedded_populations, report, simulate_all
from scripts.simulation import (
    MEASURES,
    Coverage,
    Gate,
    Population,
    Simulation,
    budget_at,
    simulate,
)

MEANS = ("log_perplexity_delta", "kl.mean", "top1_agreement", "snr_db")
RUNS = 200


@cache
def synthetic(damage: float = 0.2, documents: int = 75, windows: int = 2) -> Population:
    """Three domains of equally many documents, whose damage has a skewness of about 1."""
    generator = np.random.default_rng(3)
    document = np.repeat(np.arange(documents, dtype=np.int32), windows)
    lengths = generator.integers(12, 25, document.size)
    window = np.repeat(np.arange(document.size, dtype=np.int32), lengths)
    n = window.size
    own = generator.gamma(4, 1 / 4, documents)[document[window]]
    base = generator.gamma(2, 1, n)
    kl = damage * own * generator.gamma(1, 1, n)
    tokens = TokenArrays(
        base_nll=base.astype(np.float32),
        candidate_nll=(base + kl + damage * generator.normal(0, 0.5, n)).astype(np.float32),
        kl=kl.astype(np.float32),
        agree=generator.uniform(size=n) > damage * own,
        window=window,
        document=document,
        hidden_signal=generator.gamma(4, 1, n).astype(np.float32),
        hidden_error=(damage * own * generator.gamma(4, 1, n)).astype(np.float32),
        hidden_cosine=(1 - 0.1 * kl).astype(np.float32),
    )
    third = documents // 3
    return Population(tokens, ("prose",) * third + ("code",) * third + ("chat",) * third)


def chance(share: float, runs: int, deviations: float = 3.5) -> float:
    """How far the share of so many runs is from the truth, at most."""
    return deviations * math.sqrt(share * (1 - share) / runs)


def check_coverage(found: Simulation, runs: int) -> None:
    for name, coverage in found.coverage.items():
        assert 0.93 - chance(0.93, runs) < coverage.share < 0.97 + chance(0.97, runs), name


@pytest.fixture(scope="module")
def on_other_text() -> Simulation:
    factors = (0.25, 1.0, 2.0, 4.0)
    return simulate(synthetic(), "other text", RUNS, measures=MEANS, factors=factors)


def test_intervals_cover_the_truth(on_other_text: Simulation) -> None:
    check_coverage(on_other_text, RUNS)


def test_quantiles_cover_the_truth() -> None:
    check_coverage(
        simulate(synthetic(), "other text", 150, measures=("kl.median", "kl.p99"), factors=()), 150
    )


def test_the_simulation_can_tell_wrong_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one document taken for independent ones."""
    monkeypatch.setattr(spreads, "cluster_index", lambda documents: np.arange(len(documents)))
    long = synthetic(windows=8)
    monkeypatch.delitem(long.__dict__, "truth", raising=False)
    found = simulate(long, "other text", 150, measures=("kl.mean",), factors=(), windows=0)
    assert found.coverage["kl.mean"].share < 0.8


def test_the_same_mix_and_the_same_text_are_covered_more_often() -> None:
    for design in ("same mix", "same text"):
        found = simulate(synthetic(), design, 100, measures=MEANS, factors=())
        for coverage in found.coverage.values():
            assert coverage.share > 0.95 - chance(0.95, 100)


def test_a_candidate_at_the_budget_hardly_passes(on_other_text: Simulation) -> None:
    for name in MEANS:
        gate = on_other_text.gates[name, 1.0]
        assert gate.share("pass") <= 0.05 + chance(0.05, RUNS), name
        assert gate.share("fail") <= 0.05 + chance(0.05, RUNS), name


def test_a_candidate_at_half_the_budget_passes(on_other_text: Simulation) -> None:
    for name in MEANS:
        assert on_other_text.gates[name, 2.0].share("pass") >= 0.95, name


def test_clear_cases_take_a_third_of_the_windows(on_other_text: Simulation) -> None:
    for name in MEANS:
        passing, failing = (on_other_text.gates[name, factor] for factor in (4.0, 0.25))
        assert passing.share("pass") == failing.share("fail") == 1
        assert passing.mean_windows <= 64 / 3, name
        # What is damaged by less than its standard error times ten is not that clear at once.
        assert failing.mean_windows <= 64 / 2, name


def test_other_window_seeds_give_the_same_outcome() -> None:
    found = simulate(
        synthetic(documents=45),
        "same text",
        200,
        measures=("kl.mean", "top1_agreement"),
        factors=(1 / 1.5, 1.5),
    )
    for (name, factor), gate in found.gates.items():
        assert gate.agreement >= 0.98, (name, factor)
        assert gate.share("pass" if factor > 1 else "fail") == gate.agreement


# Parts


def tokens_of(population: Population, windows: Sequence[int]) -> list[float]:
    """Their KL, in order."""
    tokens = population.tokens
    return [x for w in windows for x in tokens.kl[tokens.window == w].tolist()]


def test_texts_are_drawn_as_their_design_says() -> None:
    population = synthetic()
    generator = np.random.default_rng(0)
    text, domains = population.draw(generator, "same text")
    assert text == [(window, window // 2) for window in range(150)]
    assert domains == population.domains
    text, domains = population.draw(generator, "same mix")
    assert domains == ("prose",) * 15 + ("code",) * 15 + ("chat",) * 15
    for _ in range(20):
        text, domains = population.draw(generator, "other text")
        assert sorted(domains, key=["prose", "code", "chat"].index) == list(domains)
        assert [document for _, document in text] == [n // 2 for n in range(90)]
        drawn = [window // 2 for window, _ in text[::2]]
        assert tuple(population.domains[document] for document in drawn) == domains
    assert len(set(drawn)) < 45, "with replacement"


def test_a_run_has_the_tokens_of_its_windows_whatever_the_look() -> None:
    population = synthetic()
    run = population.run(np.random.default_rng(4), "same text")
    assert [sum(map(len, run.looks[: n + 1])) for n in range(3)] == [16, 32, 64]
    everything = [tokens_of(population, [window]) for window in range(150)]
    for look in range(3):
        found = run.upto(look).tokens
        for window, document in enumerate(found.document.tolist()):
            mine = found.kl[found.window == window].tolist()
            assert mine in everything[2 * document : 2 * document + 2]
        assert len(set(found.document.tolist())) == len(found.document)


def test_parts_of_a_population() -> None:
    population = synthetic(documents=45)
    part = population.of([3, 20, 44])
    assert part.domains == ("prose", "code", "chat")
    assert part.tokens.kl.tolist() == tokens_of(population, [6, 7, 40, 41, 88, 89])
    uneven = population.of([0, 1, 2, 20, 21, 40, 41, 42])
    assert uneven.balanced().domains == ("prose", "prose", "code", "code", "chat", "chat")
    assert uneven.balanced().tokens.kl.tolist() == tokens_of(
        population, [0, 1, 2, 3, 40, 41, 42, 43, 80, 81, 82, 83]
    )


def test_budgets_are_multiples_of_the_damage() -> None:
    assert budget_at("kl.mean", 0.02, 1.5) == pytest.approx(0.03)
    assert budget_at("top1_agreement", 0.9, 2.0) == pytest.approx(0.8)
    # Twice the power of the noise is 3.01 dB.
    assert budget_at("snr_db", 20.0, 2.0) == pytest.approx(16.99, abs=1e-3)


def test_tables_show_what_was_counted() -> None:
    plan = Plan(runs=2, resampled=1, mix=1, seeds=2, long=1)
    found = {"toy": simulate_all(synthetic(), 75, plan)}
    runs = found["toy"]["other text"]
    assert set(runs.coverage) == set(MEASURES)
    runs.coverage["kl.mean"] = Coverage(within=941, above=19, below=40)
    gate = runs.gates["kl.mean", 1.0] = Gate()
    gate.outcomes.update({"pass": 3, "fail": 1, "inconclusive": 46})
    gate.windows += [16, 64]
    seeds = found["toy"]["same text"].gates["kl.mean", 1.5] = Gate()
    seeds.outcomes.update({"pass": 99, "inconclusive": 1})
    text = report(found, plan)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| toy")]
    place = list(MEASURES).index("kl.mean")
    assert rows[0][1 + place] == "94.1"
    assert [row[place] for row in rows[2:4]] == ["6.0", "2.0"]
    assert rows[5][place] == "99.0 pass"
    assert text.count("| toy, `kl.mean` |") == 1


@pytest.mark.slow
def test_they_hold_on_the_embedded_model(tmp_path: Path) -> None:
    runs = 120
    for spec in ("rtn:bits=8", "rtn:bits=3"):  # mild and strong damage
        [(_, population, evaluation)] = embedded_populations([spec], store=tmp_path)
        found = simulate(population.balanced(), "other text", runs, factors=(1.0, 2.0, 4.0))
        check_coverage(found, runs)
        for (name, factor), gate in found.gates.items():
            noisy = spec == "rtn:bits=8" and "perplexity" in name
            if factor == 1:
                assert gate.share("pass") <= 0.05 + chance(0.05, runs), name
            elif not noisy:
                assert gate.share("pass") >= 0.95, (name, factor)
            if factor == 4 and not noisy:
                assert gate.mean_windows <= 64 / 3, name
        seeds = simulate(
            population.of(range(evaluation)),
            "same text",
            60,
            measures=("kl.mean",),
            factors=(1 / 1.5, 1.5),
        )
        assert all(gate.agreement >= 0.98 for gate in seeds.gates.values())
