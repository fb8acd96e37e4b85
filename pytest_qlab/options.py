"""Which options there are on the command line and in configuration files.

Every option `--qlab-NAME` has a twin `qlab_name` in pytest's configuration file and a key in the
table `[tool.qlab]` of pyproject.toml; `settings.py` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from pytest_qlab.errors import did_you_mean

LAST, NO_BASELINE = "@last", "@none"
"""In place of a baseline's name, which cannot begin like that."""
_REPEATABLE = ("methods", "candidate", "compare-fail")
Kind = Literal["text", "list", "int", "number", "flag", "path", "choice"]


@dataclass(frozen=True)
class Option:
    """One option: its name without prefix, in the command line's spelling.

    `bare` is what it means on the command line without a value; None where it needs one.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    minimum: int = 0
    bare: str | None = None
    in_files: bool = True

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return f"--qlab-{self.name}"

    @property
    def key(self) -> str:
        """Its spelling in the table `[tool.qlab]`."""
        return self.name.replace("-", "_")

    @property
    def ini(self) -> str:
        """Its spelling in pytest's configuration file."""
        return f"qlab_{self.key}"


OPTIONS = (
    Option(
        "methods",
        "list",
        (),
        "Quantization methods to compare: NAME[:key=value]... separated by commas; globs, 'all' "
        "and '!NAME' work. Repeatable. Default: none, dynamic and static at 8 and 4 bits, rtn, "
        "gptq, awq. See --qlab-list-methods.",
        metavar="SPEC[,...]",
    ),
    Option(
        "candidate",
        "list",
        (),
        "Quantized models that exist already: NAME=path/to/model.gguf. They are compared beside "
        "--qlab-methods, or alone if that is not given. Repeatable.",
        metavar="NAME=FILE[,...]",
    ),
    Option("model", "text", "embedded", "Base model: 'embedded', a directory, or a hub id."),
    Option(
        "dtype",
        "choice",
        "float32",
        "Numbers the model computes in.",
        choices=(
            "float32",
            "bfloat16",
            "float16",
        ),
    ),
    Option("device", "text", "cpu", "Device that models run on, such as cpu or cuda:0."),
    Option("revision", "text", None, "Revision of a hub model."),
    Option("trust-remote-code", "flag", False, "Run code that a hub model brings along."),
    Option("eval", "list", ("embedded",), "Evaluation text: names or paths.", "NAME_OR_PATH[,...]"),
    Option(
        "calibration",
        "list",
        ("embedded",),
        "Calibration text: names or paths.",
        "NAME_OR_PATH[,...]",
    ),
    Option("text-key", "text", "text", "Key of the text in JSON and parquet files."),
    Option(
        "convention",
        "choice",
        "spread",
        "How evaluation text is cut into windows.",
        choices=("spread", "gptq2048", "llamacpp512"),
    ),
    Option("window-length", "int", 512, "Tokens in an evaluation window.", "N", minimum=2),
    Option("max-windows", "int", 64, "Evaluation windows at most; 0 takes all.", "N"),
    Option(
        "sampling",
        "choice",
        "spread",
        "Which windows are taken where there are more than that: spread over the text, or the "
        "first ones, for which no interval holds.",
        choices=("spread", "contiguous"),
    ),
    Option("calibration-length", "int", 512, "Tokens in a calibration sequence.", "N", minimum=2),
    Option("calibration-sequences", "int", 128, "Calibration sequences at most.", "N", minimum=1),
    Option("seed", "int", 0, "Seed of every random choice.", "N"),
    Option(
        "store",
        "path",
        None,
        "Directory of artefacts that are kept between runs. Default: $QLAB_STORE, or the user's "
        "cache directory.",
        "DIR",
    ),
    Option(
        "threads",
        "int",
        0,
        "Windows that one process runs at the same time. Default: cores divided by workers.",
        "N",
    ),
    Option(
        "stream",
        "choice",
        "auto",
        "Whether quantizing and measuring damage read the model block by block from its "
        "safetensors files, so that it need not fit in memory; auto: if two copies of it would "
        "not. The bits are the same. Measures that need the whole model are an error then.",
        choices=("auto", "always", "never"),
    ),
    Option("json", "path", None, "Write the results as JSON.", "FILE"),
    Option("html", "path", None, "Write the results as a stand-alone page.", "FILE"),
    Option("markdown", "path", None, "Write the results as Markdown.", "FILE"),
    Option(
        "simulated-latency",
        "choice",
        "flag",
        "What to do about latency where no kernel runs the packed bits: measure and flag it, skip "
        "the test, or fail it.",
        choices=("flag", "skip", "fail"),
    ),
    Option(
        "inconclusive",
        "choice",
        "fail",
        "What a careful assertion (within, at_least) does that all windows leave undecided.",
        choices=("fail", "warn", "xfail"),
    ),
    Option(
        "confidence",
        "number",
        0.95,
        "Confidence of careful assertions: a candidate exactly at the budget passes with 1 minus "
        "that probability.",
        "SHARE",
    ),
    Option(
        "save",
        "text",
        None,
        "Save what is measured as a baseline of that name, if the run is green.",
        "NAME",
        in_files=False,
    ),
    Option(
        "compare",
        "text",
        None,
        f"Compare with the saved baseline of that name, window by window; {LAST} or no name: with "
        f"the last by name; {NO_BASELINE}: with none.",
        "NAME",
        bare=LAST,
    ),
    Option(
        "compare-fail",
        "list",
        (),
        "How much worse than the saved baseline measures may be, in their unit or in per cent of "
        "the saved value: kl.mean:0.002,latency.p50:10%. Repeatable.",
        "MEASURE:AMOUNT[,...]",
    ),
    Option("baselines", "path", "qlab-baselines", "Directory of saved baselines.", "DIR"),
    Option("require-all", "flag", False, "Fail the run if any test of a quantized model skipped."),
)
ACTIONS = ("--qlab-list-methods", "--qlab-plan")
"""Flags that show something and end; they have no twins in files."""
BY_KEY = {option.key: option for option in OPTIONS}


def add_options(parser: pytest.Parser) -> None:
    """Register every option with its twin for configuration files."""
    group = parser.getgroup("qlab", "quantization quality gates")
    for option in OPTIONS:
        text = option.help
        if option.default not in (None, (), False, 0):
            shown = option.default
            text += f" Default: {','.join(shown) if isinstance(shown, tuple) else shown}."
        if option.choices:
            text += f" One of: {', '.join(option.choices)}."
        if option.kind == "flag":
            group.addoption(option.flag, action="store_true", default=None, help=text)
        elif option.name in _REPEATABLE:
            group.addoption(
                option.flag, action="append", default=None, metavar=option.metavar, help=text
            )
        else:
            bare = {} if option.bare is None else {"nargs": "?", "const": option.bare}
            group.addoption(option.flag, default=None, metavar=option.metavar, help=text, **bare)
        if not option.in_files:
            continue
        ini_type: Any = {"list": "args", "flag": "bool"}.get(option.kind, "string")
        parser.addini(option.ini, f"{option.flag} in a file", type=ini_type, default=None)
    group.addoption(
        "--qlab-list-methods",
        action="store_true",
        default=False,
        help="Show every quantization method with its options and defaults, and exit.",
    )
    group.addoption(
        "--qlab-plan",
        action="store_true",
        default=False,
        help="Show how many evaluation windows each budget of [tool.qlab.budgets] needs, and exit.",
    )


def check_flags(parser: pytest.Parser, arguments: list[str]) -> None:
    """Refuse an unknown `--qlab-` flag with the nearest known one.

    Raises:
        pytest.UsageError: no plugin knows such a flag.
    """
    if not any(argument.startswith("--qlab-") for argument in arguments):
        return
    _, unknown = parser.parse_known_and_unknown_args(arguments)
    for argument in unknown:
        if argument.startswith("--qlab-"):
            given = argument.partition("=")[0]
            known = [option.flag for option in OPTIONS] + list(ACTIONS)
            raise pytest.UsageError(f"unknown option {given}.{did_you_mean(given, known)}")


def on_command_line(config: pytest.Config, key: str | None = None) -> bool:
    """Whether the option, or any option of qlab, was given on the command line."""
    options = OPTIONS if key is None else (BY_KEY[key],)
    return any(config.getoption(option.flag) is not None for option in options)
