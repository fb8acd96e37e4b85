"""Options of the command line and of configuration files, and the settings they add up to.

Every option `--qlab-NAME` has a twin `qlab_name` in pytest's configuration file and a key in the
table `[tool.qlab]` of pyproject.toml. The command line wins over the configuration file, that over
the table, and that over the default.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_qlab.errors import did_you_mean

Kind = Literal["text", "list", "int", "flag", "path", "choice"]


@dataclass(frozen=True)
class Option:
    """One option: its name without prefix, in the command line's spelling."""

    name: str
    kind: Kind
    default: Any
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    minimum: int = 0
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
    Option("require-all", "flag", False, "Fail the run if any test of a quantized model skipped."),
)
_CANDIDATE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
BY_KEY = {option.key: option for option in OPTIONS}


@dataclass(frozen=True)
class Settings:
    """What one run is about. Paths are absolute; sizes are in tokens, windows and sequences."""

    model: str
    dtype: str
    device: str
    revision: str | None
    trust_remote_code: bool
    evaluation: tuple[str, ...]
    calibration: tuple[str, ...]
    text_key: str
    convention: str
    window_length: int
    max_windows: int
    calibration_length: int
    calibration_sequences: int
    seed: int
    methods: tuple[str, ...]
    configurations: dict[str, dict[str, Any]] = field(hash=False)
    store: Path
    threads: int
    json: Path | None
    html: Path | None
    markdown: Path | None
    simulated_latency: str
    require_all: bool


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
        elif option.name in ("methods", "candidate"):
            group.addoption(
                option.flag, action="append", default=None, metavar=option.metavar, help=text
            )
        else:
            group.addoption(option.flag, default=None, metavar=option.metavar, help=text)
        ini_type: Any = {"list": "args", "flag": "bool"}.get(option.kind, "string")
        parser.addini(option.ini, f"{option.flag} in a file", type=ini_type, default=None)
    group.addoption(
        "--qlab-list-methods",
        action="store_true",
        default=False,
        help="Show every quantization method with its options and defaults, and exit.",
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
            known = [option.flag for option in OPTIONS] + ["--qlab-list-methods"]
            raise pytest.UsageError(f"unknown option {given}.{did_you_mean(given, known)}")


def on_command_line(config: pytest.Config, key: str | None = None) -> bool:
    """Whether the option, or any option of qlab, was given on the command line."""
    options = OPTIONS if key is None else (BY_KEY[key],)
    return any(config.getoption(option.flag) is not None for option in options)


def explicitly_set(config: pytest.Config, key: str | None = None) -> bool:
    """Whether the option, or any, was given on the command line or in a file."""
    if on_command_line(config, key):
        return True
    keys = [option.key for option in OPTIONS] if key is None else [key]
    table = read_table(config.rootpath)
    return any(config.getini(BY_KEY[name].ini) is not None or name in table for name in keys)


def read_table(root: Path) -> dict[str, Any]:
    """The table `[tool.qlab]` of the pyproject.toml at pytest's root, checked for unknown keys.

    `select` stands for the option `methods` there, because `[tool.qlab.methods.NAME]` are named
    configurations; they are returned under `configurations`.

    Raises:
        pytest.UsageError: the file cannot be read, or has a key or value that means nothing here.
    """
    path = root / "pyproject.toml"
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("qlab", {})
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise pytest.UsageError(f"{path}: [tool.qlab] must be a table, not {table!r}.")
    table = dict(table)
    configurations = table.pop("methods", {})
    if not isinstance(configurations, dict) or not all(
        isinstance(value, dict) for value in configurations.values()
    ):
        raise pytest.UsageError(
            f"{path}: [tool.qlab.methods.NAME] are tables of named configurations, not "
            f'{configurations!r}. To choose methods, write select = ["gptq", "awq"] in [tool.qlab].'
        )
    known = [key for key in BY_KEY if key != "methods"] + ["select", "methods"]
    for key in table:
        if key not in known:
            raise pytest.UsageError(
                f"{path}: unknown key {key!r} in [tool.qlab].{did_you_mean(key, known)}"
            )
    if "select" in table:
        table["methods"] = table.pop("select")
    if configurations:
        table["configurations"] = {
            name: {
                key: str(root / value) if key == "path" and isinstance(value, str) else value
                for key, value in options.items()
            }
            for name, options in configurations.items()
        }
    return table


def read_settings(config: pytest.Config, *, workers: int = 1) -> Settings:
    """Add up command line, configuration file, table and defaults.

    Args:
        config: pytest's configuration.
        workers: processes that share this machine's cores; decides the default of `threads`.

    Raises:
        pytest.UsageError: a value that the option does not take.
    """
    table = read_table(config.rootpath)
    values = {option.key: _value(config, option, table) for option in OPTIONS}
    values["evaluation"] = values.pop("eval")
    values["threads"] = values["threads"] or max(1, available_cores() // max(1, workers))
    values["store"] = values["store"] or _default_store()
    configurations = dict(table.get("configurations", {}))
    finished = _finished(values.pop("candidate"), configurations)
    if finished:
        values["methods"] = (*values["methods"], *finished)
    return Settings(configurations={**configurations, **finished}, **values)


def _finished(given: tuple[str, ...], taken: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Configurations that stand for `--qlab-candidate=NAME=FILE`, by name."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or not _CANDIDATE_NAME.fullmatch(name):
            raise pytest.UsageError(
                f"--qlab-candidate: expected NAME=path/to/model.gguf with a NAME of letters, "
                f"digits, '_', '-' and '.', got {text!r}."
            )
        if not Path(path).is_file():
            raise pytest.UsageError(f"--qlab-candidate={name}: there is no file {path}.")
        if name in taken or name in found or name in _method_names():
            raise pytest.UsageError(
                f"--qlab-candidate={name}: that name is taken by a method, a configuration or "
                "another candidate. Choose another."
            )
        found[name] = {"method": "gguf_file", "path": path}
    return found


def _method_names() -> list[str]:
    from pytest_qlab.methods.registry import method_names

    return method_names()


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _default_store() -> Path:
    from pytest_qlab.store import default_store

    return default_store()


def _value(config: pytest.Config, option: Option, table: Mapping[str, Any]) -> Any:
    given = config.getoption(option.flag)
    if given is not None:
        return _convert(option, given, option.flag, config.invocation_params.dir)
    given = config.getini(option.ini)
    if given is not None:
        base = config.inipath.parent if config.inipath else config.rootpath
        return _convert(option, given, option.ini, base)
    if option.key in table:
        where = f"[tool.qlab] {'select' if option.key == 'methods' else option.key}"
        return _convert(option, table[option.key], where, config.rootpath)
    return option.default


def _convert(option: Option, given: Any, where: str, base: Path) -> Any:
    """Check one value and give it the option's type; `where` names its origin in messages."""
    if option.kind == "flag":
        if not isinstance(given, bool):
            raise pytest.UsageError(f"{where}: expected true or false, got {given!r}.")
        return given
    if option.kind == "list":
        items = [given] if isinstance(given, str) else given
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise pytest.UsageError(f"{where}: expected names in a list, got {given!r}.")
        names = tuple(piece.strip() for item in items for piece in item.split(",") if piece.strip())
        if option.name in ("eval", "calibration"):
            names = tuple(_located(name, base) for name in names)
        if option.name == "candidate":
            names = tuple(_located_file(name, base) for name in names)
        if not names:
            raise pytest.UsageError(f"{where}: the list is empty. Name at least one.")
        return names
    if option.kind == "int":
        return _integer(option, given, where)
    if not isinstance(given, str) or not given:
        raise pytest.UsageError(f"{where}: expected text, got {given!r}.")
    if option.kind == "choice" and given not in option.choices:
        raise pytest.UsageError(
            f"{where}: {given!r} is not one of them.{did_you_mean(given, option.choices)}"
        )
    if option.kind == "path":
        return base / Path(given).expanduser()
    return _located(given, base) if option.name == "model" else given


def _located(given: str, base: Path) -> str:
    """Make a relative path absolute, so that tests may change directory; leave names alone."""
    path = Path(given).expanduser()
    looks_like_path = len(path.parts) > 1 or path.suffix or given in (".", "..")
    return str(base / path) if looks_like_path and (base / path).exists() else given


def _located_file(given: str, base: Path) -> str:
    """NAME=FILE with the path made absolute."""
    name, equals, path = given.partition("=")
    return f"{name}{equals}{base / Path(path).expanduser()}" if path else given


def _integer(option: Option, given: Any, where: str) -> int:
    try:
        number = int(given)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(given, bool | float):
        raise pytest.UsageError(f"{where}: expected a whole number, got {given!r}.")
    if number < option.minimum:
        raise pytest.UsageError(f"{where}: expected at least {option.minimum}, got {number}.")
    return number
