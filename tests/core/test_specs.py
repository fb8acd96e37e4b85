"""Method specifications on the command line."""

from __future__ import annotations

import pytest

from pytest_qlab.errors import SpecError
from pytest_qlab.methods.registry import find_method, method_names
from pytest_qlab.specs import DEFAULT_SPECS, parse_specs


def ids(*texts: str, **configurations: dict[str, object]) -> list[str]:
    return [spec.id for spec in parse_specs(texts, configurations)]


def test_readable_unique_ids() -> None:
    assert ids("gptq,awq", "none") == ["gptq-w4g128", "awq-w4g128", "none"]
    assert ids("gptq:bits=3:group_size=64") == ["gptq-w3g64"]
    assert ids("dynamic:bits=8,dynamic:bits=4") == ["dynamic-w8a8", "dynamic-w4a8"]
    assert ids("rtn:group_size=-1:symmetric") == ["rtn-w4-channel-symmetric"]
    assert ids("gptq:desc_act=false") == ["gptq-w4g128-no_desc_act"]
    assert ids("gptq:damp_percent=0.05") == ["gptq-w4g128-damp_percent=0.05"]


def test_equal_specs_are_one() -> None:
    assert ids("gptq,gptq:bits=4", "gptq:group_size=128") == ["gptq-w4g128"]
    first, second = parse_specs(["rtn"])[0], parse_specs(["rtn:bits=4"])[0]
    assert first == second
    assert hash(first) == hash(second)


def test_default_specs_are_the_readme_comparison() -> None:
    assert len(parse_specs(DEFAULT_SPECS)) == len(DEFAULT_SPECS)


def test_all_and_globs_and_leaving_out() -> None:
    everything = ids("all")
    assert len(everything) == sum(find_method(name).in_all for name in method_names())
    assert ids("*ptq") == ["gptq-w4g128"]
    assert "gptq-w4g128" not in ids("all", "!gptq")
    assert ids("rtn,gptq,awq,!gptq-w4*") == ["rtn-w4g128", "awq-w4g128"]
    assert "none" not in ids("!none")
    assert ids("*tq:bits=3") == ["gptq-w3g128"]


def test_named_configurations() -> None:
    release = {"method": "gptq", "bits": 3}
    assert ids("release", release=release) == ["release"]
    assert ids("release:group_size=64", release=release) == ["gptq-w3g64"]
    assert ids("rel*", release=release) == ["release"]
    with pytest.raises(SpecError, match=r"\[tool.qlab.methods.release\].*no option 'bitz'"):
        ids("release", release={"method": "gptq", "bitz": 3})
    with pytest.raises(SpecError, match='method = "gptq"'):
        ids("release", release={"bits": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gqtp", "Did you mean .*'gptq'"),
        ("gptq:bit=3", "Did you mean 'bits'"),
        ("gptq:bits=5", "2, 3, 4 or 8"),
        ("gptq:bits=four", "given 'four'"),
        ("gptq:", "empty option"),
        ("xyz*", "matches no method"),
        ("rtn,!gptq", "leaves out nothing"),
        ("rtn,!rtn", "No method is left"),
        (",", "No method is left"),
        ("", "No method is left"),
    ],
)
def test_errors_say_what_is_valid(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_specs([text])


def test_every_method_says_what_it_is() -> None:
    for name in method_names():
        method = find_method(name)
        assert method.summary
        assert method.__doc__


def test_two_methods_with_one_id_are_an_error() -> None:
    named = {"gptq-w4g128": {"method": "gptq", "bits": 3}}
    with pytest.raises(SpecError, match="would both be called 'gptq-w4g128'"):
        parse_specs(["gptq,gptq-w4g128"], named)
    same = {"gptq-w4g128": {"method": "gptq", "bits": 4}}
    assert len(parse_specs(["gptq,gptq-w4g128"], same)) == 1


def test_a_bare_value_is_the_positional_options() -> None:
    assert ids("gguf:Q3_K_S", "gguf:q3_k_s", "gguf:type=Q3_K_S") == ["gguf-Q3_K_S"]
    assert ids("gguf") == ["gguf-Q4_K_M"]
    assert ids("gguf:Q3_K_S:imatrix=true", "ggml:iq4_xs:imatrix") == [
        "gguf-Q3_K_S-imatrix",
        "ggml-IQ4_XS-imatrix",
    ]
    assert ids("gguf:imatrix") == ["gguf-Q4_K_M-imatrix"]
    mine = {"method": "gguf", "imatrix": True}
    assert ids("mine:Q6_K", mine=mine) == ["gguf-Q6_K-imatrix"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gguf:Q3_K_X", "given 'Q3_K_X'"),
        ("gguf:imatrix:Q3_K_S", "no option 'Q3_K_S'"),
        ("gguf:Q3_K_S:type=Q4_0", "no option 'Q3_K_S'"),
        ("gguf:Q3_K_S=yes", "no option 'Q3_K_S'"),
        ("gptq:Q3_K_S", "no option 'Q3_K_S'"),
        ("gguf_file", "path"),
    ],
)
def test_misplaced_values_are_errors(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_specs([text])


def test_all_leaves_out_what_needs_more_than_the_package() -> None:
    everything = ids("all")
    assert not any(name.startswith(("gguf_file", "llamacpp")) for name in everything)
    assert "gguf-Q4_K_M" in everything
