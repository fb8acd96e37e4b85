"""All methods beside each other at 2, 3 and 4 bits, ordered by damage.

    python -m scripts.compare_methods
    python -m scripts.compare_methods --bits 4 --model path/to/model

prints a table for each width: what is stored for each weight, all scales, tables and outliers
counted, and what it does to the model's predictions. On the embedded model the three take some
minutes on two cores. Another model is given as to `--qlab-model`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_qlab.candidate import Candidate
from pytest_qlab.estimate import Estimate
from pytest_qlab.lab import Lab
from pytest_qlab.models.structure import all_linears
from scripts import markdown
from scripts.update_readme import replaced

METHODS: Mapping[int, tuple[str, ...]] = {
    4: (
        "rtn",
        "rtn:mse",
        "rtn:group_size=64",
        "rtn:group_size=-1",
        "gptq",
        "gptq:group_size=-1",
        "awq",
        "hqq",
        "nf4",
        "nf4:double_quant",
        "fp4",
        "mxfp4",
        "mxfp4:scale=ceil",
        "mxfp4:scale=even",
        "mxfp4:activations",
        "nvfp4",
        "nvfp4:four_over_six",
        "nvfp4:activations",
        "dynamic:bits=4",
        "squeezellm",
        "squeezellm:dense_and_sparse",
        "spqr:bits=4",
        "spqr",
        "quip",
        "quip:transform=hadamard",
        "ldlq:nvfp4",
        "ldlq:nf4",
        "ldlq:mxfp4",
        "ldlq:table4",
        "quarot+rtn:group_size=-1",
        "quarot+gptq:group_size=-1",
        "quarot+gptq",
        "quarot+ldlq:nvfp4",
        "smooth+gptq",
        "ggml:Q4_K",
        "ggml:Q4_K:imatrix",
        "ggml:Q4_0",
        "ggml:IQ4_XS",
    ),
    3: (
        "rtn:bits=3",
        "rtn:bits=3:mse",
        "rtn:bits=3:group_size=64",
        "rtn:bits=3:group_size=-1",
        "gptq:bits=3",
        "gptq:bits=3:group_size=16",
        "gptq:bits=3:group_size=-1",
        "awq:bits=3",
        "hqq:bits=3",
        "squeezellm:bits=3",
        "squeezellm:bits=3:dense_and_sparse",
        "spqr:outlier_threshold=0.5",
        "quip:bits=3",
        "quip:bits=3:transform=hadamard",
        "ldlq:table3",
        "quarot+rtn:bits=3:group_size=-1",
        "quarot+gptq:bits=3:group_size=-1",
        "quarot+gptq:bits=3",
        "ggml:Q3_K",
        "ggml:Q3_K:imatrix",
    ),
    2: (
        "rtn:bits=2:group_size=32",
        "rtn:bits=2:group_size=32:mse",
        "gptq:bits=2:group_size=32",
        "gptq:bits=2:group_size=-1",
        "awq:bits=2:group_size=32",
        "hqq:bits=2:group_size=32",
        "squeezellm:bits=2",
        "squeezellm:bits=2:dense_and_sparse",
        "spqr:bits=2:outlier_threshold=1",
        "quip:bits=2",
        "quip:bits=2:transform=hadamard",
        "ldlq:table2",
        "quarot+gptq:bits=2:group_size=-1",
        "quarot+gptq:bits=2:group_size=32",
        "ggml:Q2_K",
        "ggml:Q2_K:imatrix",
    ),
    8: ("none", "dynamic", "static", "smoothquant", "fp8", "rtn:bits=8", "hqq:bits=8", "ggml:Q8_0"),
}
HEAD = ("method", "bits per weight", "KL, nats", "95 %", "perplexity", "layer error", "seconds")


def interval(found: Estimate) -> str:
    """Its ends."""
    if found.lower is None or found.upper is None:
        return ""
    return f"{found.lower:.3g} to {found.upper:.3g}"


def row(candidate: Candidate) -> tuple[float, list[str]]:
    """A candidate's KL, and its line."""
    kl = candidate.kl.mean
    cells = [
        f"`{candidate.id}`",
        f"{float(candidate.bits_per_weight):.3f}",
        f"{float(kl):.4f}",
        interval(kl),
        f"{float(candidate.perplexity_delta):+.2f}",
        f"{float(candidate.layer_error):.5f}",
        f"{candidate.checkpoint.seconds:.1f}",
    ]
    return float(kl), cells


def shape_of_weights(lab: Lab) -> str:
    """How far weights are from normal: what rotations, tables and outliers can gain from."""
    fourth, largest = [], []
    for site in all_linears(lab.base_model):
        weight = site.weight()
        scaled = weight / weight.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        fourth.append(float(scaled.pow(4).mean()))
        largest.append(float(scaled.abs().amax(1).mean()))
    return (
        f"Rows of weights have a kurtosis of {min(fourth):.2f} to {max(fourth):.2f} (mean "
        f"{sum(fourth) / len(fourth):.2f}; normal numbers: 3), and a largest weight of "
        f"{sum(largest) / len(largest):.2f} root mean squares on average."
    )


def table(lab: Lab, specs: Sequence[str]) -> str:
    """A markdown table of those methods, the least damage first."""
    rows = []
    for spec in specs:
        candidate = lab.candidate(spec)
        rows.append(row(candidate))
        candidate.release()
    return markdown.table(HEAD, [cells for _, cells in sorted(rows, key=lambda each: each[0])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them into a page if one is named."""
    parser = argparse.ArgumentParser(prog="python -m scripts.compare_methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], choices=sorted(METHODS))
    parser.add_argument("--model", default="embedded", help="as of --qlab-model")
    parser.add_argument("--store", type=Path, help="directory of artefacts; by default the cache's")
    parser.add_argument("--max-windows", type=int, default=64, help="of evaluation text")
    parser.add_argument("--into", type=Path, help="page whose parts `methods-N` are written anew")
    options = parser.parse_args(arguments)
    given: dict[str, Any] = {} if options.store is None else {"store": options.store}
    lab = Lab(
        options.model,
        max_windows=options.max_windows,
        progress=lambda line: print(line, file=sys.stderr),
        **given,
    )
    shape = shape_of_weights(lab)
    page = None if options.into is None else options.into.read_text(encoding="utf-8")
    for bits in options.bits:
        started = time.perf_counter()
        found = table(lab, METHODS[bits])
        seconds = time.perf_counter() - started
        note = f"{len(METHODS[bits])} methods at {bits} bits, {seconds:.0f} s in all."
        sys.stdout.write(f"{found}\n\n{note}\n\n")
        if page is not None:
            page = replaced(page, f"methods-{bits}", f"\n{found}\n\n{note}\n")
    sys.stdout.write(f"{shape}\n")
    if page is not None:
        page = replaced(page, "shape-of-weights", shape)
    if options.into is not None and page is not None:
        options.into.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
