"""Method specifications: `gptq:bits=3:group_size=64,awq,!none`, globs, `all`, named configurations.

The grammar of one specification is NAME[:value][:key=value]...; a bare `key` means `key=true`. The
bare value is that of the method's positional option, if it has one: `gguf:Q4_K_M`. NAME is a
registered method, a glob over their names, `all`, or a configuration named in pyproject.toml. In
front of one method, preprocessings may stand with options of their own: `quarot:seed=1+gptq`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from pydantic import ValidationError

from pytest_qlab.errors import SpecError, did_you_mean
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.composed import Composed
from pytest_qlab.methods.configured import Configured
from pytest_qlab.methods.registry import (
    find_method,
    find_preprocessing,
    method_names,
    preprocessing_names,
)

DEFAULT_SPECS = (
    "none",
    "dynamic:bits=8",
    "dynamic:bits=4",
    "static:bits=8",
    "static:bits=4",
    "smoothquant",
    "rtn",
    "hqq",
    "nf4",
    "nvfp4",
    "awq",
    "gptq",
    "quarot+gptq",
    "squeezellm",
    "quip",
    "spqr",
)
C = TypeVar("C", bound=Configured)
# A plus between two names; one inside a value, such as 1e+3, is not followed by a name.
_PLUS = re.compile(r"\+(?=[A-Za-z_*?\[][\w.*?\[\]-]*(?::|\+|$))")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, and the label of a named configuration if it came from one."""

    method: Method
    label: str | None = None

    @property
    def id(self) -> str:
        """Unique and readable: the test's parameter id and the table's row name."""
        return self.label or self.method.id

    def matches(self, pattern: str) -> bool:
        """Whether a name, an id or a glob over either names this specification."""
        return any(fnmatchcase(name, pattern) for name in (self.id, self.method.name))


def parse_specs(
    texts: Iterable[str], configurations: Mapping[str, Mapping[str, Any]] | None = None
) -> list[MethodSpec]:
    """Parse comma-separated specifications, in order, without repetitions.

    Args:
        texts: each may hold several specifications, separated by commas.
        configurations: the tables `[tool.qlab.methods.NAME]`.

    Raises:
        SpecError: an unknown name or option, a wrong value, two methods with one id, or nothing is
            left to run.
    """
    named = configurations or {}
    pieces = [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]
    chosen: dict[str, MethodSpec] = {}
    excluded = [piece[1:].strip() for piece in pieces if piece.startswith("!")]
    included = [piece for piece in pieces if not piece.startswith("!")]
    if excluded and not included:
        included = list(DEFAULT_SPECS)
    for piece in included:
        for spec in _expand(piece, named):
            if chosen.setdefault(spec.id, spec).method != spec.method:
                raise SpecError(
                    f"Two different methods would both be called {spec.id!r}, and one of them "
                    f"would be lost. Rename the configuration [tool.qlab.methods.{spec.id}]."
                )
    for pattern in excluded:
        hit = [name for name, spec in chosen.items() if spec.matches(pattern)]
        if not hit:
            raise SpecError(
                f"'!{pattern}' leaves out nothing: no chosen method has that name."
                f"{did_you_mean(pattern, {*chosen, *(s.method.name for s in chosen.values())})}"
            )
        for name in hit:
            del chosen[name]
    if not chosen:
        given = ", ".join(pieces) or "(empty)"
        raise SpecError(
            f"No method is left to run: {given!r} selects none. Name at least one, "
            "for example --qlab-methods=gptq,awq."
        )
    return list(chosen.values())


def known_name(name: str, known: Iterable[str]) -> bool:
    """Whether a name, the beginning of an id or `PREPROCESSING+METHOD` is made of known names."""
    names = {*known, *preprocessing_names()}
    return all(part.split("-")[0] in names for part in name.split("+"))


def _expand(piece: str, named: Mapping[str, Mapping[str, Any]]) -> list[MethodSpec]:
    *first, last = _parts(piece, named)
    if not first:
        return _expand_one(last, named)
    name = last.partition(":")[0]
    if name == "all" or _GLOB.search(name):
        raise SpecError(
            f"{piece!r}: {name!r} cannot follow a '+'. Name one method there, or several "
            f"compositions: {first[0]}+rtn,{first[0]}+gptq."
        )
    (spec,) = _expand_one(last, named)
    return [MethodSpec(_composed(piece, first, spec.method, named))]


def _parts(piece: str, named: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The parts between plus signs, but for those in values, such as that of a path."""
    if piece.partition(":")[0] in named:
        return [piece]
    parts = _PLUS.split(piece)
    names = [part.partition(":")[0] for part in parts]
    known = {*method_names(), *preprocessing_names(), *named, "all"}
    if len(parts) > 1 and "=" in parts[0] and names[0] not in preprocessing_names():
        return parts if names[1] in known or _GLOB.search(names[1]) else [piece]
    return parts


def _composed(
    piece: str, first: Sequence[str], method: Method, named: Mapping[str, Mapping[str, Any]]
) -> Composed:
    """The method with preprocessings in front of it, each given as NAME[:key=value]..."""
    found = []
    for part in first:
        name, *options = part.split(":")
        if not name or name == "all" or _GLOB.search(name):
            raise SpecError(
                f"{piece!r}: {name!r} cannot stand in front of a '+'. Name one preprocessing: "
                f"{', '.join(preprocessing_names())}."
            )
        if name in method_names() or name in named:
            raise SpecError(
                f"{piece!r}: {name!r} is a method, and a method comes last. In front of a '+' "
                f"stands a preprocessing: {', '.join(preprocessing_names())}."
            )
        kind = find_preprocessing(name)
        given = dict(_option(part, option) for option in options)
        found.append(_configured("preprocessing", kind, _with_positional(kind, given)))
    if isinstance(method, Composed):  # A configuration that is one already.
        found, method = [*found, *method.preprocessings], method.method
    return Composed(preprocessings=tuple(found), method=method)


def _expand_one(piece: str, named: Mapping[str, Mapping[str, Any]]) -> list[MethodSpec]:
    name, *options = piece.split(":")
    given = dict(_option(piece, option) for option in options)
    if name == "all":
        return [_build(known, given, None) for known in method_names() if find_method(known).in_all]
    if _GLOB.search(name) and "+" not in name:
        hits = [known for known in [*method_names(), *named] if fnmatchcase(known, name)]
        if not hits:
            raise SpecError(
                f"{name!r} matches no method.{did_you_mean(name, [*method_names(), *named])}"
            )
        return [spec for hit in hits for spec in _expand_one(":".join([hit, *options]), named)]
    if name in named:
        table = dict(named[name])
        base = table.pop("method", None)
        if not isinstance(base, str):
            raise SpecError(
                f"The configuration [tool.qlab.methods.{name}] does not say which method it "
                'configures: add a line like method = "gptq".'
            )
        label = name if not given else None
        *first, last = _PLUS.split(base)
        if ":" in last:
            raise SpecError(
                f"The configuration [tool.qlab.methods.{name}] says method = {base!r}. Give the "
                f"options of {last.partition(':')[0]} lines of their own, such as bits = 3."
            )
        try:
            spec = _build(last, given, label, table)
            if first:
                spec = MethodSpec(_composed(base, first, spec.method, {}), label)
        except SpecError as error:
            raise SpecError(f"In the configuration [tool.qlab.methods.{name}]: {error}") from error
        return [spec]
    _check_is_method(name, named)
    return [_build(name, given, None)]


def _check_is_method(name: str, named: Mapping[str, Mapping[str, Any]]) -> None:
    if name in preprocessing_names():
        raise SpecError(
            f"{name!r} is a preprocessing: it changes a model and quantizes nothing. Say which "
            f"method follows it: {name}+rtn, {name}+gptq."
        )
    if "+" in name:
        raise SpecError(
            f"{name!r} is not understood. Expected PREPROCESSING+METHOD, for example quarot+gptq "
            "or smooth:alpha=0.8+rtn."
        )
    if name not in method_names():
        known = [*method_names(), *named]
        raise SpecError(f"Unknown method {name!r}.{did_you_mean(name, known)}")


def _option(piece: str, option: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    if not key.strip():
        raise SpecError(
            f"{piece!r} has an empty option. Expected NAME:key=value, "
            "for example gptq:bits=3:group_size=64."
        )
    return key.strip(), value.strip() if equals else True


def _build(
    name: str,
    given: Mapping[str, Any],
    label: str | None,
    table: Mapping[str, Any] | None = None,
) -> MethodSpec:
    """A method with the options of a configuration's table, and over them those that are given."""
    if name in preprocessing_names():
        _check_is_method(name, {})
    method = find_method(name)
    options = {**(table or {}), **_with_positional(method, given)}
    return MethodSpec(_configured("method", method, options), label)


def _configured(noun: str, kind: type[C], options: Mapping[str, Any]) -> C:
    """A method or preprocessing of these options, which may be text from the command line."""
    fields = kind.model_fields
    for key in options:
        if key not in fields:
            raise SpecError(
                f"The {noun} {kind.name!r} has no option {key!r}.{did_you_mean(key, fields)}"
            )
    try:
        return kind(**{key: _literal(value) for key, value in options.items()})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'options'}: "
            f"{problem['msg'].removeprefix('Value error, ')} (given {problem['input']!r})"
            for problem in error.errors()
        )
        raise SpecError(f"The {noun} {kind.name!r} cannot be configured so: {problems}.") from error


def _with_positional(method: type[Configured], options: Mapping[str, Any]) -> dict[str, Any]:
    """Give a first bare word that is no option's name to the positional option."""
    named = dict(options)
    first = next(iter(named), None)
    if method.positional is None or first is None or first in method.model_fields:
        return named
    if named[first] is True and method.positional not in named:
        del named[first]
        named[method.positional] = first
    return named


def _literal(value: Any) -> Any:
    """Turn the command line's text into a number or truth value where it reads as one.

    Pydantic does this for plain types, but a `Literal[2, 3, 4]` wants the number itself.
    """
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "yes", "on"):
        return True
    if value.lower() in ("false", "no", "off"):
        return False
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value
