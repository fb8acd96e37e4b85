"""How much windows of the embedded text differ: what plans assume of a text that is not known.

    python -m scripts.measure_spreads

prints, by measure and candidate, the factor and the correlation of `LAWS` in gate/spreads.py. What
was evaluated before is read from the store; the rest takes some minutes.
"""

from __future__ import annotations

from pytest_qlab import Lab
from pytest_qlab.gate.sources import StoredSpreads
from pytest_qlab.gate.spreads import LAWS

SPECS = tuple(f"{method}:bits={bits}" for method in ("rtn", "awq", "gptq") for bits in (4, 3))


def main() -> None:
    """Print the table."""
    lab = Lab("embedded")
    candidates = [lab.candidate(spec) for spec in SPECS]
    for candidate in candidates:
        _ = candidate.fidelity
        candidate.release()
    stored = StoredSpreads(lab)
    print(f"| measure | law | assumed | {' | '.join(each.id for each in candidates)} |")
    print("|---" * (3 + len(candidates)) + "|")
    for metric, law in LAWS.items():
        cells = [metric, law.kind, f"{law.factor:g}, r {law.correlation:g}"]
        for candidate in candidates:
            found = stored.spread(candidate.spec, metric)
            own = found is not None and found.source.startswith("itself")
            cells.append(f"{found.factor:.3g}, r {found.correlation:.2f}" if found and own else "")
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
