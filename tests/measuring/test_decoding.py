"""A token after others: the same logits as in one forward, and a cache that does not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qlab.errors import MetricError
from pytest_qlab.measuring.decoding import Decoding
from tests.architectures import ARCHITECTURES

IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_step_is_the_last_token_of_the_whole(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    with torch.no_grad():
        whole = model(input_ids=IDS).logits[:, -1:]
    decoding = Decoding(model, IDS)
    steps: list[Any] = []
    for _ in range(3):
        decoding.restore()
        steps.append(decoding.step())
        assert steps[-1].past_key_values.get_seq_length() == IDS.shape[1]
        torch.testing.assert_close(steps[-1].logits, whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(steps[0].logits, steps[2].logits)
    assert torch.equal(decoding.last_step().logits, steps[0].logits)  # type: ignore[attr-defined]


def test_without_a_restore_the_cache_would_grow() -> None:
    decoding = Decoding(ARCHITECTURES["llama"](), IDS)
    lengths = []
    for _ in range(2):
        output: Any = decoding.step()
        lengths.append(output.past_key_values.get_seq_length())
    assert lengths == [37, 38]


def test_a_cache_that_is_written_in_place_is_copied() -> None:
    """A static cache has room for more, which a step fills: a shared one would not be as before."""
    from transformers import StaticCache

    model = ARCHITECTURES["llama"]()

    class Static(torch.nn.Module):
        def forward(self, input_ids: Any, use_cache: bool, past_key_values: Any = None) -> Any:
            cache = past_key_values or StaticCache(config=model.config, max_cache_len=50)
            return model(input_ids=input_ids, past_key_values=cache, use_cache=use_cache)

    decoding = Decoding(Static(), IDS)
    for _ in range(2):
        decoding.restore()
        output: Any = decoding.step()
        assert int(output.past_key_values.get_seq_length()) == 37


def test_a_model_without_a_cache_cannot_decode() -> None:
    class Recurrent(torch.nn.Module):
        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            return object()

    with pytest.raises(MetricError, match="A Recurrent returns no key-value cache"):
        Decoding(Recurrent(), IDS)
    with pytest.raises(MetricError, match="One token of text"):
        Decoding(ARCHITECTURES["llama"](), IDS[:, :1])
