"""`PREPROCESSING+METHOD`: its grammar, ids, identities, and what does not go together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from pytest_qlab.errors import SpecError
from pytest_qlab.gate.budgets import check_patterns
from pytest_qlab.methods import registry
from pytest_qlab.methods.awq import Awq
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.composed import Composed
from pytest_qlab.methods.configured import Statistic
from pytest_qlab.methods.gptq import Gptq
from pytest_qlab.methods.preprocessing import Preprocessing
from pytest_qlab.methods.quarot import QuaRot
from pytest_qlab.methods.registry import (
    find_method,
    find_preprocessing,
    method_names,
    preprocessing_names,
    register_method,
    register_preprocessing,
)
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.methods.smoothquant import Smooth
from pytest_qlab.report.methods import describe_methods
from pytest_qlab.running.parametrize import _restricted
from pytest_qlab.specs import known_name, parse_specs


def ids(*texts: str, **configurations: dict[str, object]) -> list[str]:
    return [spec.id for spec in parse_specs(texts, configurations)]


def one(text: str, **configurations: dict[str, object]) -> Method:
    (spec,) = parse_specs([text], configurations)
    return spec.method


def test_ids_say_what_is_composed_and_differs() -> None:
    assert ids("quarot+gptq:bits=3", "smooth+rtn") == ["quarot+gptq-w3g128", "smooth+rtn-w4g128"]
    assert ids("quarot:seed=1:heads=no+rtn") == ["quarot-no_heads-seed=1+rtn-w4g128"]
    assert ids("smooth:alpha=0.8+gptq") == ["smooth-alpha=0.8+gptq-w4g128"]
    assert ids("quarot+gguf:Q3_K_S") == ["quarot+gguf-Q3_K_S"]
    assert ids("quarot:seed=0+rtn,quarot+rtn:bits=4") == ["quarot+rtn-w4g128"]


def test_is_what_its_parts_are() -> None:
    found = one("quarot:seed=7+gptq:bits=3:group_size=64")
    expected = Composed(preprocessings=(QuaRot(seed=7),), method=Gptq(bits=3, group_size=64))
    assert found == expected
    assert hash(found) == hash(expected)
    assert found.name == "quarot+gptq"
    others = ["quarot+gptq:bits=3:group_size=64", "smooth+gptq", "gptq"]
    assert all(one(other) != found for other in others)
    everything = [found, *map(one, others)]
    assert len({json.dumps(each.identity(), sort_keys=True) for each in everything}) == 4


def test_order_is_part_of_the_identity() -> None:
    class Other(Preprocessing):
        name: ClassVar[str] = "other"
        summary: ClassVar[str] = ""

    first = Composed(preprocessings=(Other(), QuaRot()), method=Rtn())
    second = Composed(preprocessings=(QuaRot(), Other()), method=Rtn())
    assert first.identity() != second.identity()
    assert first != second
    assert first.id != second.id


def test_what_calibrates_goes_in_front_of_a_change_of_basis() -> None:
    class Shifted(Preprocessing):
        name: ClassVar[str] = "shifted"
        summary: ClassVar[str] = ""
        needs: ClassVar[frozenset[Statistic]] = frozenset({"gram"})

    found = Composed(preprocessings=(Shifted(), QuaRot()), method=Rtn())
    assert found.stream == "original"
    assert found.original_statistics == {"gram"}
    with pytest.raises(SpecError, match="Put 'shifted' first"):
        Composed(preprocessings=(QuaRot(), Shifted()), method=Rtn())


def test_versions_of_all_parts_are_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = one("quarot+rtn").identity()
    monkeypatch.setattr(QuaRot, "version", 99)
    assert one("quarot+rtn").identity() != before


def test_options_are_plain() -> None:
    assert one("quarot:seed=3+rtn:bits=3").model_dump(mode="json") == {
        "bits": 3,
        "group_size": 128,
        "symmetric": False,
        "mse": False,
        "quarot.seed": 3,
        "quarot.heads": True,
    }
    json.dumps(one("smooth+gguf").model_dump(mode="json"))


def test_statistics_of_both_models() -> None:
    asked = {
        text: (one(text).stream, one(text).wanted_statistics, one(text).original_statistics)
        for text in ("quarot+rtn", "quarot+gptq", "smooth+rtn", "smooth+gptq", "smooth+awq")
    }
    channels, gram, nothing = frozenset({"channels"}), frozenset({"gram"}), frozenset[str]()
    assert asked == {
        "quarot+rtn": ("none", nothing, nothing),
        "quarot+gptq": ("quantized", gram, nothing),
        "smooth+rtn": ("original", channels, channels),
        "smooth+gptq": ("quantized", gram, channels),
        "smooth+awq": ("original", channels | gram, channels | gram),
    }
    assert Awq().original_statistics == channels | gram
    assert Gptq().original_statistics == nothing


def test_configurations_compose() -> None:
    release: dict[str, Any] = {"method": "quarot:seed=2+gptq", "bits": 3}
    assert ids("release", release=release) == ["release"]
    assert one("release", release=release) == one("quarot:seed=2+gptq:bits=3")
    assert ids("release:group_size=64", release=release) == ["quarot-seed=2+gptq-w3g64"]
    plain: dict[str, Any] = {"method": "gptq", "bits": 3}
    assert ids("quarot+release", release=plain) == ["quarot+gptq-w3g128"]
    with pytest.raises(SpecError, match=r"'smooth\+quarot\+gptq': 'quarot' fuses the norms"):
        ids("smooth+release", release=release)
    named = {"my-release": plain}
    (spec,) = parse_specs(["quarot+my-release"], named)
    assert spec.id == "quarot+gptq-w3g128"
    bad: list[dict[str, object]] = [{"method": "quarot"}, {"method": "quarot+gptq", "bitz": 3}]
    for wrong in bad:
        with pytest.raises(SpecError, match=r"\[tool.qlab.methods.wrong\]"):
            ids("wrong", wrong=wrong)


def test_patterns_choose_compositions() -> None:
    assert ids("quarot+gptq,gptq,rtn,!quarot*") == ["gptq-w4g128", "rtn-w4g128"]
    assert ids("quarot+gptq,gptq,!quarot+gptq") == ["gptq-w4g128"]
    assert ids("quarot+gptq,gptq,!gptq") == ["quarot+gptq-w4g128"]
    assert not any("+" in each for each in ids("all"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quarot", "'quarot' is a preprocessing.*quarot\\+rtn"),
        ("smooth+quarot", "'quarot' is a preprocessing"),
        ("gptq+rtn", "'gptq' is a method, and a method comes last.*quarot, smooth"),
        ("gptq:bits=3+rtn", "'gptq' is a method, and a method comes last"),
        ("gptq+quarot", "'quarot' is a preprocessing"),
        ("qarot+gptq", "Unknown preprocessing 'qarot'. Did you mean 'quarot'"),
        ("quarot+gqtp", "Unknown method 'gqtp'. Did you mean .*'gptq'"),
        ("quarot+all", "'all' cannot follow.*quarot\\+rtn,quarot\\+gptq"),
        ("quarot+g*", "'g\\*' cannot follow"),
        ("quarot:seed=1+g*", "'g\\*' cannot follow.*quarot:seed=1\\+rtn"),
        ("all+gptq", "'all' cannot stand in front"),
        ("q*+gptq", "'q\\*' cannot stand in front"),
        ("+gptq", "'' cannot stand in front"),
        ("quarot+", "Expected PREPROCESSING\\+METHOD"),
        ("quarot++gptq", "Unknown preprocessing 'quarot\\+'. Did you mean 'quarot'"),
        ("quarot+quarot+rtn", "'quarot' twice"),
        ("quarot:sed=1+rtn", "preprocessing 'quarot' has no option 'sed'. Did you mean 'seed'"),
        ("quarot:seed=-1+rtn", "preprocessing 'quarot' cannot be configured.*given -1"),
        ("smooth:alpha=1.5+rtn", "given 1.5"),
        ("quarot+rtn:seed=1", "method 'rtn' has no option 'seed'"),
        ("quarot:+rtn", "empty option"),
        ("quarot+llamacpp", "takes a whole model or a finished file"),
        ("quarot+gguf_file:path=x.gguf", "takes a whole model or a finished file"),
        ("quarot+awq", "'awq' calibrates on the original model's inputs.*rtn.*gptq"),
        ("quarot+static", "'static' calibrates on the original"),
        ("quarot+ggml:Q4_0:imatrix", "'ggml' calibrates on the original"),
        ("quarot+gguf:imatrix", "'gguf' calibrates on the original"),
        ("quarot+smoothquant", "'smoothquant' calibrates on the original"),
        ("quarot+smooth+gptq", "'smooth' calibrates on the original.*one of the two"),
        ("smooth+quarot+gptq", "undoes what 'smooth' did there. Take one of the two"),
    ],
)
def test_errors_say_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_specs([text])


def test_a_plus_in_a_value_is_no_composition() -> None:
    (spec,) = parse_specs(["gguf_file:path=/models/a+b.gguf"])
    assert spec.method.model_dump() == {"path": "/models/a+b.gguf"}
    with pytest.raises(SpecError, match=r"given 1000\.0"):
        parse_specs(["gptq:damp_percent=1e+3"])


def test_a_composition_holds_a_preprocessing_and_one_method() -> None:
    with pytest.raises(SpecError, match="no preprocessing"):
        Composed(preprocessings=(), method=Rtn())
    inner = Composed(preprocessings=(QuaRot(),), method=Rtn())
    with pytest.raises(SpecError, match="composed already"):
        Composed(preprocessings=(Smooth(),), method=inner)


def test_names_of_ids_and_patterns_are_known() -> None:
    known = method_names()
    assert known_name("quarot+gptq-w3g128", known)
    assert known_name("quarot-seed=1+rtn", known)
    assert known_name("gptq-w4", known)
    assert not known_name("quarot+gtpq-w3", known)
    assert not known_name("quaro+gptq", known)


def test_budgets_and_markers_know_them() -> None:
    """One for a composition that is not in this run is no slip of the pen; a misspelt one is."""
    specs = parse_specs(["quarot+rtn", "gptq"])
    run: Any = SimpleNamespace(specs=specs, settings=SimpleNamespace(configurations={}))
    chosen = [spec.id for spec in _restricted(run, ["quarot+rtn", "quarot+gptq-w3g128"])]
    assert chosen == ["quarot+rtn-w4g128"]
    assert [spec.id for spec in _restricted(run, ["*rtn*"])] == ["quarot+rtn-w4g128"]
    with pytest.raises(SpecError, match="qaurot"):
        _restricted(run, ["qaurot+gptq-w3g128"])
    for pattern in ("quarot+rtn", "quarot*", "quarot+awq-w4g128", "smooth+gptq"):
        budget: Any = SimpleNamespace(pattern=pattern)
        check_patterns([budget], specs, narrowed=True, known=method_names())
    for pattern in ("quarot+gtpq", "qaurot+gptq"):
        budget = SimpleNamespace(pattern=pattern)
        with pytest.raises(SpecError, match="matches no method of this run"):
            check_patterns([budget], specs, narrowed=True, known=method_names())


def test_preprocessings_are_described() -> None:
    assert preprocessing_names() == ["quarot", "smooth"]
    text = " ".join(describe_methods().split())
    assert "smooth+METHOD moves the range" in text
    assert "quarot+METHOD rotates the residual stream" in text
    assert "alpha float default 0.5" in text
    assert "PREPROCESSING[:option=value]...+NAME" in text
    for name in preprocessing_names():
        assert find_preprocessing(name).summary
        assert name not in method_names()


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_registered_preprocessings", {})

    class Mine(Preprocessing):
        """Does nothing."""

        name: ClassVar[str] = "mine"
        summary: ClassVar[str] = "nothing"

    class Quantizer(Method):
        """Quantizes nothing."""

        name: ClassVar[str] = "mine"
        summary: ClassVar[str] = "nothing"

    assert register_preprocessing(Mine) is Mine
    assert register_preprocessing(Mine) is Mine
    assert ids("mine+rtn") == ["mine+rtn-w4g128"]
    with pytest.raises(SpecError, match="that name is taken"):
        register_method(Quantizer)
    for taken in ("gptq", "quarot"):
        monkeypatch.setattr(Mine, "name", taken)
        with pytest.raises(SpecError, match="that name is taken"):
            register_preprocessing(Mine)
    monkeypatch.setattr(Mine, "name", "a+b")
    with pytest.raises(SpecError, match="letters, digits and underscores"):
        register_preprocessing(Mine)


def test_one_that_cannot_be_imported_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._PREPROCESSINGS, "gone", "nowhere.at_all:Gone")
    monkeypatch.setitem(registry._PREPROCESSINGS, "odd", "pytest_qlab.methods.rtn:Rtn")
    with pytest.raises(SpecError, match="'gone' cannot be imported"):
        parse_specs(["gone+rtn"])
    with pytest.raises(SpecError, match=r"expected a subclass of pytest_qlab\.Preprocessing"):
        parse_specs(["odd+rtn"])
    assert "gone not available" in " ".join(describe_methods().split())


def test_reading_compositions_imports_no_torch() -> None:
    code = (
        "import sys; from pytest_qlab.specs import parse_specs; "
        "parse_specs(['smooth+gptq', 'quarot+rtn']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert find_method("smoothquant").name == "smoothquant"


@pytest.mark.parametrize("method", ["gptq:bits=3", "quarot+gptq:bits=3", "gguf:Q4_0"])
def test_options_of_a_configured_method_stand_on_their_own_lines(method: str) -> None:
    named = {"mine": {"method": method}}
    with pytest.raises(SpecError, match=rf"\.mine\].*{re.escape(method)}.*lines of their own"):
        parse_specs(["mine"], named)


def test_what_an_option_wants_is_said_without_a_class_of_error() -> None:
    with pytest.raises(SpecError, match=r"so: group_size: a group has at least 8 .*given 4"):
        parse_specs(["quarot+gptq:group_size=4"])
