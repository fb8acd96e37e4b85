"""Loading models: what is promised of a loaded model, and one clear error for each bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel, T5Config
from transformers.utils import logging as transformers_logging

from pytest_qlab.data.text import load_documents
from pytest_qlab.data.windows import make_windows
from pytest_qlab.errors import ModelError
from pytest_qlab.models.load import (
    context_length,
    digest_of,
    from_memory,
    load_model,
    load_tokenizer,
    model_digest,
)
from tests.architectures import (
    ARCHITECTURES,
    CONTEXT,
    character_tokenizer,
    llama,
    mixtral,
    token_ids,
)


def _save(model: PreTrainedModel, directory: Path) -> Path:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved bfloat16 Llama; not to be changed."""
    return _save(_cast(llama(), torch.bfloat16), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_as_it_was_saved(architecture: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[architecture]()
    ids = token_ids(16)
    expected = model(ids).logits
    loaded = load_model(str(_save(model, tmp_path)))
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert loaded.storage_dtypes.keys() == {
        name for name, _ in loaded.model.named_parameters(remove_duplicate=False)
    }


def test_the_model_computes_in_float32_and_knows_its_storage_dtypes(saved: Path) -> None:
    loaded = load_model(str(saved))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert set(loaded.storage_dtypes.values()) == {torch.bfloat16}
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.name == str(saved)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("Abc, d.")) == "Abc, d."


def test_each_parameter_has_its_own_storage_dtype(directory: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    _edit_weights(directory, widen)
    dtypes = load_model(str(directory)).storage_dtypes
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_experts_stored_separately_have_the_checkpoints_dtype(tmp_path: Path) -> None:
    loaded = load_model(str(_save(_cast(mixtral(), torch.float16), tmp_path)))
    assert loaded.storage_dtypes["model.layers.0.mlp.experts.1.up_proj.weight"] == torch.float16


def test_the_dtype_to_compute_in_can_be_chosen(saved: Path) -> None:
    loaded = load_model(str(saved), dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="Did you mean 'bfloat16'"):
        load_model(str(saved), dtype="bflot16")
    with pytest.raises(ModelError, match="device 'nowhere' cannot be used"):
        load_model(str(saved), device="nowhere")


def test_the_digest_follows_weights_configuration_and_tokenizer_only(directory: Path) -> None:
    first = model_digest(str(directory))
    assert load_model(str(directory)).digest == first
    (directory / "README.md").write_text("a model")
    assert model_digest(str(directory)) == first
    _edit_config(directory, rms_norm_eps=1e-4)
    second = model_digest(str(directory))
    _edit_weights(directory, lambda tensors: tensors["lm_head.weight"].mul_(2))
    third = model_digest(str(directory))
    (directory / "tokenizer_config.json").write_text("{}")
    assert len({first, second, third, model_digest(str(directory))}) == 4


def test_a_model_in_memory_is_copied_and_left_alone() -> None:
    model = _cast(mixtral(), torch.bfloat16)
    model.get_parameter("lm_head.weight").requires_grad_(True)
    loaded = from_memory(model, character_tokenizer(), "mine")
    assert model.dtype == torch.bfloat16
    assert model.get_parameter("lm_head.weight").requires_grad
    assert model.get_submodule("model.layers.0.mlp.experts")._parameters
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert set(loaded.storage_dtypes.values()) == {torch.bfloat16}
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in loaded.storage_dtypes
    assert loaded.name == "mine"


def test_the_digest_of_a_model_in_memory_follows_every_tensor_and_the_tokenizer() -> None:
    model, tokenizer = llama(), character_tokenizer()
    first = digest_of(model, tokenizer)
    assert digest_of(llama(), character_tokenizer()) == first
    assert digest_of(model, character_tokenizer(adds_bos=True)) != first
    model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1
    assert digest_of(model, tokenizer) != first


def test_the_tokenizer_loads_alone(saved: Path) -> None:
    assert load_tokenizer(str(saved)).encode("a") == character_tokenizer().encode("a")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_context_length_is_that_of_the_configuration(architecture: str) -> None:
    assert context_length(ARCHITECTURES[architecture]()) == CONTEXT


def test_the_context_length_is_known_without_loading(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert context_length(str(directory)) == CONTEXT
    _edit_config(directory, model_type="frobnicator")
    with pytest.raises(ModelError, match="'frobnicator'"):
        context_length(str(directory))


def test_the_embedded_model_predicts_the_embedded_text() -> None:
    loaded = load_model("embedded")
    assert set(loaded.storage_dtypes.values()) == {torch.bfloat16}
    windows = make_windows(load_documents("embedded"), loaded.tokenizer, length=256, maximum=6)
    losses = []
    for window in windows.windows:
        ids = torch.tensor([window.ids])
        logits = loaded.model(ids).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))
    # An untrained model scores log(vocabulary), about 8.3 nats.
    assert torch.stack(losses).mean() < 0.6 * math.log(loaded.model.config.vocab_size)


# Bad input: each a ModelError that says what was given and what to do.


def test_a_path_that_is_no_directory() -> None:
    with pytest.raises(ModelError, match=r"no model directory '\./nowhere/at/all'.*embedded"):
        load_model("./nowhere/at/all")


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file; a directory is expected"):
        load_model(str(path))


def test_a_directory_without_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    for function in (load_model, model_digest):
        with pytest.raises(ModelError, match=r"has no config\.json"):
            function(str(directory))


@pytest.mark.parametrize("content", ["{", "[1]", "\ufeff"])
def test_a_config_that_is_no_json_object(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json of the model .* (cannot be read|no JSON)"):
        load_model(str(directory))


def test_an_unknown_model_type(directory: Path) -> None:
    _edit_config(directory, model_type="frobnicator")
    with pytest.raises(ModelError, match=r"type 'frobnicator'.*upgrade transformers"):
        load_model(str(directory))
    _edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling.Frobnicator"})
    with pytest.raises(ModelError, match=r"'frobnicator'.*--qlab-trust-remote-code"):
        load_model(str(directory))
    _edit_config(directory, model_type=None)
    with pytest.raises(ModelError, match="names no model_type"):
        load_model(str(directory))


def test_an_encoder_decoder_is_no_causal_model(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(T5Config().to_dict()))
    with pytest.raises(ModelError, match=r"'t5', which is not a causal language model"):
        load_model(str(directory))


def test_an_encoder_that_loads_as_causal_is_found_by_its_looking_ahead(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=False,
    )
    model = BertLMHeadModel(config).train(False)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    with pytest.raises(ModelError, match="depends on the tokens after it"):
        load_model(str(_save(model, tmp_path)))


def test_an_already_quantized_model(directory: Path) -> None:
    _edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized already"):
        load_model(str(directory))


def test_a_config_without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    for function in (load_model, model_digest):
        with pytest.raises(ModelError, match=r"config\.json but no weights"):
            function(str(directory))


def test_a_shard_that_is_missing(directory: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 of the weight files.*00002-of-00002"):
        load_model(str(directory))


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_safetensors(directory: Path, damage: str) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "header": b"\xff" * 16 + content[16:],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors .* is damaged or incomplete"):
        load_model(str(directory))


def test_weights_that_torch_saved(directory: Path) -> None:
    expected = load_model(str(directory))
    path = directory / "model.safetensors"
    binary = directory / "pytorch_model.bin"
    torch.save(load_file(path), binary)
    path.unlink()
    loaded = load_model(str(directory))
    assert loaded.storage_dtypes == expected.storage_dtypes
    ids = token_ids(8)
    assert torch.equal(loaded.model(ids).logits, expected.model(ids).logits)
    for content in (b"", b"no pickle", binary.read_bytes()[:1000]):
        binary.write_bytes(content)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin of the model"):
            load_model(str(directory))


def test_tensors_that_the_checkpoint_lacks(directory: Path) -> None:
    _edit_weights(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack 1 of the tensors.*layers\.1\.mlp\.up_proj"):
        load_model(str(directory))


def test_tensors_of_another_shape(directory: Path) -> None:
    _edit_config(directory, intermediate_size=64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(directory))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(directory: Path, value: float) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    _edit_weights(directory, lambda tensors: tensors[name][3, :2].fill_(value))
    with pytest.raises(ModelError, match=r"k_proj\.weight holds 2 values that are NaN or infinite"):
        load_model(str(directory))


def test_a_model_without_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()
    for function in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"has no tokenizer: none of tokenizer\.json"):
            function(str(directory))


def test_a_tokenizer_that_cannot_be_read(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer of the model .* cannot be loaded"):
        load_tokenizer(str(directory))


def test_a_tokenizer_of_another_model(directory: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["longer"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(ModelError, match=r"token ids up to 96, but .* only 96 rows"):
        load_model(str(directory))


def test_added_special_tokens_beyond_the_embedding_are_no_error(directory: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(directory)
    assert len(load_model(str(directory)).tokenizer) == 97


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for function in (load_model, load_tokenizer, model_digest):
        with pytest.raises(
            ModelError, match=r"'owner/name' is neither .*HF_HUB_OFFLINE.*hf download owner/name"
        ):
            function("owner/name")


def test_a_hub_id_in_offline_mode_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match="at revision 'main' is neither"):
        load_model("gpt2", revision="main")


def test_a_hub_id_that_is_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path
) -> None:
    asked: list[tuple[object, ...]] = []

    def cached(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    loaded = load_model("owner/name", revision="v2")
    assert loaded.digest == model_digest(str(saved))
    assert loaded.name == "owner/name"
    assert set(asked) == {("owner/name", "v2", True)}


def test_something_else_in_memory_is_refused() -> None:
    with pytest.raises(ModelError, match="PreTrainedModel with a language model head"):
        from_memory(torch.nn.Linear(2, 2), character_tokenizer())
