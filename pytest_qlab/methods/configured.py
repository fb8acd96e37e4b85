"""What methods and preprocessings have in common: a name, options, an id and an identity."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Statistic = Literal["channels", "gram", "fisher"]


def follows_channels(wanted: frozenset[Statistic]) -> bool:
    """Whether the ranges of input channels are collected: not for the Gram matrix alone."""
    return wanted != {"gram"}


class Configured(BaseModel):
    """A name with options, frozen: equal options make equal, hashable objects.

    Class variables:
        name: letters, digits, underscores.
        summary, reference: lines for lists of methods.
        version: raised where the same options compute something else.
        positional: the option that may be given without its name: `gguf:Q4_K_M`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    version: ClassVar[int] = 1
    positional: ClassVar[str | None] = None

    @property
    def id(self) -> str:
        """A readable name, different for every set of options: `gptq-w3g64-sym`."""
        return "-".join([self.name, *self._id_parts()])

    def _id_parts(self) -> list[str]:
        """The width and group, then every option that differs from its default."""
        values = self.model_dump(mode="json")
        parts = []
        if self.positional is not None:
            parts.append(str(values.pop(self.positional)))
        if "bits" in values:
            width = f"w{values.pop('bits')}"
            if "activation_bits" in values:
                width += f"a{values.pop('activation_bits')}"
            if "group_size" in values:
                group = values.pop("group_size")
                width += f"g{group}" if group > 0 else "-channel"
            parts.append(width)
        for key, value in sorted(values.items()):
            if value == type(self).model_fields[key].get_default(call_default_factory=True):
                continue
            if isinstance(value, bool):
                parts.append(key if value else f"no_{key}")
            else:
                parts.append(f"{key}={value}")
        return parts

    def identity(self) -> dict[str, Any]:
        """Everything of it that determines codes; part of every artefact's key."""
        return {
            "method": self.name,
            "version": self.version,
            "options": self.model_dump(mode="json"),
        }
