"""Do the statistics hold? Simulated runs of the gates on the embedded model's own text.

    python -m scripts.simulate_gates

prints the tables of docs/explanation/statistics.md, from 12,000 simulated runs, in about six
minutes on two idle cores (`--quick`: in two). Candidates are evaluated once over all windows of the
embedded evaluation and calibration text. Runs then draw documents and windows of that, and go
through the same code as a test's: sampling, looks, estimates, intervals, decisions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pytest_qlab.stats.bootstrap import cluster_counts, clustered_quantiles
from scripts.markdown import table
from scripts.simulation import GATED, MEASURES, Gate, Population, Simulation, simulate
from scripts.update_readme import replaced

CANDIDATES = ("rtn:bits=8", "gptq:bits=4", "rtn:bits=4", "rtn:bits=3", "rtn:bits=2")


def embedded_populations(
    candidates: Sequence[str] = CANDIDATES, store: str | Path | None = None
) -> Iterator[tuple[str, Population, int]]:
    """Each candidate over all windows of the embedded text; how many documents are evaluation text.

    The documents of the calibration text come after those.
    """
    from pytest_qlab import Lab
    from pytest_qlab.data.text import load_documents

    own = load_documents("embedded")
    documents = [*own, *load_documents("embedded", split="calibration")]
    lab = Lab(evaluation=documents, max_windows=0, store=store)
    domains = tuple(document.domain for document in documents)
    for spec in candidates:
        candidate = lab.candidate(spec)
        yield candidate.id, Population(candidate.fidelity.tokens, domains), len(own)
        candidate.release()
    lab.close()


@dataclass(frozen=True)
class Plan:
    """How many runs: on other text, with the same mix, with other seeds, and with many windows."""

    runs: int = 2000
    resampled: int = 500
    mix: int = 200
    seeds: int = 200
    long: int = 60


QUICK = Plan(runs=400, resampled=100, mix=40, seeds=40, long=12)
LONG_DOCUMENTS, LONG_WINDOWS = 150, 256
LONG_MEASURES = ("log_perplexity_delta", "kl.mean")


def simulate_all(population: Population, evaluation: int, plan: Plan) -> dict[str, Simulation]:
    """Every design for one candidate; by name, and `long` for texts of 256 windows."""
    everything, own = population.balanced(), population.of(range(evaluation))
    return {
        "other text": simulate(everything, "other text", plan.runs, resampled=plan.resampled),
        "same mix": simulate(everything, "same mix", plan.mix, factors=()),
        "same text": simulate(own, "same text", plan.seeds),
        "long": simulate(
            everything,
            "other text",
            plan.long,
            measures=LONG_MEASURES,
            documents=LONG_DOCUMENTS,
            windows=LONG_WINDOWS,
        ),
    }


# --- tables --------------------------------------------------------------------------------------

Found = Mapping[str, Mapping[str, Simulation]]


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{100 * share:.1f}"


def coverage_table(found: Found, design: str) -> str:
    """Percent of intervals with the truth in them: a row for each candidate."""
    rows = [
        [name, *(percent(each.share) for each in runs[design].coverage.values())]
        for name, runs in found.items()
    ]
    return table(["candidate", *(f"`{name}`" for name in MEASURES)], rows)


def least_coverage(found: Found, design: str) -> str:
    """Of all candidates and measures, the least percentage of intervals with the truth in them."""
    return percent(min(c.share for runs in found.values() for c in runs[design].coverage.values()))


def gate_table(
    found: Found, design: str, factor: float, cell: Callable[[Gate], str], measures: Sequence[str]
) -> str:
    """Something of each gate at one budget: a row for each candidate, `-` where none was held."""
    rows = []
    for name, runs in found.items():
        gates = [runs[design].gates.get((measure, factor)) for measure in measures]
        rows.append([name, *("-" if gate is None else cell(gate) for gate in gates)])
    return table(["candidate", *(f"`{name}`" for name in measures)], rows)


def bootstrap_seconds(replicates: int = 10_000, windows: int = 1000) -> tuple[float, float]:
    """Seconds for that many replicates over windows of 365 tokens, two a document.

    Returns:
        For a mean, and for the 99th percentile of all tokens.
    """
    generator = np.random.default_rng(0)
    document = np.repeat(np.arange(windows) // 2, 365)
    values = generator.gamma(0.5, size=document.size).astype(np.float32)
    began = time.perf_counter()
    sums = np.stack([np.bincount(document, weights=values), np.bincount(document)], axis=1)
    replicate = cluster_counts(windows // 2, replicates, seed=0) @ sums
    np.quantile(replicate[:, 0] / replicate[:, 1], [0.025, 0.975])
    middle = time.perf_counter()
    clustered_quantiles(values, document, [0.99], replicates=replicates)
    return middle - began, time.perf_counter() - middle


def verdicts(gate: Gate) -> str:
    """Agreement, and what the runs agreed on."""
    return f"{percent(gate.agreement)} {gate.outcomes.most_common(1)[0][0]}"


def report(found: Found, plan: Plan) -> str:
    """All tables."""

    def passes(gate: Gate) -> str:
        return percent(gate.share("pass"))

    def fails(gate: Gate) -> str:
        return percent(gate.share("fail"))

    def drawn(gate: Gate) -> str:
        return f"{gate.mean_windows:.0f}"

    mean, tail = bootstrap_seconds()
    sections: list[tuple[str, ...]] = [
        (
            f"Nominal 95 % intervals with the truth in them, percent of {plan.runs:,} runs on "
            "other text:",
            coverage_table(found, "other text"),
        ),
        (
            f"The same where every text has the same mix of domains ({plan.mix} runs):",
            coverage_table(found, "same mix"),
        ),
        (
            f"Where each run sees other windows of the same text ({plan.seeds} runs), "
            f"at least {least_coverage(found, 'same text')} % of the intervals of any measure and "
            "candidate have it.",
        ),
        (
            f"A candidate exactly at the budget: percent of {plan.runs:,} runs that pass:",
            gate_table(found, "other text", 1.0, passes, GATED),
        ),
        (
            "The same candidate: percent of runs that fail:",
            gate_table(found, "other text", 1.0, fails, GATED),
        ),
        (
            "A candidate at half the budget: percent of runs that pass:",
            gate_table(found, "other text", 2.0, passes, GATED),
        ),
        (
            f"The budget is 1.5 times the damage: percent of {plan.seeds} runs with other window "
            "seeds that have the same outcome:",
            gate_table(found, "same text", 1.5, verdicts, GATED),
        ),
        (
            "The damage is 1.5 times the budget:",
            gate_table(found, "same text", 1 / 1.5, verdicts, GATED),
        ),
        (
            "Windows drawn, of 64, on average, where the budget is four times the damage:",
            gate_table(found, "other text", 4.0, drawn, GATED),
        ),
        (
            "And where the damage is four times the budget:",
            gate_table(found, "other text", 0.25, drawn, GATED),
        ),
        (
            f"With {LONG_WINDOWS} windows of {LONG_DOCUMENTS} documents, and a look after an "
            f"eighth of them ({plan.long} runs):",
            long_table(found),
        ),
        (
            "Seconds for 10,000 bootstrap replicates over 1,000 windows of 365 tokens:",
            table(["", "seconds"], [["a mean", f"{mean:.2f}"], ["`kl.p99`", f"{tail:.2f}"]]),
        ),
    ]
    return "\n\n".join(part for section in sections for part in section)


def long_table(found: Found) -> str:
    """Errors, power and windows drawn of long runs."""
    head = ["candidate and measure"]
    head += ["passes at the budget", "passes at half", "windows at half", "windows at a quarter"]
    rows = []
    for name, runs in found.items():
        for metric in LONG_MEASURES:
            gates = runs["long"].gates
            if (metric, 1.0) in gates:
                one, two, four = (gates[metric, factor] for factor in (1.0, 2.0, 4.0))
                cells = [percent(one.share("pass")), percent(two.share("pass"))]
                cells += [f"{two.mean_windows:.0f}", f"{four.mean_windows:.0f}"]
                rows.append([f"{name}, `{metric}`", *cells])
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m scripts.simulate_gates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a fifth of the runs")
    parser.add_argument("--store", type=Path, help="directory of artefacts; by default the cache's")
    parser.add_argument("--into", type=Path, help="page whose part `simulations` is written anew")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    # The processes share the cores; a thread for each product of matrices would not make it faster.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {
            name: pool.submit(simulate_all, population, evaluation, plan)
            for name, population, evaluation in embedded_populations(store=options.store)
        }
        found = {name: future.result() for name, future in waiting.items()}
    tables = report(found, plan)
    sys.stdout.write(f"{tables}\n")
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(replaced(page, "simulations", tables), encoding="utf-8")


if __name__ == "__main__":
    main()
