"""transformers' continuous batching as a server, on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qlab.engines.continuous_batching import continuous_batching
from pytest_qlab.engines.server import Request
from pytest_qlab.errors import EngineError
from tests.architectures import llama, token_ids

TOKENS = 6


def test_replies_are_whole_timed_and_what_generate_gives() -> None:
    model: Any = llama()
    prompts = [tuple(token_ids(12, seed=seed)[0].tolist()) for seed in range(3)]
    expected = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )[0, 12:].tolist()
        for prompt in prompts
    ]
    generated: dict[str, list[int]] = {}
    before = model.config._attn_implementation
    with continuous_batching(model, requests=2, prompt=12, tokens=TOKENS) as server:
        started = server.now()
        manager = server._manager
        take = manager.get_result

        def noted(**options: Any) -> Any:
            found = take(**options)
            if found is not None:
                generated[found.request_id] = found.generated_tokens
            return found

        manager.get_result = noted
        for number, prompt in enumerate(prompts):
            server.send(Request(number, prompt, TOKENS))
        replies = [server.wait(started + 600) for _ in prompts]
        assert server.wait(started) is None
    assert model.config._attn_implementation == before
    for reply in replies:
        assert reply is not None
        assert reply.error == ""
        assert reply.counts == (1,) * TOKENS
        assert reply.prompt_tokens == 12
        assert started <= reply.sent <= reply.times[0]
        assert list(reply.times) == sorted(reply.times)
    assert [generated[str(number)] for number in range(3)] == expected


def test_a_batch_that_has_ended_is_an_error() -> None:
    with continuous_batching(llama(), requests=1, prompt=4, tokens=2) as server:
        server._manager.stop(block=True, hard_stop=True)
        with pytest.raises(EngineError, match="ended while requests were in flight"):
            server.wait(server.now() + 600)


class Refusing:
    """A model of an architecture that continuous batching does not know."""

    def init_continuous_batching(self, **options: object) -> None:
        raise ValueError("no such attention")


def test_a_model_that_is_refused_is_named_with_a_way_out() -> None:
    with (
        pytest.raises(EngineError, match=r"no such attention Measure\s+quantized\.throughput"),
        continuous_batching(Refusing(), requests=1, prompt=4, tokens=2),
    ):
        pass
