"""llama.cpp's mixes: which GGML type each matrix of a model gets in a `Q4_K_M` file.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp, as bundled with
llama-cpp-python 0.3.36 (2026); older files were made by older rules. Three classes of matrices get
more bits than the rest: the output head, `attn_v` and `ffn_down`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pytest_qlab.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from pytest_qlab.models.matrices import Matrix

Mix = Literal[
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "F16",
    "BF16",
    "F32",
]
MIXES: tuple[Mix, ...] = get_args(Mix)
"""Names of all mixes.

`MXFP4` is what `llama-quantize --pure ... MXFP4_MOE` makes, every matrix in MXFP4: llama.cpp has no
mix of that type for models without experts.
"""

_PLAIN = ("F16", "BF16", "F32")
_PURE = ("MXFP4",)
_FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
"""The types in blocks of 256, and the one in blocks of 32 that takes their place."""
_VALUES = ("attn_v", "attn_qkv")


def fitting_type(type: str, columns: int) -> str:
    """The type itself, or what llama.cpp takes where rows of that length do not fit its blocks.

    Types in blocks of 256 give way to one in blocks of 32 of more bits, and those to F16.
    """
    if type in _FALLBACK and columns % 256:
        type = _FALLBACK[type]
    if type not in (*_FALLBACK, *_PLAIN) and columns % 32:
        return "F16"
    return type


def use_more_bits(index: int, count: int) -> bool:
    """Whether layer `index` of `count` gets more bits: the outer eighths, every third between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


@dataclass(frozen=True)
class _Rules:
    """One mix for one model; the methods return the type of a matrix before it must fit."""

    mix: str
    base: str
    gqa: int
    experts: int
    imatrix: bool
    layers: int
    architecture: str

    @property
    def falcon(self) -> bool:
        return self.architecture == "falcon"

    @property
    def size_70b(self) -> bool:
        """What llama.cpp takes for a model of 70B parameters: it looks at the layers alone."""
        if self.architecture == "llama":
            return self.layers == 80 and self.gqa > 1
        if self.architecture == "jais2":
            return self.layers == 68
        return self.layers == 80 and self.architecture in ("qwen2", "deci", "olmo")

    def output(self, columns: int) -> str:
        if self.falcon or fitting_type(self.base, columns) != self.base:
            return "Q8_0"
        return "Q8_0" if self.base == "Q8_0" else "Q6_K"

    def attn_v(self, index: int, count: int) -> str:
        if self.experts == 8:
            return "Q8_0"
        found = self.base
        if self.mix == "Q2_K":
            found = "Q4_K" if self.gqa >= 4 else "Q3_K"
        elif self.mix == "Q3_K_M":
            found = "Q5_K" if index < 2 else "Q4_K"
        elif (
            self.mix == "Q3_K_L"
            or (self.mix in ("IQ4_NL", "IQ4_XS") and self.gqa >= 4)
            or (self.mix == "Q4_K_S" and index < 4)
        ):
            found = "Q5_K"
        elif self.mix in ("Q4_K_M", "Q5_K_M") and use_more_bits(index, count):
            found = "Q6_K"
        return "Q5_K" if self.size_70b and found in ("Q3_K", "Q4_K") else found

    def attn_k(self) -> str:
        return "Q8_0" if self.experts == 8 else self.base

    def attn_output(self) -> str:
        if self.falcon:
            return "Q4_K" if self.mix == "Q3_K_L" else self.base
        if self.experts == 8:
            few = self.base in ("Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if few and self.mix != "Q3_K_L" else self.base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.mix, self.base)

    def ffn_down(self, layer: int) -> str:
        first_eighth = layer < self.layers // 8
        first_sixteenth = layer < self.layers // 16
        more = use_more_bits(layer, self.layers)
        if self.mix == "Q2_K":
            return "Q3_K"
        if self.mix == "Q3_K_M":
            if first_sixteenth:
                return "Q5_K"
            return "Q4_K" if more or not self.falcon else "Q3_K"
        if self.mix == "Q3_K_L":
            return "Q4_K" if self.falcon else "Q5_K"
        if self.mix == "Q4_K_M" and self.falcon:
            return "Q6_K" if first_sixteenth else "Q5_K" if more else "Q4_K"
        if self.mix in ("Q4_K_M", "Q5_K_M") and more:
            return "Q6_K"
        if self.mix == "Q4_K_S" and first_eighth and not self.falcon:
            return "Q5_K"
        if self.mix in ("IQ4_NL", "IQ4_XS") and first_eighth and not self.imatrix:
            return "Q5_K"
        if self.mix in ("Q4_0", "Q5_0") and first_eighth and self.imatrix:
            return "Q4_1" if self.mix == "Q4_0" else "Q5_1"
        return self.base


def tensor_types(
    mix: str,
    matrices: Sequence[Matrix],
    *,
    gqa: int,
    experts: int,
    imatrix: bool,
    layers: int,
    architecture: str = "llama",
) -> dict[str, str]:
    """The GGML type of every matrix of a model in a file of that mix, by the matrix's name.

    Args:
        mix: one of `MIXES`.
        matrices: all of the model's, because some rules count through the blocks.
        gqa: query heads that share a key/value head.
        experts: of a mixture, in each block; 0 if there are none.
        imatrix: whether an importance matrix is given.
        layers: decoder blocks.
        architecture: GGUF's name of it; Falcon has rules of its own.

    Raises:
        SpecError: no mix has that name.
    """
    if mix not in MIXES:
        raise SpecError(f"Unknown mix {mix!r}.{did_you_mean(mix, MIXES)}")
    base = mix.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    if mix in _PURE or mix in _PLAIN:
        return {each.name: fitting_type(base, each.columns) for each in matrices}
    rules = _Rules(mix, base, gqa, experts, imatrix, layers, architecture)
    values = _order(each for each in matrices if each.role in _VALUES)
    downs = _order(each for each in matrices if each.role == "ffn_down")
    found = {}
    for each in matrices:
        if each.role == "output" or each.tied:
            type = rules.output(each.columns)
        elif each.role in _VALUES:
            type = rules.attn_v(values[each.block], len(values))
        elif each.role == "attn_k":
            type = rules.attn_k()
        elif each.role == "attn_output":
            type = rules.attn_output()
        elif each.role == "ffn_down":
            # Of experts the block is counted, because not every block need have them.
            place = each.block if experts > 1 else downs[each.block]
            type = rules.ffn_down(place or 0)
        else:
            type = base
        found[each.name] = fitting_type(type, each.columns)
    return found


def _order(matrices: Iterable[Matrix]) -> dict[int | None, int]:
    """Running numbers of the blocks that hold these matrices; experts of a block are one tensor."""
    blocks = sorted({each.block for each in matrices if each.block is not None})
    return {block: number for number, block in enumerate(blocks)}
