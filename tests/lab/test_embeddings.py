"""Methods that quantize the embedding and the head, too: placed, counted and stored as said."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pytest_qlab import Method, QuantizedLayer
from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.checkpoint import MODEL_FILE, place_embeddings
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.kernels.choose import as_computed
from pytest_qlab.kernels.embedding import PackedEmbedding
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.packed import PackedModule, set_materialized
from pytest_qlab.metrics.memory import resident_bytes
from pytest_qlab.models.structure import all_linears
from pytest_qlab.solvers.grid import GridRule, round_to_nearest
from tests.architectures import ARCHITECTURES, token_ids
from tests.lab.test_lab import file_and_header
from tests.lab.tiny import tiny_lab


class Coarse(Method):
    """Rounds every matrix of a model to few bits."""

    name: ClassVar[str] = "coarse"
    stored_dtype: ClassVar[str | None] = "float32"

    bits: int = 4
    embeddings: bool = True

    def assign(self, model: Any) -> dict[str, Method]:
        assigned = super().assign(model)
        if self.embeddings:
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                name = next(n for n, each in model.named_modules() if each is module)
                if module is model.get_input_embeddings() or not _tied(model):
                    assigned[name] = Coarse(bits=8)
        return assigned

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        return QuantizedLayer(round_to_nearest(weight, GridRule(self.bits), 16).pack())


def _tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def rounded(weight: Tensor, bits: int) -> Tensor:
    return round_to_nearest(weight.float(), GridRule(bits), 16).pack().dequantize()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_model_computes_with_the_rounded_matrices(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture)
    candidate = lab.candidate(Coarse())
    oracle: Any = ARCHITECTURES[architecture]()
    tied = _tied(oracle)
    with torch.no_grad():
        oracle.load_state_dict(ARCHITECTURES[architecture]().state_dict())
        embedding, head = oracle.get_input_embeddings(), oracle.get_output_embeddings()
        embedding.weight.copy_(rounded(embedding.weight, 8))
        if not tied:
            head.weight.copy_(rounded(head.weight, 8))
        plain = lab.candidate(Coarse(embeddings=False)).model
        ids = token_ids(16)
        # Blocks with rounded linears from the lab, between the oracle's own embeddings.
        expected = _with_embeddings(plain, embedding.weight, head.weight)(input_ids=ids).logits
        found = candidate.model(input_ids=ids).logits
    assert torch.equal(found, expected)
    for on in (True, False):
        set_materialized(candidate.model, on)
        with torch.no_grad():
            assert torch.equal(candidate.model(input_ids=ids).logits, expected)
    assert 0 < candidate.kl.mean < 1


def _with_embeddings(model: Any, embedding: Tensor, head: Tensor) -> Any:
    model.get_input_embeddings().weight = nn.Parameter(embedding.detach().clone())
    model.get_output_embeddings().weight = nn.Parameter(head.detach().clone())
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_everything_is_counted_once(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture)
    candidate = lab.candidate(Coarse())
    size, header = file_and_header(candidate.checkpoint.directory / MODEL_FILE)
    assert candidate.size == size - header
    weights = {f"{site.name}.weight" for site in all_linears(lab.base_model)}
    embeddings = set(candidate.checkpoint.embeddings())
    assert len(embeddings) == (1 if _tied(lab.base_model) else 2)
    for name, tensor in candidate.checkpoint.others().items():
        assert tensor.dtype == torch.float32
        assert name not in weights
        assert name.removesuffix(".weight") not in embeddings
    plain = lab.candidate(Coarse(embeddings=False))
    assert candidate.bits_per_weight == plain.bits_per_weight, "of the decoder's matrices"
    assert candidate.size < plain.size


def test_a_tied_head_shares_the_packed_bits(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, "gpt2")
    model: Any = lab.candidate(Coarse()).model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    mine, shared = (each.get_buffer("packed_codes") for each in (embedding, head))
    assert mine.data_ptr() == shared.data_ptr()
    others = sum(p.numel() * 4 for p in model.parameters())
    packed = sum(
        tensor.nbytes
        for name, module in model.named_modules()
        if isinstance(module, PackedModule) and module is not head
        for tensor in module.packed.tensors().values()
    )
    biases = sum(
        module.bias.nbytes
        for module in model.modules()
        if isinstance(module, PackedLinear) and module.bias is not None
    )
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if "packed" not in name)
    assert resident_bytes(model) == others + packed + buffers
    assert biases <= buffers


def test_numbers_are_held_once_in_the_type_to_compute_in() -> None:
    """As a table of float32 in a model that computes in bfloat16, whose head is tied to it."""
    model: Any = ARCHITECTURES["gpt2"]()
    weight = model.get_input_embeddings().weight.detach().clone()
    stored = QuantizedLayer(PlainWeight(weight))
    place_embeddings(model, {"transformer.wte": stored}, torch.empty(0, dtype=torch.bfloat16))
    head = as_computed(model.get_output_embeddings())
    assert torch.equal(head.weight, weight.to(torch.bfloat16))
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(token_ids(5)), weight.to(torch.bfloat16)[token_ids(5)])
    assert resident_bytes(nn.ModuleList([embedding, head])) == 2 * weight.numel()


def test_an_embedding_looks_up_rows_of_any_shape() -> None:
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    module = PackedEmbedding(round_to_nearest(weight, GridRule(4), 16).pack(), torch.bfloat16)
    ids = torch.tensor([[3, 3, 0], [11, 5, 3]])
    expected = rounded(weight, 4).to(torch.bfloat16)[ids]
    assert torch.equal(module(ids), expected)
    module.materialize()
    assert torch.equal(module(ids), expected)
    assert "12, 32" in repr(module)
