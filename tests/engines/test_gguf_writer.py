"""Files that the `gguf` package reads back, and that llama.cpp computes the same logits from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytest_qlab.engines.gguf.hyperparameters import hyperparameters, rope_factors
from pytest_qlab.engines.gguf.names import gguf_names
from pytest_qlab.engines.gguf.writer import base_tensors, write_gguf
from pytest_qlab.errors import MethodError, MissingExtraError, ModelError, StoreError
from pytest_qlab.formats.affine import AffineGroups
from pytest_qlab.formats.base import PackedWeight
from pytest_qlab.formats.float4 import MicroscaledFloat4
from pytest_qlab.formats.ggml import GgmlBlocks
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.models.load import LoadedModel, load_model
from tests.architectures import character_tokenizer
from tests.engines.gguf_models import ARCHITECTURE_OF, MODELS, byte_level, tiny
from tests.engines.llama_oracle import llama_logits, needs_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"


def _write_base(path: Path, loaded: LoadedModel, dtype: str, **changes: Any) -> Path:
    """The unquantized model, with some matrices replaced; dots in names written as given."""
    weights, others = base_tensors(loaded, dtype)
    write_gguf(path, loaded, weights=weights | changes, others=others, file_type=dtype)
    return path


def _in_file_order(name: str, value: Tensor, loaded: LoadedModel) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter makes of a parameter, in its own words."""
    array = value.numpy()
    config = loaded.model.config
    if type(loaded.model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM"):
        for projection, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if f".{projection}." in name:
                shape = (heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                return array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
    if ".c_" in name and array.ndim == 2:
        return array.T
    return array


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_the_file(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    loaded = tiny(name)
    reader = gguf.GGUFReader(_write_base(tmp_path / "model.gguf", loaded, "F32"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    places = gguf_names(loaded.model).places
    for parameter, value in loaded.model.named_parameters():
        tensor = tensors.pop(places[parameter].tensor)
        assert tensor.tensor_type.name == "F32"
        assert np.array_equal(tensor.data, _in_file_order(parameter, value, loaded))
    factors = rope_factors(loaded.model)
    if factors is not None:
        assert np.array_equal(tensors.pop("rope_freqs.weight").data, factors.numpy())
    assert not tensors


def test_metadata_are_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    loaded = tiny("llama")
    reader = gguf.GGUFReader(_write_base(tmp_path / "model.gguf", loaded, "F16"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "tiny"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert fields["llama.vocab_size"] == 288
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    for key, value in hyperparameters(loaded.model).items():
        assert fields[key] == pytest.approx(value, rel=1e-6)
        assert (reader.fields[key].types[0] == gguf.GGUFValueType.FLOAT32) is isinstance(
            value, float
        )
    assert len(fields["tokenizer.ggml.tokens"]) == loaded.model.config.vocab_size
    assert fields["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_only_matrices_are_rounded(dtype: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    loaded = tiny("gpt2")
    reader = gguf.GGUFReader(_write_base(tmp_path / "model.gguf", loaded, dtype))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for place in gguf_names(loaded.model).places.values():
        assert types[place.tensor] == (dtype if place.packable else "F32")


def test_a_matrix_among_the_others_keeps_its_dtype(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    loaded = tiny("llama")
    weights, others = base_tensors(loaded, "F32")
    del weights["model.embed_tokens"]
    embedding = loaded.model.get_parameter("model.embed_tokens.weight").to(torch.bfloat16)
    others["model.embed_tokens.weight"] = embedding
    file = tmp_path / "model.gguf"
    write_gguf(file, loaded, weights=weights, others=others, file_type="Q4_0")
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight")
    assert tensor.tensor_type.name == "BF16"
    assert bytes(tensor.data) == embedding.view(torch.uint8).numpy().tobytes()


def _groups(rows: int, columns: int, bits: int, **options: Any) -> AffineGroups:
    generator = torch.Generator().manual_seed(bits)
    options = {"group_size": 32, "dtype": torch.float16, "zeros": None, **options}
    length = columns if options["group_size"] == -1 else options["group_size"]
    scales = torch.randn((rows, -(-columns // length)), generator=generator)
    return AffineGroups.pack(
        torch.randint(2**bits, (rows, columns), generator=generator),
        scales.to(options.pop("dtype")),
        options.pop("zeros"),
        bits=bits,
        **options,
    )


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize(("bits", "type"), [(4, "Q4_0"), (8, "Q8_0")])
def test_equal_grids_are_the_same_values(
    bits: int, type: str, group_size: int, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    loaded = tiny("llama")
    packed = {
        Q_PROJ: _groups(64, 64, bits, group_size=group_size),
        "model.layers.1.mlp.down_proj": _groups(64, 96, bits, group_size=group_size),
    }
    file = _write_base(tmp_path / "model.gguf", loaded, "F32", **packed)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for module, tensor in ((Q_PROJ, "blk.0.attn_q"), (list(packed)[1], "blk.1.ffn_down")):
        found = tensors[f"{tensor}.weight"]
        assert found.tensor_type.name == type
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        expected = _in_file_order(f"{module}.weight", packed[module].dequantize(), loaded)
        assert np.array_equal(values, expected)


@pytest.mark.parametrize("exponents", [(0, 5), (110, 130), (240, 251)])
def test_microscaled_blocks_are_the_same_values(exponents: tuple[int, int], tmp_path: Path) -> None:
    """Subnormal scales as well, and up to the largest whose sixfold is a number."""
    gguf = pytest.importorskip("gguf")
    loaded = tiny("llama")
    packed = _microscaled(64, exponents)
    file = _write_base(tmp_path / "model.gguf", loaded, "F32", **{Q_PROJ: packed})
    found = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.attn_q.weight")
    assert found.tensor_type.name == "MXFP4"
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    expected = _in_file_order(f"{Q_PROJ}.weight", packed.dequantize(), loaded)
    assert np.array_equal(values, expected)


def _microscaled(columns: int, exponents: tuple[int, int]) -> MicroscaledFloat4:
    generator = torch.Generator().manual_seed(columns)
    shape = (64, -(-columns // 32))
    scales = torch.randint(*exponents, shape, generator=generator).to(torch.uint8)
    codes = torch.randint(16, (64, columns), generator=generator)
    return MicroscaledFloat4.pack(codes, scales, None, block_size=32)


@pytest.mark.parametrize("type", ["Q5_1", "Q8_0"])
def test_blocks_are_written_byte_for_byte(type: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    loaded = tiny("qwen2")
    weight = loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight").numpy()
    data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[type])
    blocks = GgmlBlocks(type, torch.from_numpy(data), (96, 64))
    file = _write_base(
        tmp_path / "model.gguf", loaded, "F16", **{"model.layers.0.mlp.up_proj": blocks}
    )
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    assert tensor.tensor_type.name == type
    assert np.array_equal(tensor.data, data)
    assert tensor.shape.tolist() == [64, 96]  # the reverse of torch's


class _Other(PlainWeight):
    format = "lookup-table"


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (_groups(64, 64, 3), "has codes of 3 bits, not 4 or 8"),
        (_groups(64, 64, 4, zeros=torch.full((64, 2), 7)), "has zero points"),
        (_groups(64, 64, 4, group_size=48), "has groups of 48 in rows of 64, which are no"),
        (_groups(64, 64, 8, group_size=16), "has groups of 16"),
        (_groups(64, 64, 4, dtype=torch.float32), "has scales that float16 cannot hold"),
        (
            _groups(64, 64, 4, column_groups=torch.arange(64) % 2),
            "has groups of columns that are not neighbours",
        ),
        (
            MicroscaledFloat4.pack(
                torch.zeros(64, 64),
                torch.ones(64, 4).to(torch.float8_e4m3fn),
                torch.ones(1),
                block_size=16,
            ),
            "has a scale of the whole tensor",
        ),
        (_Other(torch.zeros(64, 64, dtype=torch.float64)), "is stored as 'lookup-table'"),
    ],
)
def test_what_no_type_can_express_is_refused(
    packed: PackedWeight, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    with pytest.raises(MethodError, match=f"{Q_PROJ} {message}") as caught:
        _write_base(file, tiny("llama"), "F32", **{Q_PROJ: packed})
    assert "symmetric=true, bits=4 or 8, groups of a multiple of 32" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_all_parameters_must_be_there_and_fit(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    loaded = tiny("llama")
    weights, others = base_tensors(loaded, "F32")
    file = tmp_path / "model.gguf"
    norm = "model.norm.weight"
    cases: list[tuple[dict[str, PackedWeight], dict[str, Tensor], str]] = [
        (weights, {k: v for k, v in others.items() if k != norm}, f"{norm} is missing"),
        ({k: v for k, v in weights.items() if k != "lm_head"}, others, "lm_head.weight is missing"),
        (weights | {"model.head": weights["lm_head"]}, others, "base model has no such parameter"),
        (weights, others | {norm: torch.ones(3)}, r"in the shape \(3,\), but the base model's is"),
        (weights | {"model.norm": PlainWeight(torch.ones(1, 64))}, others, "in the shape"),
    ]
    for given, rest, message in cases:
        with pytest.raises(ModelError, match=message):
            write_gguf(file, loaded, weights=given, others=rest, file_type="F32")


def test_a_weight_beyond_float16_is_refused_in_it() -> None:
    loaded = tiny("llama")
    loaded.model.get_parameter(f"{Q_PROJ}.weight")[3, 4] = -1e6
    with pytest.raises(ModelError, match=rf"{Q_PROJ} have magnitudes up to 1e\+06, which F16"):
        base_tensors(loaded, "F16")
    base_tensors(loaded, "BF16")


def test_a_file_is_called_after_most_of_its_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    loaded = tiny("llama")
    weights, others = base_tensors(loaded, "BF16")
    weights[Q_PROJ] = _groups(64, 64, 4)
    file = tmp_path / "model.gguf"
    write_gguf(file, loaded, weights=weights, others=others)
    field = gguf.GGUFReader(file).fields["general.file_type"]
    assert field.contents() == gguf.LlamaFileType.MOSTLY_BF16


def test_an_unknown_file_type_is_refused_with_likely_ones(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    loaded = tiny("gpt2")
    weights, others = base_tensors(loaded, "F32")
    with pytest.raises(ModelError, match=r"no type 'Q4_K_X'\. Did you mean 'Q4_K_"):
        write_gguf(tmp_path / "f", loaded, weights=weights, others=others, file_type="Q4_K_X")


def test_the_file_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        with pytest.raises(StoreError, match=r"model\.gguf cannot be written: No space left"):
            _write_base(file, tiny("gpt2"), "F32")
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]
    assert file.read_text() == "before"
    _write_base(file, tiny("gpt2"), "F32")
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]
    assert file.read_bytes()[:4] == b"GGUF"
    with pytest.raises(StoreError, match="No such file or directory"):
        _write_base(tmp_path / "missing" / "model.gguf", tiny("gpt2"), "F32")


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    files = [_write_base(tmp_path / name, tiny("qwen3"), "F16") for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_notes_on_the_tokenizer_are_returned(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    tokenizer = byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    loaded = tiny("llama", tokenizer)
    weights, others = base_tensors(loaded, "F32")
    notes = write_gguf(tmp_path / "f", loaded, weights=weights, others=others, file_type="F32")
    assert notes == ("The tokenizer puts a space before texts; llama.cpp will not.",)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r'pip install "pytest-qlab\[gguf\]"'):
        _write_base(tmp_path / "model.gguf", tiny("llama"), "F32")


def _compare(loaded: LoadedModel, file: Path) -> float:
    """The largest difference of logits, relative to the largest logit."""
    rows = min(loaded.model.config.vocab_size, 270)
    ids = torch.randint(2, rows, (48,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded.model(input_ids=ids[None]).logits[0].numpy()
    found = llama_logits(file, ids.tolist())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@needs_llama
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    loaded = tiny(name)
    # ggml looks the activation of GPT-2 up in a table of float16 values.
    tolerance = 2e-3 if ARCHITECTURE_OF[name] == "gpt2" else 1e-5
    assert _compare(loaded, _write_base(tmp_path / "model.gguf", loaded, "F32")) < tolerance
    assert _compare(loaded, _write_base(tmp_path / "model.gguf", loaded, "F16")) < 1e-2


@needs_llama
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_file_without_tokens_takes_any_tokenizer(name: str, tmp_path: Path) -> None:
    loaded = tiny(name, character_tokenizer())
    weights, others = base_tensors(loaded, "F32")
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelError, match="of the kind WordLevel"):
        write_gguf(file, loaded, weights=weights, others=others)
    notes = write_gguf(file, loaded, weights=weights, others=others, vocabulary=False)
    assert notes == ()
    assert _compare(loaded, file) < 2e-3


@needs_llama
def test_llama_cpp_computes_the_embedded_models_logits(tmp_path: Path) -> None:
    loaded = load_model("embedded")
    assert _compare(loaded, _write_base(tmp_path / "model.gguf", loaded, "F32")) < 1e-5
