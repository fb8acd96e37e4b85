"""Files read back under the base model's names, and files that are not the model's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytest_qlab.engines.gguf.importer import read_model
from pytest_qlab.engines.gguf.names import gguf_names
from pytest_qlab.engines.gguf.reader import GgufFile, GgufTensor
from pytest_qlab.engines.gguf.writer import base_tensors, write_gguf
from pytest_qlab.errors import DataError, ModelError
from pytest_qlab.formats.affine import AffineGroups
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.ggml import GgmlBlocks
from pytest_qlab.methods.pipeline import quantize_model
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.models.load import LoadedModel
from pytest_qlab.models.structure import all_linears
from tests.architectures import opt
from tests.engines.gguf_models import MODELS, byte_level, forward, tiny
from tests.engines.llama_oracle import llama_logits, needs_llama


def _quantized(loaded: LoadedModel, type: str) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """All matrices in one type, by the `gguf` package's quantizer."""
    gguf = pytest.importorskip("gguf")
    weights, others = base_tensors(loaded, "F32")
    blocks: dict[str, PackedWeight] = {}
    for name, weight in weights.items():
        values = weight.dequantize().numpy()
        data = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[type])
        blocks[name] = GgmlBlocks(type, torch.from_numpy(data), weight.shape)
    return blocks, others


def _write(
    path: Path, loaded: LoadedModel, weights: dict[str, PackedWeight], others: dict[str, Tensor]
) -> GgufFile:
    pytest.importorskip("gguf")
    write_gguf(path, loaded, weights=weights, others=others, file_type="Q8_0")
    return GgufFile.open(path)


def _same(left: PackedWeight, right: PackedWeight) -> bool:
    return left.metadata() == right.metadata() and all(
        torch.equal(left.tensors()[key], tensor) for key, tensor in right.tensors().items()
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("type", ["F16", "Q4_1"])
def test_what_was_written_is_read(name: str, type: str, tmp_path: Path) -> None:
    loaded = tiny(name)
    pytest.importorskip("gguf")
    weights, others = base_tensors(loaded, type) if type == "F16" else _quantized(loaded, type)
    found = read_model(_write(tmp_path / "model.gguf", loaded, weights, others), loaded)

    assert list(found.layers) == [site.name for site in all_linears(loaded.model)]
    assert set(found.embeddings) == weights.keys() - found.layers.keys()
    for module, layer in {**found.layers, **found.embeddings}.items():
        assert _same(layer.weight, weights[module])
        assert layer.activation is None
    assert found.changed.keys() == others.keys()
    for parameter, value in others.items():
        assert found.changed[parameter].dtype == torch.float32
        assert torch.equal(found.changed[parameter], value)
    assert found.stored_dtype is torch.float32


def test_a_tied_head_is_read_once(tmp_path: Path) -> None:
    loaded = tiny("qwen2")
    found = read_model(_write(tmp_path / "f", loaded, *base_tensors(loaded, "F16")), loaded)
    assert list(found.embeddings) == ["model.embed_tokens"]


def test_affine_grids_come_back_as_blocks_of_the_same_values(tmp_path: Path) -> None:
    loaded = tiny("llama")
    weights, others = base_tensors(loaded, "F32")
    made = quantize_model(loaded.model, Rtn(bits=4, group_size=32, symmetric=True), [], None)
    weights |= {name: layer.weight for name, layer in made.layers.items()}
    found = read_model(_write(tmp_path / "model.gguf", loaded, weights, others), loaded)
    for name, layer in found.layers.items():
        assert isinstance(weights[name], AffineGroups)
        assert isinstance(layer.weight, GgmlBlocks)
        assert layer.weight.type == "Q4_0"
        assert torch.equal(layer.weight.dequantize(), weights[name].dequantize())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufFile, LoadedModel]:
    """A file in F16 and its model, which has a head of its own."""
    loaded = tiny("llama")
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return _write(file, loaded, *base_tensors(loaded, "F16")), loaded


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufFile, LoadedModel]:
    """The same with a head that is tied to the input embedding."""
    loaded = tiny("llama-tied-biased")
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return _write(file, loaded, *base_tensors(loaded, "F16")), loaded


def _with(file: GgufFile, **tensors: GgufTensor | None) -> GgufFile:
    """The file with tensors added, replaced or (None) removed; `__` stands for a dot."""
    changed: dict[str, Any] = dict(file.tensors)
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        changed[name] = tensor
        if tensor is None:
            del changed[name]
    return dataclasses.replace(file, tensors=changed)


def _renamed(tensor: GgufTensor, name: str, **changes: Any) -> GgufTensor:
    return dataclasses.replace(tensor, name=name, **changes)


Case = tuple[GgufFile, LoadedModel]


def test_a_missing_tensor_is_named(llama: Case) -> None:
    file, loaded = llama
    changed = _with(file, blk__1__ffn_up__weight=None)
    with pytest.raises(
        ModelError, match=r"no tensor blk\.1\.ffn_up\.weight, which model\.layers\.1"
    ):
        read_model(changed, loaded)


def test_fused_queries_keys_and_values_are_explained(llama: Case) -> None:
    file, loaded = llama
    fused = _renamed(file.tensors["blk.0.attn_q.weight"], "blk.0.attn_qkv.weight")
    changed = _with(file, blk__0__attn_q__weight=None, blk__0__attn_qkv__weight=fused)
    with pytest.raises(ModelError, match="convert the model without --fuse-qkv"):
        read_model(changed, loaded)


def test_another_shape_is_refused(llama: Case) -> None:
    file, loaded = llama
    name = "token_embd.weight"
    other = _renamed(file.tensors[name], name, shape=(144, 128))
    with pytest.raises(ModelError, match=r"has the shape \(144, 128\), but model\.embed_tokens"):
        read_model(_with(file, token_embd__weight=other), loaded)


def test_an_additional_tensor_is_refused(llama: Case) -> None:
    file, loaded = llama
    bias = _renamed(file.tensors["blk.0.attn_norm.weight"], "blk.0.attn_q.bias")
    with pytest.raises(ModelError, match=r"it has the tensor blk\.0\.attn_q\.bias, which"):
        read_model(_with(file, blk__0__attn_q__bias=bias), loaded)


def test_a_type_that_is_not_decoded_is_refused(llama: Case) -> None:
    file, loaded = llama
    name = "blk.0.ffn_up.weight"
    other = _renamed(file.tensors[name], name, type="IQ2_S")
    with pytest.raises(DataError, match="IQ2_S"):
        read_model(_with(file, blk__0__ffn_up__weight=other), loaded)


def test_another_architecture_configuration_or_vocabulary_is_refused(llama: Case) -> None:
    file, loaded = llama
    with pytest.raises(ModelError, match="is of the architecture 'llama', but"):
        read_model(file, tiny("qwen2"))
    with pytest.raises(ModelError, match=r"rope\.freq_base is 10000\.0 in the file, but 500"):
        read_model(file, tiny("llama3-scaling"))
    with pytest.raises(ModelError, match=r"20 merges|token 2"):
        read_model(file, tiny("llama", byte_level(5)))
    with pytest.raises(ModelError, match="A OPTForCausalLM cannot be"):
        read_model(file, dataclasses.replace(loaded, model=opt()))


def test_a_head_that_repeats_the_tied_embedding_is_accepted(tied: Case) -> None:
    file, loaded = tied
    output = _renamed(file.tensors["token_embd.weight"], "output.weight")
    found = read_model(_with(file, output__weight=output), loaded)
    assert list(found.embeddings) == ["model.embed_tokens"]


@pytest.mark.parametrize("changes", [{"type": "BF16"}, {"offset": 0}])
def test_a_head_other_than_the_tied_embedding_is_refused(
    tied: Case, changes: dict[str, Any]
) -> None:
    file, loaded = tied
    output = _renamed(file.tensors["token_embd.weight"], "output.weight", **changes)
    with pytest.raises(ModelError, match=r"an output head .* other than its input embedding"):
        read_model(_with(file, output__weight=output), loaded)


def test_a_file_whose_model_is_untied_needs_a_head(llama: Case) -> None:
    file, loaded = llama
    with pytest.raises(ModelError, match=r"no tensor output\.weight, which lm_head\.weight"):
        read_model(_with(file, output__weight=None), loaded)


def test_rotary_factors_must_be_the_configurations(tmp_path: Path) -> None:
    loaded, plain = tiny("llama3-scaling"), tiny("llama")
    file = _write(tmp_path / "scaled", loaded, *base_tensors(loaded, "F32"))
    factors = file.tensors["rope_freqs.weight"]
    with pytest.raises(ModelError, match=r"no tensor rope_freqs\.weight, but the model scales"):
        read_model(_with(file, rope_freqs__weight=None), loaded)
    other = _renamed(factors, factors.name, offset=file.tensors["output_norm.weight"].offset)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight scales rotary positions otherwise"):
        read_model(_with(file, rope_freqs__weight=other), loaded)

    unscaled = _write(tmp_path / "plain", plain, *base_tensors(plain, "F32"))
    with pytest.raises(ModelError, match="scales rotary positions otherwise"):
        read_model(_with(unscaled, rope_freqs__weight=factors), plain)
    norm = plain.model.get_parameter("model.norm.weight")
    norm.fill_(1.0)
    unscaled = _write(tmp_path / "ones", plain, *base_tensors(plain, "F32"))
    ones = _renamed(unscaled.tensors["output_norm.weight"], factors.name, shape=(8,), nbytes=32)
    read_model(_with(unscaled, rope_freqs__weight=ones), plain)


@needs_llama
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "qwen3", "gpt2"])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_llama_cpp_computes_what_the_imported_model_does(
    name: str, type: str, tmp_path: Path
) -> None:
    loaded = tiny(name)
    weights, others = _quantized(loaded, type)
    path = tmp_path / "model.gguf"
    found = read_model(_write(path, loaded, weights, others), loaded)
    ids = torch.randint(2, 270, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = torch.log_softmax(forward(loaded, found, ids), dim=-1)
    theirs = torch.log_softmax(torch.from_numpy(llama_logits(path, ids)), dim=-1)
    base = torch.log_softmax(
        forward(
            loaded, read_model(_write(path, loaded, *base_tensors(loaded, "F32")), loaded), ids
        ),
        dim=-1,
    )
    # llama.cpp rounds activations to 8 bits before each product: about what Q8_0 does to weights.
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 1e-3
    if type == "Q4_0":
        assert float((base.exp() * (base - theirs)).sum(-1).mean()) > 5e-3
    assert gguf_names(loaded.model).rows == theirs.shape[1]
