"""What the project promises of the embedded model: trained, and methods in the order of the papers.

Half of the evaluation windows tell the methods apart; the artefacts are made once for all tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pytest_qlab import Lab
from pytest_qlab.checkpoint import instantiate
from pytest_qlab.models.structure import all_linears, decoder_blocks
from tests.lab.test_lab import Unrounded

pytestmark = pytest.mark.slow
WHEEL_LIMIT = 20e6


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(store=tmp_path_factory.mktemp("store"), max_windows=32, calibration_sequences=24)
    yield lab
    lab.close()


def test_it_is_the_model_that_was_asked_for(lab: Lab) -> None:
    config = lab.base_model.config
    assert type(lab.base_model).__name__ == "LlamaForCausalLM"
    assert (config.hidden_size, config.intermediate_size) == (256, 768)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert 6 <= config.num_hidden_layers <= 8
    assert config.vocab_size == len(lab.tokenizer) == 4096
    assert config.max_position_embeddings == 1024
    assert set(lab.loaded.storage_dtypes.values()) == {torch.bfloat16}
    for site in all_linears(lab.base_model):
        assert site.in_features % 256 == 0
    directory = Path(__file__).parents[2] / "pytest_qlab" / "embedded"
    assert sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) < WHEEL_LIMIT


def test_every_domain_was_learnt(lab: Lab) -> None:
    """Better than the best model without context, fitted to the evaluation text itself."""
    windows = lab.eval_data
    for domain in ("prose", "code", "chat"):
        counts: dict[int, int] = {}
        for window in windows.windows:
            if windows.documents[window.document][1] == domain:
                for token in window.ids[window.first_scored :]:
                    counts[token] = counts.get(token, 0) + 1
        total = sum(counts.values())
        entropy = -sum(n / total * math.log(n / total) for n in counts.values())
        loss = math.log(lab.baseline.domain(domain).perplexity)
        assert loss < 0.8 * entropy, (domain, loss, entropy)


def test_it_writes_sentences(lab: Lab) -> None:
    prompt = lab.tokenizer("Once upon a time, there was a", return_tensors="pt")
    with torch.inference_mode():
        written = lab.base_model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=60,
            do_sample=False,
        )
    text = lab.tokenizer.decode(written[0], skip_special_tokens=True)
    words = text.split()
    assert len(words) > 25
    assert "." in text
    assert len(set(words)) > 12, text


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_and_awq_beat_rounding(lab: Lab, bits: int) -> None:
    rtn, gptq, awq = (lab.candidate(f"{name}:bits={bits}") for name in ("rtn", "gptq", "awq"))
    assert rtn.bits_per_weight == pytest.approx(gptq.bits_per_weight)
    assert rtn.bits_per_weight == pytest.approx(awq.bits_per_weight)
    for better in (gptq, awq):
        assert better.layer_error < rtn.layer_error
        assert better.kl.mean < rtn.kl.mean


def test_the_damage_grows_as_bits_go(lab: Lab) -> None:
    damage = [lab.candidate(f"rtn:bits={bits}").kl.mean for bits in (8, 4, 3, 2)]
    assert damage == sorted(damage)
    assert damage[0] < 0.001
    assert damage[-1] > 30 * damage[1]


def test_eight_bits_are_nearly_lossless(lab: Lab) -> None:
    for spec in ("rtn:bits=8", "gptq:bits=8", "awq:bits=8", "dynamic:bits=8"):
        candidate = lab.candidate(spec)
        assert candidate.top1_agreement > 0.97
        assert abs(candidate.log_perplexity_delta) < 0.005


def test_awq_without_rounding_is_the_same_function(lab: Lab) -> None:
    checkpoint = lab.checkpoint(Unrounded())
    folded = {name for name, scales in checkpoint.scales().items() if "column" in scales}
    blocks = len(decoder_blocks(lab.base_model))
    assert len(folded) == 6 * blocks, "q, k, v, gate, up and down of every block"
    ids = torch.tensor([lab.eval_data.windows[0].ids])
    with torch.inference_mode():
        expected = lab.base_model(input_ids=ids).logits
        found = instantiate(checkpoint, lab.base_model)(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
