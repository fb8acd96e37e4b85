"""Which methods there are: the built-in ones, entry points, and those registered at run time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from pytest_qlab.errors import SpecError, did_you_mean
from pytest_qlab.methods.base import Method

ENTRY_POINT_GROUP = "pytest_qlab.methods"

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
    "gptq": "pytest_qlab.methods.gptq:Gptq",
    "awq": "pytest_qlab.methods.awq:Awq",
    "squeezellm": "pytest_qlab.methods.squeezellm:SqueezeLlm",
    "ggml": "pytest_qlab.methods.ggml:Ggml",
    "gguf": "pytest_qlab.methods.gguf:Gguf",
    "gguf_file": "pytest_qlab.engines.gguf.method:GgufFile",
    "llamacpp": "pytest_qlab.engines.llamacpp.method:LlamaCpp",
}
M = TypeVar("M", bound=Method)
_registered: dict[str, type[Method]] = {}


def register_method(method: type[M]) -> type[M]:
    """Register a `Method` subclass under its `name`; usable as a class decorator.

    Raises:
        SpecError: the class has no name, or another class has it already.
    """
    name = getattr(method, "name", "")
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise SpecError(
            f"{method.__qualname__} cannot be registered: its class variable `name` must be made "
            f"of letters, digits and underscores; it is {name!r}."
        )
    known = _registered.get(name)
    if name in _BUILTIN or (known is not None and known.__qualname__ != method.__qualname__):
        raise SpecError(
            f"{method.__qualname__} cannot be registered as {name!r}: that name is taken. "
            "Give the class another `name`."
        )
    _registered[name] = method
    return method


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    external = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return sorted({*_BUILTIN, *_registered, *external})


def find_method(name: str) -> type[Method]:
    """Return the class registered under `name`.

    Raises:
        SpecError: no method has that name, or its entry point cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        return _checked(name, lambda: getattr(importlib.import_module(module), attribute))
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return _checked(name, point.load)
    raise SpecError(f"Unknown method {name!r}.{did_you_mean(name, method_names())}")


def _checked(name: str, load: Callable[[], object]) -> type[Method]:
    try:
        method = load()
    except (ImportError, AttributeError) as error:
        raise SpecError(f"The method {name!r} cannot be imported: {error}") from error
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise SpecError(
            f"The method {name!r} is {method!r}; expected a subclass of pytest_qlab.Method."
        )
    return method
