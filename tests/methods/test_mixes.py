"""The mixes' rules against what llama.cpp itself has chosen, and against the sizes of its files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

from pytest_qlab.errors import SpecError
from pytest_qlab.formats.ggml import GGML_TYPES, PLAIN_TYPES, row_bytes
from pytest_qlab.methods.mixes import MIXES, fitting_type, tensor_types, use_more_bits
from pytest_qlab.models.matrices import Matrix
from tests.methods.llamacpp_oracle import (
    FACTS,
    FTYPES,
    INSTALLED,
    MISSING,
    Case,
    cases,
    expand,
    observe,
)

_FACTS: list[dict[str, Any]] = json.loads(FACTS.read_text())["facts"]


def matrices(case: Case) -> list[Matrix]:
    """The case's matrices as a model has them: experts apart, blocks in order."""
    found = []
    for role, block, columns in case.tensors():
        experts = case.experts if case.experts and role.startswith("ffn_") else 1
        for expert in range(experts):
            tied = case.tied and role == "token_embd"
            found.append(Matrix(f"{block}.{role}.{expert}", role, block, 2, columns, tied))
    return found


def computed(case: Case, mix: str, imatrix: bool) -> dict[str, list[str]]:
    """The types by role in the order of blocks; experts of one block must agree."""
    given = matrices(case)
    types = tensor_types(
        mix,
        given,
        gqa=case.heads // case.kv_heads,
        experts=case.experts,
        imatrix=imatrix,
        layers=case.layers,
        architecture=case.architecture,
    )
    assert list(types) == [each.name for each in given]
    found: dict[tuple[str, int | None], set[str]] = {}
    for each in given:
        found.setdefault((each.role, each.block), set()).add(types[each.name])
    by_role: dict[str, list[str]] = {}
    for (role, _), chosen in found.items():
        (only,) = chosen
        by_role.setdefault(role, []).append(only)
    return by_role


def test_the_facts_cover_every_case_and_mix() -> None:
    assert [fact["case"] for fact in _FACTS] == [asdict(case) for case in cases()]
    assert all(list(fact["types"]) == list(FTYPES) for fact in _FACTS)
    assert sorted(FTYPES) == sorted(MIXES)


@pytest.mark.parametrize("fact", _FACTS, ids=lambda fact: str(Case(**fact["case"])))
@pytest.mark.parametrize("imatrix", [False, True])
def test_types_are_those_that_llama_cpp_chose(fact: dict[str, Any], imatrix: bool) -> None:
    case = Case(**fact["case"])
    for mix in MIXES:
        written = fact["types"][mix]
        if imatrix:
            written = fact["with_imatrix"].get(mix, written)
        assert computed(case, mix, imatrix) == expand(written, case), mix


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason=MISSING)
@pytest.mark.parametrize("imatrix", [False, True])
def test_types_are_those_of_the_installed_llama_cpp(imatrix: bool) -> None:
    """The cases of the written facts, and more layer counts."""
    counts = (1, 3, 5, 7, 9, 12, 15, 20, 28, 36, 40)
    more = [Case(layers=count, kv_heads=2, hidden=64, inner=256) for count in counts]
    asked = [(case, mix, imatrix) for case in [*more, *cases()] for mix in FTYPES]
    for (case, mix, _), theirs in zip(asked, observe(asked), strict=True):
        assert computed(case, mix, imatrix) == theirs, (case, mix)


@pytest.mark.parametrize(
    ("count", "more"),
    [
        (6, {2, 5}),
        (8, {0, 3, 6, 7}),
        (12, {0, 3, 6, 9, 10, 11}),
        (16, {0, 1, 4, 7, 10, 13, 14, 15}),
        (22, {0, 1, 4, 7, 10, 13, 16, 19, 20, 21}),
        (24, {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}),
        (28, {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}),
        (32, {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}),
        (36, {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, *range(30, 36)}),
        (40, {*range(5), 7, 10, 13, 16, 19, 22, 25, 28, 31, *range(34, 40)}),
    ],
)
def test_layers_with_more_bits(count: int, more: set[int]) -> None:
    assert {index for index in range(count) if use_more_bits(index, count)} == more


def llama(hidden: int, inner: int, layers: int, vocabulary: int, keys: int) -> list[Matrix]:
    rows = {"attn_k": keys, "attn_v": keys, "ffn_gate": inner, "ffn_up": inner}
    return [
        Matrix(
            f"{block}.{role}",
            role,
            block,
            rows.get(role, hidden) if block is not None else vocabulary,
            columns,
        )
        for role, block, columns in Case(layers=layers, hidden=hidden, inner=inner).tensors()
    ]


# Computed by another implementation of the rules of 2026, norms in float32.
_LLAMA_2_7B = {
    "Q2_K": 3.0062,
    "Q3_K_S": 3.4994,
    "Q3_K_M": 3.9146,
    "Q3_K_L": 4.2697,
    "Q4_0": 4.5412,
    "Q4_1": 5.0315,
    "IQ4_XS": 4.3295,
    "IQ4_NL": 4.5680,
    "Q4_K_S": 4.5779,
    "Q4_K_M": 4.8442,
    "Q5_K_S": 5.5217,
    "Q5_K_M": 5.6778,
    "Q6_K": 6.5635,
    "Q8_0": 8.5009,
}
# Published in llama.cpp, tools/quantize/README.md, for files that it made itself.
_LLAMA_31_8B = {
    "Q2_K": 3.1593,
    "Q3_K_S": 3.6429,
    "Q3_K_M": 3.9960,
    "Q3_K_L": 4.2979,
    "IQ4_XS": 4.4597,
    "IQ4_NL": 4.6818,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
    "F16": 16.0005,
}


@pytest.mark.parametrize(
    ("shape", "parameters", "published"),
    [
        ((4096, 11008, 32, 32000, 4096), 6_738_415_616, _LLAMA_2_7B),
        ((4096, 14336, 32, 128256, 1024), 8_030_261_248, _LLAMA_31_8B),
    ],
    ids=["Llama-2-7B", "Llama-3.1-8B"],
)
def test_whole_models_have_the_bits_per_weight_of_llama_cpp_s_files(
    shape: tuple[int, int, int, int, int],
    parameters: int,
    published: dict[str, float],
) -> None:
    given = llama(*shape)
    norms = (2 * shape[2] + 1) * shape[0]
    assert sum(each.rows * each.columns for each in given) + norms == parameters
    for mix, bits in published.items():
        types = tensor_types(
            mix, given, gqa=4096 // shape[4], experts=0, imatrix=False, layers=shape[2]
        )
        size = 4 * norms + sum(m.rows * row_bytes(types[m.name], m.columns) for m in given)
        assert round(8 * size / parameters, 4) == bits, mix


@pytest.mark.parametrize("type", [*GGML_TYPES, *PLAIN_TYPES])
@pytest.mark.parametrize("columns", [1, 16, 31, 32, 96, 255, 256, 288, 4096])
def test_the_type_that_fits_is_the_type_where_it_can_be(type: str, columns: int) -> None:
    found = fitting_type(type, columns)
    blocks = (GGML_TYPES | PLAIN_TYPES)[type].block_size
    if columns % blocks == 0:
        assert found == type
    else:
        assert row_bytes(found, columns) > 0
        assert (found == "F16") == (columns % 32 != 0)


def test_narrow_rows_get_types_of_at_least_as_many_bits() -> None:
    wider = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}
    assert {type for type in GGML_TYPES if fitting_type(type, 32) != type} == wider
    for type in wider:
        other = GGML_TYPES[fitting_type(type, 32)]
        assert other.bits_per_weight > GGML_TYPES[type].bits_per_weight


def test_an_unknown_mix_is_refused() -> None:
    with pytest.raises(SpecError, match=r"'Q4_K_X'.*Did you mean 'Q4_K_"):
        tensor_types("Q4_K_X", [], gqa=1, experts=0, imatrix=False, layers=1)


def test_blocks_without_attention_are_not_counted() -> None:
    """Hybrids: the first two values are those of blocks 3 and 5, whatever lies between."""
    given = [Matrix(str(block), "attn_v", block, 2, 256) for block in (3, 5, 9, 11)]
    types = tensor_types("Q3_K_M", given, gqa=1, experts=0, imatrix=False, layers=12)
    assert list(types.values()) == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]


def test_mixes_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from pytest_qlab.methods import ggml, gguf, mixes\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
