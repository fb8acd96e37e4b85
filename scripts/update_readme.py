"""Write the README's table and its sample failure from a real run; nothing in them is typed.

pytest examples/test_compare.py -n auto --qlab-json=qlab-results.json
python scripts/update_readme.py qlab-results.json
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_qlab.report.markdown import render_markdown
from pytest_qlab.results import Results

README = Path(__file__).parents[1] / "README.md"
MEASURES = (
    "perplexity",
    "perplexity_delta",
    "kl.mean",
    "kl.p99",
    "top1_agreement",
    "snr_db",
    "layer_error",
    "bits_per_weight",
    "compression_ratio",
)
GATE = "def test_quality(quantized):\n    assert quantized.kl.mean < 0.001\n"


def table(results: Results) -> str:
    """The chosen columns of the benchmark table, and the line that says what was measured on."""
    for row in results.candidates:
        row.measures = {name: row.measures[name] for name in MEASURES if name in row.measures}
        row.budgets, row.layers = [], []
    lines = render_markdown(results).splitlines()
    facts = [line.strip() for line in lines if line.startswith(("Model:", "Evaluation:"))]
    rows = [line for line in lines if line.startswith("|")]
    return "\n".join([*rows, "", *(f"{fact}  " for fact in facts)]).rstrip()


def failure() -> str:
    """What pytest prints where a budget is missed, by running such a test."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "test_gate.py").write_text(GATE, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        found = subprocess.run(
            [*command, "--qlab-methods=gptq", "test_gate.py"],
            cwd=directory,
            capture_output=True,
            text=True,
        )
    lines = [line for line in found.stdout.splitlines() if re.match(r"^[E>] ", line)]
    if not lines:
        raise SystemExit(f"the sample test did not fail as expected:\n{found.stdout}")
    return "\n".join(["```", *lines, "```"])


def replaced(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of that name replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"there are no markers named {name}")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def main() -> None:
    """Rewrite README.md from the results file named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    text = README.read_text(encoding="utf-8")
    text = replaced(text, "results-table", table(Results.read(Path(sys.argv[1]))))
    text = replaced(text, "failure", failure())
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
