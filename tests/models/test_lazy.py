"""A model read part by part is the model that transformers loads, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from pytest_qlab.errors import ModelError
from pytest_qlab.models.load import load_model, open_lazily, size_of
from tests.architectures import ARCHITECTURES, SHAPE, build, character_tokenizer, token_ids
from tests.lab.tiny import saved_tiny_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_part_is_the_loaded_models(tmp_path: Path, architecture: str, dtype: str) -> None:
    directory = str(saved_tiny_model(tmp_path / "model", architecture))
    whole = load_model(directory, dtype=dtype)
    lazy = open_lazily(directory, dtype=dtype)
    expected = dict(whole.model.named_parameters())
    assert list(dict(lazy.model.named_parameters())) == list(expected)
    assert all(each.device.type == "meta" for each in lazy.model.parameters())
    assert lazy.loaded.digest == whole.digest
    assert lazy.loaded.storage_dtypes == whole.storage_dtypes
    assert lazy.loaded.nbytes == whole.nbytes
    seen = set()
    for name, module in [*lazy.blocks, *lazy.outside]:
        with lazy.resident(module):
            for inner, parameter in module.named_parameters(prefix=name):
                if inner in expected:  # the other name of a tied one is not
                    assert torch.equal(parameter, expected[inner]), inner
                    seen.add(inner)
        assert all(each.device.type == "meta" for each in lazy.model.parameters())
    assert seen == expected.keys()
    buffers = dict(whole.model.named_buffers())
    for name, buffer in lazy.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    ids = token_ids(16)
    with torch.no_grad(), lazy.forwards():
        logits = lazy.model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(logits, whole.model(input_ids=ids, use_cache=False).logits)
    assert all(each.device.type == "meta" for each in lazy.model.parameters())


def _gpt_neox() -> Any:
    return build(GPTNeoXForCausalLM, GPTNeoXConfig(**SHAPE), 1)


def _phimoe() -> Any:
    config = PhimoeConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)
    return build(PhimoeForCausalLM, config, 2)


def _ernie() -> Any:
    config = Ernie4_5_MoeConfig(
        **SHAPE, num_key_value_heads=2, moe_num_experts=4, moe_k=2, moe_intermediate_size=16
    )
    return build(Ernie4_5_MoeForCausalLM, config, 3)


@pytest.mark.parametrize(
    ("make", "called"),
    [
        (_gpt_neox, "embed_out.weight"),
        (_phimoe, "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        (_ernie, "model.layers.1.mlp.moe_statics.e_score_correction_bias"),
    ],
)
def test_files_may_call_tensors_otherwise_than_transformers(
    make: Callable[[], Any], called: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert called in load_file(tmp_path / "model.safetensors")
    whole, lazy = load_model(str(tmp_path)), open_lazily(str(tmp_path))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(lazy.read(name), parameter), name
    buffers = dict(whole.model.named_buffers())
    assert all(torch.equal(each, buffers[name]) for name, each in lazy.model.named_buffers())
    ids = token_ids(16)
    with torch.no_grad(), lazy.forwards():
        logits = lazy.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, whole.model(input_ids=ids, use_cache=False).logits)


def test_experts_that_are_not_understood_are_refused_here_too(tmp_path: Path) -> None:
    config = JetMoeConfig(**SHAPE, num_local_experts=4, num_key_value_heads=2)
    JetMoeForCausalLM(config).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"input_linear \(JetMoeParallelExperts\)"):
        open_lazily(str(tmp_path))


def test_one_block_is_resident_at_a_time(tmp_path: Path) -> None:
    lazy = open_lazily(str(saved_tiny_model(tmp_path / "model")))
    residents = []

    def note(*_: object) -> None:
        residents.append(
            [
                any(each.device.type != "meta" for each in block.parameters())
                for _, block in lazy.blocks
            ]
        )

    handles = [block.register_forward_hook(note) for _, block in lazy.blocks]
    with torch.no_grad(), lazy.forwards():
        lazy.model(input_ids=token_ids(8), use_cache=False)
    for handle in handles:
        handle.remove()
    assert residents == [[True, False], [False, True]]


def test_tied_weights_are_read_once(tmp_path: Path) -> None:
    lazy = open_lazily(str(saved_tiny_model(tmp_path / "model", "llama-tied")))
    embedding, head = lazy.model.get_input_embeddings(), lazy.model.get_output_embeddings()
    assert embedding.weight is head.weight
    with lazy.resident(embedding), lazy.resident(head):
        assert embedding.weight.device.type == "cpu"
        assert embedding.weight is head.weight
    assert embedding.weight is head.weight


def test_replaced_modules_are_put_back(tmp_path: Path) -> None:
    lazy = open_lazily(str(saved_tiny_model(tmp_path / "model")))
    block = lazy.blocks[0][1]
    before = dict(block.named_modules())
    with lazy.resident(block):
        setattr(block.get_submodule("mlp"), "up_proj", torch.nn.Identity())  # noqa: B010
        assert dict(block.named_modules()) != before
    assert dict(block.named_modules()) == before
    assert all(each.device.type == "meta" for each in block.parameters())


def test_shards_are_one_model(tmp_path: Path) -> None:
    ARCHITECTURES["llama"]().save_pretrained(tmp_path, max_shard_size="20KB")
    character_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    lazy, whole = open_lazily(str(tmp_path)), load_model(str(tmp_path))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(lazy.read(name), parameter)
    assert size_of(str(tmp_path), dtype="bfloat16") == lazy.nbytes // 2


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = saved_tiny_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of shape"):
        open_lazily(str(directory))


def test_a_value_that_is_not_finite_is_found_when_it_is_read(tmp_path: Path) -> None:
    directory = saved_tiny_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    lazy = open_lazily(str(directory))
    with lazy.resident(lazy.blocks[0][1]):
        pass
    with pytest.raises(ModelError, match="1 values that are NaN"):
        lazy.resident(lazy.blocks[1][1]).__enter__()
    assert all(each.device.type == "meta" for each in lazy.model.parameters())


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = saved_tiny_model(tmp_path / "model")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Save the model as safetensors"):
        open_lazily(str(directory))
    assert size_of(str(directory), dtype="float32") is None
