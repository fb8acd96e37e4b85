"""Print the benchmarks as Markdown tables: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.disturbance import benchmark_disturbance
from benchmarks.ggml import benchmark_ggml
from benchmarks.kernels import benchmark_kernels
from benchmarks.libraries import benchmark_libraries
from benchmarks.peers import PeerError
from benchmarks.products import benchmark_products
from benchmarks.quantizers import benchmark_quantizer
from benchmarks.runs import RunError, benchmark_store, benchmark_workers
from benchmarks.serial import benchmark_serial
from benchmarks.settings import Benchmark, available_cores, say
from benchmarks.streaming import benchmark_streaming
from benchmarks.suite import benchmark_suite
from benchmarks.tables import Section, table
from pytest_qlab import QlabError
from pytest_qlab.specs import DEFAULT_SPECS

PARTS: dict[str, Callable[[Benchmark], Section]] = {
    "gptq": partial(benchmark_quantizer, "gptq"),
    "gptqmodel": partial(benchmark_quantizer, "gptq", library="gptqmodel"),
    "awq": partial(benchmark_quantizer, "awq"),
    "libraries": benchmark_libraries,
    "products": benchmark_products,
    "suite": benchmark_suite,
    "store": benchmark_store,
    "workers": benchmark_workers,
    "ggml": benchmark_ggml,
    "kernels": benchmark_kernels,
    "disturbance": benchmark_disturbance,
    "serial": benchmark_serial,
    "streaming": benchmark_streaming,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts one after the other and print each when it is done; 1 if one has failed."""
    options = parse(arguments)
    benchmark = Benchmark(
        model=options.model,
        repeat=options.repeat,
        threads=options.threads,
        windows=options.windows,
        sequences=options.sequences,
        length=options.length,
        methods=tuple(options.methods.split(",")),
        peers_python=options.peers_python,
        gptqmodel_python=options.gptqmodel_python,
    )
    facts = describe(benchmark)
    print("\n".join(table(("", ""), [[key, str(value)] for key, value in facts.items()])))
    results: dict[str, Any] = {"environment": facts}
    failed = False
    for name in options.only:
        try:
            section = PARTS[name](benchmark)
        except (PeerError, RunError, QlabError) as error:
            say(f"{name}: {error}")
            failed = True
            continue
        print(f"\n{section.markdown()}", end="", flush=True)
        results[name] = section.raw
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(failed)


def describe(benchmark: Benchmark) -> dict[str, Any]:
    """The head of the report."""
    with TemporaryDirectory(prefix="qlab-bench-") as store:
        return benchmark.describe(benchmark.lab(Path(store)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time and error as ratios, measured in one run, as Markdown tables.",
    )
    parser.add_argument(
        "--only", type=parts, default=list(PARTS), metavar="PART[,...]", help=", ".join(PARTS)
    )
    parser.add_argument("--repeat", type=positive, default=3, help="repetitions (default 3)")
    parser.add_argument("--model", default="embedded", help="embedded, a directory, or a hub id")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the raw numbers there")
    parser.add_argument(
        "--peers-python",
        type=interpreter,
        metavar="PATH",
        help="Python of an environment with benchmarks/requirements-peers.txt",
    )
    parser.add_argument(
        "--gptqmodel-python",
        type=interpreter,
        metavar="PATH",
        help="Python of an environment with benchmarks/requirements-gptqmodel.txt",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=available_cores(),
        help="threads of each side (default: the cores)",
    )
    parser.add_argument("--windows", type=positive, default=64, help="evaluation windows at most")
    parser.add_argument("--sequences", type=positive, default=128, help="calibration sequences")
    parser.add_argument("--length", type=positive, default=512, help="tokens in each of them")
    parser.add_argument(
        "--methods", default=",".join(DEFAULT_SPECS), help="of the whole comparisons"
    )
    return parser.parse_args(arguments)


def parts(text: str) -> list[str]:
    """Names of parts, separated by commas."""
    names = [piece.strip() for piece in text.split(",") if piece.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}; got {text!r}")
    return names


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0; got {text!r}")
    return int(text)


def interpreter(text: str) -> str:
    """A path made absolute without following links, which would leave a virtual environment."""
    return str(Path(text).expanduser().absolute())


if __name__ == "__main__":
    sys.exit(main())
