"""Names and orders of rows, against the `gguf` package's map and plain loops."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pytest_qlab.engines.gguf.names import ARCHITECTURES, gguf_names
from pytest_qlab.errors import ModelError
from tests.architectures import opt
from tests.engines.gguf_models import ARCHITECTURE_OF, MODELS


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_named_as_llama_cpp_names_it(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    model = MODELS[name]()
    architecture = ARCHITECTURE_OF[name]
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)

    naming = gguf_names(model)

    assert naming.architecture == architecture
    assert list(naming.places) == [name for name, _ in model.named_parameters()]
    for parameter, place in naming.places.items():
        assert place.tensor == names.get_name(parameter, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_rows_of_outputs_whatever_the_layout(name: str) -> None:
    model = MODELS[name]()
    places = gguf_names(model).places
    expected = {
        parameter: tuple(
            value.shape[::-1] if name == "gpt2" and ".c_" in parameter else value.shape
        )
        for parameter, value in model.named_parameters()
    }
    # A bias's shape is the same either way.
    assert {parameter: place.shape for parameter, place in places.items()} == expected
    packable = {place.tensor for place in places.values() if place.packable}
    assert all(tensor.endswith(".weight") and "norm" not in tensor for tensor in packable)
    assert "position_embd.weight" not in packable
    assert "token_embd.weight" in packable


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)])
def test_a_tied_head_has_no_place_of_its_own(name: str, tied: bool) -> None:
    naming = gguf_names(MODELS[name]())
    assert naming.tied is tied
    assert ("lm_head.weight" in naming.places) is not tied
    assert naming.rows == 288


def test_rows_of_queries_and_keys_alternate_between_the_halves_of_a_head() -> None:
    places = gguf_names(MODELS["llama-tied-biased"]()).places
    for projection, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            place = places[f"model.layers.1.self_attn.{projection}_proj.{kind}"]
            expected = []
            for head in range(heads):
                for pair in range(8):
                    for half in range(2):
                        expected.append(head * 16 + half * 8 + pair)
            order, back = place.file_rows(), place.model_rows()
            assert order is not None
            assert back is not None
            assert order.tolist() == expected
            assert torch.equal(order[back], torch.arange(heads * 16))
            assert torch.equal(back[order], torch.arange(heads * 16))
    assert places["model.layers.1.self_attn.v_proj.weight"].file_rows() is None


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2"])
def test_other_architectures_keep_the_order_of_rows(name: str) -> None:
    places = gguf_names(MODELS[name]()).places.values()
    assert all(place.file_rows() is None and place.model_rows() is None for place in places)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match="A OPTForCausalLM cannot be written") as caught:
        gguf_names(opt())
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_a_parameter_that_llama_cpp_would_not_read_is_refused() -> None:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        attention_bias=True,
    )
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj\.bias, for which"):
        gguf_names(Qwen3ForCausalLM(config))
