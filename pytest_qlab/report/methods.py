"""What methods there are and what can be set on them, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pytest_qlab.errors import QlabError
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.preprocessing import Preprocessing
from pytest_qlab.methods.registry import (
    find_method,
    find_preprocessing,
    method_names,
    preprocessing_names,
)
from pytest_qlab.specs import DEFAULT_SPECS

WIDTH = 88


def describe_methods(configurations: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """All methods and preprocessings with summary, needs and options, then named configurations.

    Imports no torch. A method of somebody else's that cannot be imported is listed with the reason.

    Args:
        configurations: the tables `[tool.qlab.methods]` of pyproject.toml.
    """
    blocks = []
    finders: list[tuple[Callable[[str], type[Method] | type[Preprocessing]], str]]
    finders = [(find_method, name) for name in method_names()]
    finders += [(find_preprocessing, name) for name in preprocessing_names()]
    for find, name in finders:
        try:
            blocks.append(_describe(find(name)))
        except QlabError as error:
            blocks.append(f"{name}\n{_indented(f'not available: {error}')}")
    for name, table in (configurations or {}).items():
        options = ", ".join(f"{key}={_plain(value)}" for key, value in table.items())
        told = f"configuration in [tool.qlab.methods.{name}]: {options}"
        blocks.append(f"{name}\n{_indented(told)}")
    usage = (
        "Choose with --qlab-methods=NAME[:option=value]...,NAME...; globs, 'all' and '!NAME' work. "
        "A preprocessing stands in front of one method: PREPROCESSING[:option=value]...+NAME. "
        "Example: --qlab-methods=gptq:bits=3:group_size=64,awq,quarot+rtn"
    )
    default = f"Default: {','.join(DEFAULT_SPECS)}"
    ends = [textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in (usage, default)]
    return "\n\n".join([*blocks, *ends]) + "\n"


def _describe(method: type[Method] | type[Preprocessing]) -> str:
    title = f"{method.name}+METHOD" if issubclass(method, Preprocessing) else method.name
    lines = [title, _indented(getattr(method, "summary", "") or "(no summary)")]
    if method.reference:
        lines.append(_indented(f"reference: {method.reference}"))
    needs = ", ".join(sorted(method.needs)) or "nothing"
    lines.append(_indented(f"needs from calibration: {needs}"))
    rows = []
    for key, field in method.model_fields.items():
        default = (
            "(required)"
            if field.is_required()
            else _plain(field.get_default(call_default_factory=True))
        )
        meaning = field.description or ""
        if key == method.positional:
            meaning = f"may be given without its name; {meaning}".rstrip("; ")
        rows.append((key, _type(field.annotation), default, meaning))
    if rows:
        widths = [max(len(row[place]) for row in rows) for place in range(3)]
        for key, kind, default, meaning in rows:
            head = f"    {key:<{widths[0]}}  {kind:<{widths[1]}}  default {default:<{widths[2]}}"
            lines.append(f"{head}  {' '.join(meaning.split())}".rstrip())
    return "\n".join(lines)


def _indented(text: str) -> str:
    text = " ".join(text.split())
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _plain(value: Any) -> str:
    """A default as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:
    """The values that an option takes."""
    if get_origin(annotation) is Literal:
        return "|".join(_plain(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_type(part) for part in get_args(annotation))
    if annotation is type(None):
        return "none"
    if annotation is bool:
        return "true|false"
    return getattr(annotation, "__name__", str(annotation))
