"""The settings of a run: what the command line, configuration files and defaults add up to.

The command line wins over pytest's configuration file, that over the table `[tool.qlab]`, and that
over the default.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pytest_qlab.errors import QlabError, did_you_mean
from pytest_qlab.gate.budgets import ConfiguredBudget, parse_budgets
from pytest_qlab.gate.thresholds import Threshold, parse_thresholds
from pytest_qlab.machine import default_store
from pytest_qlab.options import BY_KEY, LAST, NO_BASELINE, OPTIONS, Option, on_command_line

_CANDIDATE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Settings:
    """What one run is about. Paths are absolute; sizes are in tokens, windows and sequences.

    `compare` is the name of a baseline, empty for the last one, and None to compare with none.
    """

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
    stream: str
    json: Path | None
    html: Path | None
    markdown: Path | None
    simulated_latency: str
    require_all: bool
    sampling: str
    inconclusive: str
    confidence: float
    baselines: Path
    save: str | None = None
    compare: str | None = None
    compare_fail: tuple[Threshold, ...] = ()
    budgets: tuple[ConfiguredBudget, ...] = ()


def explicitly_set(config: pytest.Config, key: str | None = None) -> bool:
    """Whether the option, or any, was given on the command line or in a file."""
    if on_command_line(config, key):
        return True
    table = read_table(config.rootpath)
    if key is None and table:  # Methods and budgets have tables, and no option.
        return True
    options = [option for option in OPTIONS if option.in_files and key in (None, option.key)]
    return any(config.getini(option.ini) is not None or option.key in table for option in options)


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
    known = [option.key for option in OPTIONS if option.in_files and option.key != "methods"]
    known += ["select", "methods", "budgets"]
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
    if "budgets" in table:
        try:
            table["budgets"] = parse_budgets(table["budgets"])
        except QlabError as error:
            raise pytest.UsageError(f"{path}: {error}") from error
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
    values["store"] = values["store"] or default_store()
    values.update(_baselines(config, values))
    configurations = dict(table.get("configurations", {}))
    finished = _finished(values.pop("candidate"), configurations)
    if finished:
        values["methods"] = (*values["methods"], *finished)
    return Settings(
        configurations={**configurations, **finished}, budgets=table.get("budgets", ()), **values
    )


def _baselines(config: pytest.Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared with which baseline and saved as which; see `Settings`.

    Thresholds without a baseline are for the last one. A run that saves a baseline, as after a
    change that is meant to be, is not held to what files say.
    """
    save, compare, texts = values["save"], values["compare"], values["compare_fail"]
    held = on_command_line(config, "compare_fail")
    asked = held or on_command_line(config, "compare")
    if compare == NO_BASELINE and held:
        raise pytest.UsageError(
            f"--qlab-compare={NO_BASELINE} and --qlab-compare-fail contradict each other: "
            "thresholds are for the comparison with a baseline. Leave one of them out."
        )
    if (save is not None and not asked) or compare == NO_BASELINE:
        compare, texts = None, ()
    elif compare == LAST or (compare is None and texts):
        compare = ""
    try:
        thresholds = parse_thresholds(texts)
        if save is not None:
            save = _baseline_name(save, "save")
        if compare:
            compare = _baseline_name(compare, "compare")
    except QlabError as error:
        raise pytest.UsageError(str(error)) from error
    return {
        "baselines": config.rootpath / values["baselines"],
        "save": save,
        "compare": compare,
        "compare_fail": tuple(thresholds.values()),
    }


def _baseline_name(name: str, key: str) -> str:
    from pytest_qlab.gate.baselines import check_name

    return check_name(name, BY_KEY[key].flag)


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
    from pytest_qlab.methods.registry import method_names, preprocessing_names

    return [*method_names(), *preprocessing_names()]


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _value(config: pytest.Config, option: Option, table: Mapping[str, Any]) -> Any:
    given = config.getoption(option.flag)
    if given is not None:
        return _convert(option, given, option.flag, config.invocation_params.dir)
    given = config.getini(option.ini) if option.in_files else None
    if given is not None:
        base = config.inipath.parent if config.inipath else config.rootpath
        return _convert(option, given, option.ini, base)
    if option.in_files and option.key in table:
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
    if option.kind == "number":
        return _share(given, where)
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


def _share(given: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.5 <= number < 1:
        raise pytest.UsageError(
            f"{where}: expected a number from 0.5 to below 1, such as 0.95, got {given!r}."
        )
    return number
