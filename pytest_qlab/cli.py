"""The console script `qlab`: what can be done outside pytest with results and quantized models."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pytest_qlab.errors import DataError, QlabError
from pytest_qlab.metrics.serving import ServingRun
from pytest_qlab.report.benchmark import LEFT_OUT, render_benchmark
from pytest_qlab.report.html import render_page
from pytest_qlab.report.markdown import render_markdown
from pytest_qlab.report.methods import describe_methods
from pytest_qlab.report.serving import document, kept_length, render_runs
from pytest_qlab.report.table import run_failed
from pytest_qlab.report.tables import render_csv
from pytest_qlab.report.terminal import render_terminal
from pytest_qlab.results import Results, merge_results

OK, FAILED, USAGE = 0, 1, 2
SPARE_PROMPTS = 20_000
"""Beside one for each request that counts: for those before, and what an open loop sends after."""
FORMATS: dict[str, Callable[[Results], str]] = {
    "csv": render_csv,
    "markdown": render_markdown,
    "html": render_page,
    "pytest-benchmark": render_benchmark,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failing run when asked to, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except QlabError as error:
        print(f"qlab: error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return OK
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlab",
        description="Show, merge and export the results that pytest --qlab-json=FILE writes; "
        "quantize a model into a GGUF file; put load on a server.",
        epilog="Exit status: 0 done; 1 --fail-on-failure was given and something failed; 2 wrong "
        "input.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    merge = commands.add_parser(
        "merge",
        help="join the results of several runs, such as the shards of a CI matrix",
        description="Join results of runs over the same model and evaluation set, print the table "
        "and write what is asked for. A later file wins where two measured the same.",
    )
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge.add_argument("--json", type=Path, metavar="OUT", help="write the joined document")
    merge.add_argument("--html", type=Path, metavar="OUT", help="write the stand-alone page")
    merge.add_argument("--markdown", type=Path, metavar="OUT", help="write the Markdown table")
    merge.add_argument("--csv", type=Path, metavar="OUT", help="write one row per candidate")
    merge.add_argument(
        "--fail-on-failure",
        action="store_true",
        help="exit with status 1 if a test failed, a budget was not kept or a candidate broke",
    )
    merge.set_defaults(run=_merge)

    show = commands.add_parser("show", help="print the table of a results file")
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--width", type=int, help="columns to use (default: the terminal's)")
    show.set_defaults(run=_show)

    methods = commands.add_parser("methods", help="list the methods, their options and defaults")
    methods.set_defaults(run=_methods)

    export = commands.add_parser(
        "export",
        help="write a results file in another format",
        description=f"Write a results file in another format. pytest-benchmark: {LEFT_OUT}",
    )
    export.add_argument("--format", required=True, choices=list(FORMATS))
    export.add_argument("-o", "--output", type=Path, metavar="OUT", help="default: standard output")
    export.add_argument("file", type=Path, metavar="FILE")
    export.set_defaults(run=_export)

    quantize = commands.add_parser(
        "quantize",
        help="quantize a model and write it as a GGUF file that llama.cpp loads",
        description="Quantize a model as a test of it would, and write the bits as a GGUF file, "
        "rounding nothing on the way. Artefacts are shared with pytest through the store.",
    )
    quantize.add_argument("spec", metavar="SPEC", help="as in --qlab-methods: gguf:Q4_K_M")
    quantize.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.gguf")
    quantize.add_argument("--model", default="embedded", help="embedded, a directory, or a hub id")
    quantize.add_argument(
        "--calibration", default="embedded", metavar="NAME_OR_PATH", help="calibration text"
    )
    quantize.add_argument("--revision", help="revision of a hub model")
    quantize.add_argument("--store", type=Path, metavar="DIR", help="directory of artefacts")
    quantize.add_argument(
        "--stream",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether to read the model block by block, so that it need not fit in memory "
        "(default: if it would not)",
    )
    quantize.add_argument("--trust-remote-code", action="store_true", help="run a model's own code")
    quantize.set_defaults(run=_quantize)

    bench = commands.add_parser(
        "serve-bench",
        help="put load on a server of OpenAI's completions, and time its tokens",
        description="Put load on a vLLM server, llama.cpp's server or any other with OpenAI's "
        "/completions, by streaming: time to the first token, time per token after it, and tokens "
        "a second. Exit status 1: replies were not as long as was asked for, or the server was "
        "over-saturated.",
    )
    bench.add_argument("--endpoint", required=True, metavar="URL", help="http://localhost:8000/v1")
    bench.add_argument("--model", required=True, metavar="NAME", help="the model's name there")
    bench.add_argument(
        "--concurrency",
        metavar="K,K,...",
        help="closed loops of so many clients (default: 1,2,4,8, if no rate is given)",
    )
    bench.add_argument("--rate", metavar="R,R,...", help="open loops of so many a second")
    bench.add_argument("--requests", type=int, default=320, help="of each load (default: 320)")
    bench.add_argument(
        "--seconds", type=float, default=300.0, help="most for a load (default: 300)"
    )
    bench.add_argument("--prompt-words", type=int, default=96, help="of a prompt (default: 96)")
    bench.add_argument("--tokens", type=int, default=64, help="to generate (default: 64)")
    bench.add_argument("--timeout", type=float, default=60.0, help="seconds without any data")
    bench.add_argument("--max-failures", type=int, default=0, help="of a load (default: 0)")
    bench.add_argument("--seed", type=int, default=0, help="of the arrivals of an open loop")
    bench.add_argument("--api-key-env", metavar="VARIABLE", help="variable that holds the key")
    bench.add_argument(
        "--no-force",
        action="store_true",
        help="send no min_tokens, ignore_eos and continuous_usage_stats, which some servers refuse",
    )
    bench.add_argument("--json", type=Path, metavar="OUT", help="write all measures")
    bench.set_defaults(run=_serve_bench)
    return parser


def _merge(options: argparse.Namespace) -> int:
    results = merge_results(Results.read(path) for path in options.files)
    if options.json:
        _guarded(options.json, lambda: results.write(options.json))
    for path, render in (
        (options.html, render_page),
        (options.markdown, render_markdown),
        (options.csv, render_csv),
    ):
        if path:
            _write(path, render(results))
    _print_table(results, None)
    return FAILED if options.fail_on_failure and run_failed(results) else OK


def _show(options: argparse.Namespace) -> int:
    _print_table(Results.read(options.file), options.width)
    return OK


def _methods(options: argparse.Namespace) -> int:
    _emit(describe_methods())
    return OK


def _export(options: argparse.Namespace) -> int:
    text = FORMATS[options.format](Results.read(options.file))
    if options.output:
        _write(options.output, text)
    else:
        _emit(text)
    return OK


def _quantize(options: argparse.Namespace) -> int:
    from pytest_qlab.lab import Lab

    lab = Lab(
        options.model,
        calibration=options.calibration,
        revision=options.revision,
        store=options.store,
        stream=options.stream,
        trust_remote_code=options.trust_remote_code,
        progress=lambda line: print(f"qlab: {line}", file=sys.stderr),
    )
    candidate = lab.candidate(options.spec)
    for note in candidate.save_gguf(options.output):
        print(f"qlab: note: {note}", file=sys.stderr)
    written, size = options.output.stat().st_size, candidate.checkpoint.size
    _emit(
        f"{options.output}: {candidate.id}, {written:,} bytes, "
        f"{8 * written / size.parameters:.3f} bits per weight, "
        f"{size.base_bytes / written:.2f} times smaller than the base model\n"
    )
    return OK


def _serve_bench(options: argparse.Namespace) -> int:
    from pytest_qlab.engines.openai_endpoint import Endpoint
    from pytest_qlab.metrics.load import check_lengths, drive, unique_prompts
    from pytest_qlab.metrics.serving import Limits, loads_named

    loads = loads_named(options.concurrency, options.rate)
    limits = Limits(
        requests=options.requests, seconds=options.seconds, failures=options.max_failures
    )
    this_run = secrets.token_hex(8)
    endpoint = Endpoint(
        options.endpoint,
        options.model,
        timeout=options.timeout,
        force=not options.no_force,
        key=_key(options.api_key_env),
    )
    runs: list[ServingRun] = []
    try:
        for place, load in enumerate(loads):
            print(f"qlab: {load}", file=sys.stderr)
            enough = options.requests + SPARE_PROMPTS
            prompts = unique_prompts(options.prompt_words, enough, run=f"{this_run}/{place}")
            run = drive(endpoint, load, prompts, options.tokens, limits, seed=options.seed)
            check_lengths(run, prompts, endpoint.count)
            runs.append(run)
    finally:  # What was measured before a load failed is not lost.
        if runs:
            _emit(render_runs(runs, options.model))
    if options.json:
        found = document(runs, options.endpoint, options.model)
        _write(options.json, json.dumps(found, indent=1) + "\n")
    good = all(kept_length(run) and not run.saturated for run in runs)
    return OK if good else FAILED


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise DataError(
            f"--api-key-env names {variable}, which is not set. Set it to the server's key, or "
            "leave the option out for a server that wants none."
        )
    return os.environ[variable]


def _print_table(results: Results, width: int | None) -> None:
    columns = width or shutil.get_terminal_size((100, 24)).columns
    _emit("\n".join(render_terminal(results, columns)) + "\n")


def _emit(text: str) -> None:
    """Print, whatever the encoding of standard output can show."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _write(path: Path, text: str) -> None:
    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")

    _guarded(path, write)


def _guarded(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}. Give a path in a folder that "
            "exists and can be written to."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
