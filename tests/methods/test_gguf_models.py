"""`gguf` on whole models: the types and the bytes that llama.cpp gives to every matrix."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from pytest_qlab.calibration.sources import StoredStatistics, write_statistics
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.ggml import GgmlBlocks
from pytest_qlab.methods.ggml import Ggml
from pytest_qlab.methods.mixes import MIXES
from pytest_qlab.methods.pipeline import QuantizedModel, quantize_model
from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.matrices import matrices_of
from pytest_qlab.solvers.ggml import quantize_ggml
from tests.methods.gguf_checks import BYTES, ggml, gguf, same, type_of
from tests.methods.llamacpp_oracle import FACTS, INSTALLED, MISSING, Case, expand
from tests.methods.llamacpp_oracle import quantize as quantize_with_llama_cpp


def shell(case: Case) -> PreTrainedModel:
    """A model without weights of the case's architecture, layers, heads and columns."""
    sizes: dict[str, Any] = {
        "vocab_size": 2,
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "tie_word_embeddings": case.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    decoder: dict[str, Any] = {
        "intermediate_size": case.inner,
        "num_key_value_heads": case.kv_heads,
    }
    with torch.device("meta"):
        if case.architecture == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_inner=case.inner, **sizes))
        if case.architecture == "falcon":
            own: dict[str, Any] = {"multi_query": case.kv_heads == 1, "ffn_hidden_size": case.inner}
            new: dict[str, Any] = {
                "new_decoder_architecture": case.kv_heads > 1,
                "num_kv_heads": case.kv_heads,
            }
            return FalconForCausalLM(FalconConfig(**own, **new, **sizes))
        if case.experts:
            config = MixtralConfig(num_local_experts=case.experts, **decoder, **sizes)
            return MixtralForCausalLM(config)
        return LlamaForCausalLM(LlamaConfig(**decoder, **sizes))


_FACTS = [
    fact
    for fact in json.loads(FACTS.read_text())["facts"]
    if fact["case"]["layers"] <= 16
    and fact["case"]["hidden"] != 896
    and (fact["case"]["experts"], fact["case"]["kv_heads"]) != (8, 8)
]


@pytest.mark.parametrize("fact", _FACTS, ids=lambda fact: str(Case(**fact["case"])))
def test_matrices_of_real_models_get_the_types_that_llama_cpp_chose(fact: dict[str, Any]) -> None:
    """From transformers' modules to types, through names, heads and experts."""
    case = Case(**fact["case"])
    model = shell(case)
    if case.experts:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.zero_()
        unfuse_experts(model)
    matrices = {each.name: each for each in matrices_of(model)}
    for mix in ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "F16"):
        for imatrix in (False, True):
            written = fact["types"][mix]
            if imatrix:
                written = fact["with_imatrix"].get(mix, written)
            expected = expand(written, case)
            assigned = gguf(mix, imatrix=imatrix).assign(model)
            assert list(assigned) == list(matrices)
            for name, method in assigned.items():
                each = matrices[name]
                assert method == ggml(
                    expected[each.role][each.block or 0],
                    imatrix=imatrix and each.block is not None,
                ), (mix, name)


def tiny(*, tied: bool = False, layers: int = 2) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=288,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(False)
    return model


def packed(result: QuantizedModel) -> dict[str, PackedWeight]:
    return {name: each.weight for name, each in (result.layers | result.embeddings).items()}


@pytest.mark.parametrize(
    ("mix", "tied"), [*((mix, False) for mix in MIXES), ("Q4_K_M", True), ("Q8_0", True)]
)
def test_a_whole_model_in_every_mix(mix: str, tied: bool) -> None:
    model = tiny(tied=tied)
    method = gguf(mix)
    result = quantize_model(model, method, [], None)
    found = packed(result)
    assigned = cast(dict[str, Ggml], method.assign(model))
    assert sorted(found) == sorted(assigned)
    ends = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert list(result.embeddings) == ends
    assert result.stored_dtype is torch.float32
    assert not result.changed
    for name, weight in found.items():
        type = assigned[name].type
        rows, columns = model.get_submodule(name).get_parameter("weight").shape
        assert type_of(weight) == type
        assert weight.nbytes * 256 == rows * columns * BYTES[type]
        expected = ggml(type).quantize(model.get_submodule(name).get_parameter("weight"), None)
        assert same(weight, expected.weight)


def test_one_type_for_the_decoder_leaves_the_embeddings_alone() -> None:
    model = tiny()
    result = quantize_model(model, ggml("Q6_K"), [], None)
    assert not result.embeddings
    assert result.stored_dtype is None
    down = {name for name in result.layers if name.endswith("down_proj")}
    for name, each in result.layers.items():
        assert type_of(each.weight) == ("Q8_0" if name in down else "Q6_K")


def collected(model: nn.Module, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The mean square of every linear layer's inputs, by hooks, in float64."""
    squares: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares.setdefault(name, []).append(inputs[0].double().square().flatten(0, -2))

        return keep

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(kept).mean(0).float() for name, kept in squares.items()}


def test_a_whole_model_with_an_importance_matrix(tmp_path: Path) -> None:
    model = tiny()
    sequences = [list(range(3 + start, 43 + start)) for start in (0, 20, 50)]
    write_statistics(tmp_path, model, sequences, gram=False, threads=1, progress=lambda line: None)
    source = StoredStatistics(tmp_path)
    result = quantize_model(model, gguf("Q4_K_M", imatrix=True), sequences, source)
    known = {name: each for block in range(2) for name, each in source(block).items()}
    squares = collected(model, sequences)
    plain = packed(quantize_model(model, gguf("Q4_K_M"), [], None))
    for name, weight in packed(result).items():
        type = type_of(weight)
        assert type == type_of(plain[name])
        if name in result.embeddings or type == "Q8_0":
            assert same(weight, plain[name])
            continue
        importance = known[name].square_sum / known[name].tokens
        assert torch.allclose(importance, squares[name], rtol=1e-5)
        stored = model.get_submodule(name).get_parameter("weight")
        expected = GgmlBlocks(type, quantize_ggml(stored, type, importance), weight.shape)
        assert same(weight, expected)
        different = weight.dequantize() != plain[name].dequantize()
        assert float(different.float().mean()) > 0.2


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason=MISSING)
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="llama.cpp is built with fused multiply-adds on this processor",
)
@pytest.mark.parametrize("imatrix", [False, True])
def test_every_byte_of_a_model_is_llama_cpp_s(imatrix: bool, tmp_path: Path) -> None:
    """All mixes, with and without importance; the same importance goes to both."""
    model = tiny(layers=3)
    sequences = [list(range(3, 93))]
    (tmp_path / "statistics").mkdir()
    write_statistics(
        tmp_path / "statistics",
        model,
        sequences,
        gram=False,
        threads=1,
        progress=lambda line: None,
    )
    source = StoredStatistics(tmp_path / "statistics")
    names = {
        each.name: f"{'' if each.block is None else f'blk.{each.block}.'}{each.role}.weight"
        for each in matrices_of(model)
    }
    importance = {
        names[name]: (each.square_sum / each.tokens).numpy()
        for block in range(3)
        for name, each in source(block).items()
    }
    (tmp_path / "files").mkdir()
    theirs = quantize_with_llama_cpp(
        tmp_path / "files",
        Case(layers=3, heads=4, kv_heads=1, hidden=256, inner=288),
        {
            theirs: model.get_submodule(ours).get_parameter("weight").numpy()
            for ours, theirs in names.items()
        },
        MIXES,
        importance if imatrix else None,
    )
    for mix, expected in zip(MIXES, theirs, strict=True):
        method = gguf(mix, imatrix=imatrix)
        result = quantize_model(model, method, sequences, source if imatrix else None)
        for name, weight in packed(result).items():
            type, data = expected[names[name]]
            assert type_of(weight) == type, (mix, name)
            (tensor,) = weight.tensors().values()
            assert np.array_equal(tensor.view(torch.uint8).numpy(), data), (mix, name)
