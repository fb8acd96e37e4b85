"""The text of `--qlab-list-methods`: every method with its options, types and defaults."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pytest_qlab.methods.registry import find_method, method_names
from pytest_qlab.specs import DEFAULT_SPECS


def list_methods(configurations: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Describe every method, then the named configurations, in plain text.

    Raises:
        SpecError: a method's entry point cannot be imported.
    """
    lines = ["Quantization methods (--qlab-methods=NAME[:key=value]...[,...]):", ""]
    for name in method_names():
        method = find_method(name)
        lines.append(f"{name}: {method.summary}")
        if method.reference:
            lines.append(f"    {method.reference}")
        for option, field in method.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = str(default).lower() if isinstance(default, bool) else default
            note = f"  {field.description}" if field.description else ""
            lines.append(f"    {option}: {_type_name(field.annotation)} = {shown}{note}")
        lines.append("")
    for name, table in (configurations or {}).items():
        options = ", ".join(f"{key}={value}" for key, value in table.items())
        lines.append(f"{name}: configuration in [tool.qlab.methods.{name}] ({options})")
    if configurations:
        lines.append("")
    lines.append(f"Default: {','.join(DEFAULT_SPECS)}")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    """A readable type: `2 | 3 | 4 | 8`, `int`, `bool`, `float | None`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in get_args(annotation))
    if annotation is type(None):
        return "none"
    return getattr(annotation, "__name__", str(annotation))
