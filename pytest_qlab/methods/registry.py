"""Which methods and preprocessings there are: built in, as entry points, registered at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from pytest_qlab.errors import SpecError, did_you_mean
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.configured import Configured
from pytest_qlab.methods.preprocessing import Preprocessing

ENTRY_POINT_GROUP = "pytest_qlab.methods"
PREPROCESSING_GROUP = "pytest_qlab.preprocessings"

_BUILTIN = {
    "none": "pytest_qlab.methods.identity:Identity",
    "rtn": "pytest_qlab.methods.rtn:Rtn",
    "hqq": "pytest_qlab.methods.hqq:Hqq",
    "nf4": "pytest_qlab.methods.blockwise:Nf4",
    "fp4": "pytest_qlab.methods.blockwise:Fp4",
    "mxfp4": "pytest_qlab.methods.microscaled:Mxfp4",
    "nvfp4": "pytest_qlab.methods.microscaled:Nvfp4",
    "dynamic": "pytest_qlab.methods.dynamic:Dynamic",
    "fp8": "pytest_qlab.methods.fp8:Fp8",
    "static": "pytest_qlab.methods.static:Static",
    "smoothquant": "pytest_qlab.methods.smoothquant:SmoothQuant",
    "gptq": "pytest_qlab.methods.gptq:Gptq",
    "quip": "pytest_qlab.methods.quip:Quip",
    "ldlq": "pytest_qlab.methods.ldlq:Ldlq",
    "spqr": "pytest_qlab.methods.spqr:Spqr",
    "awq": "pytest_qlab.methods.awq:Awq",
    "squeezellm": "pytest_qlab.methods.squeezellm:SqueezeLlm",
    "ggml": "pytest_qlab.methods.ggml:Ggml",
    "gguf": "pytest_qlab.methods.gguf:Gguf",
    "gguf_file": "pytest_qlab.engines.gguf.method:GgufFile",
    "llamacpp": "pytest_qlab.engines.llamacpp.method:LlamaCpp",
}
_PREPROCESSINGS = {
    "smooth": "pytest_qlab.methods.smoothquant:Smooth",
    "quarot": "pytest_qlab.methods.quarot:QuaRot",
}
C = TypeVar("C", bound=Configured)
M = TypeVar("M", bound=Method)
P = TypeVar("P", bound=Preprocessing)
_registered: dict[str, type[Method]] = {}
_registered_preprocessings: dict[str, type[Preprocessing]] = {}


def register_method(method: type[M]) -> type[M]:
    """Register a `Method` subclass under its `name`; usable as a class decorator.

    Raises:
        SpecError: the class has no name, or another class has it already.
    """
    _check_name(method, _registered)
    _registered[method.name] = method
    return method


def register_preprocessing(preprocessing: type[P]) -> type[P]:
    """Register a `Preprocessing` subclass under its `name`; usable as a class decorator.

    Raises:
        SpecError: the class has no name, or a method or another preprocessing has it already.
    """
    _check_name(preprocessing, _registered_preprocessings)
    _registered_preprocessings[preprocessing.name] = preprocessing
    return preprocessing


def _check_name(kind: type[Configured], known: Mapping[str, type[Configured]]) -> None:
    name = getattr(kind, "name", "")
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise SpecError(
            f"{kind.__qualname__} cannot be registered: its class variable `name` must be made "
            f"of letters, digits and underscores; it is {name!r}."
        )
    others = {**_registered, **_registered_preprocessings}
    same = known.get(name)
    again = same is not None and same.__qualname__ == kind.__qualname__
    if name in _BUILTIN or name in _PREPROCESSINGS or (name in others and not again):
        raise SpecError(
            f"{kind.__qualname__} cannot be registered as {name!r}: that name is taken. "
            "Give the class another `name`."
        )


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return _names(ENTRY_POINT_GROUP, _BUILTIN, _registered)


def preprocessing_names() -> list[str]:
    """Names of all preprocessings, sorted."""
    return _names(PREPROCESSING_GROUP, _PREPROCESSINGS, _registered_preprocessings)


def _names(group: str, *known: Mapping[str, object]) -> list[str]:
    external = {point.name for point in entry_points(group=group)}
    return sorted(external.union(*known))


def find_method(name: str) -> type[Method]:
    """Return the class registered under `name`.

    Raises:
        SpecError: no method has that name, or its entry point cannot be imported.
    """
    found = _found(name, Method, "method", ENTRY_POINT_GROUP, _BUILTIN, _registered)
    if found is None:
        raise SpecError(f"Unknown method {name!r}.{did_you_mean(name, method_names())}")
    return found


def find_preprocessing(name: str) -> type[Preprocessing]:
    """Return the class registered under `name`.

    Raises:
        SpecError: no preprocessing has that name, or its entry point cannot be imported.
    """
    found = _found(
        name,
        Preprocessing,
        "preprocessing",
        PREPROCESSING_GROUP,
        _PREPROCESSINGS,
        _registered_preprocessings,
    )
    if found is None:
        known = preprocessing_names()
        raise SpecError(f"Unknown preprocessing {name!r}.{did_you_mean(name, known)}")
    return found


def _found(
    name: str,
    base: type[C],
    noun: str,
    group: str,
    builtin: Mapping[str, str],
    registered: Mapping[str, type[C]],
) -> type[C] | None:
    if name in registered:
        return registered[name]
    if name in builtin:
        module, _, attribute = builtin[name].partition(":")
        return _checked(name, base, noun, lambda: getattr(import_module(module), attribute))
    for point in entry_points(group=group, name=name):
        return _checked(name, base, noun, point.load)
    return None


def _checked(name: str, base: type[C], noun: str, load: Callable[[], object]) -> type[C]:
    try:
        found = load()
    except (ImportError, AttributeError) as error:
        raise SpecError(f"The {noun} {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecError(
            f"The {noun} {name!r} is {found!r}; expected a subclass of pytest_qlab.{base.__name__}."
        )
    return found
