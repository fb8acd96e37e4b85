"""Forwards that begin at a block give the bits of whole ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_qlab.checkpoint import structural_copy
from pytest_qlab.measuring.resume import Resumable
from tests.architectures import ARCHITECTURES, token_ids


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_continued_forward_is_the_whole_one_to_the_bit(architecture: str) -> None:
    base = ARCHITECTURES[architecture]()
    model = structural_copy(base)
    resumable = Resumable(model)
    windows = [token_ids(24, seed=seed) for seed in (1, 2)]
    whole = [logits(base, ids) for ids in windows]
    states: list[Any] = [None, None]
    for index in range(resumable.count):
        # In turns, so that nothing of one window can serve the other.
        for place, ids in enumerate(windows):
            found = resumable.run(lambda ids=ids: logits(model, ids), index, states[place])  # type: ignore[misc]
            assert torch.equal(found, whole[place])
        states = [
            resumable.boundary(lambda ids=ids: logits(model, ids), index, state)  # type: ignore[misc]
            for ids, state in zip(windows, states, strict=True)
        ]
    assert all(torch.equal(logits(model, ids), w) for ids, w in zip(windows, whole, strict=True))


def test_blocks_before_the_start_do_not_run() -> None:
    model = ARCHITECTURES["llama"]()
    copied = structural_copy(model)
    resumable = Resumable(copied)
    ran: list[int] = []
    for index, block in enumerate(copied.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    ids = token_ids(16)
    state = resumable.boundary(lambda: logits(copied, ids), 0, None)
    assert ran == [0]
    resumable.run(lambda: logits(copied, ids), 1, state)
    assert ran == [0, 1]
    logits(copied, ids)
    assert ran == [0, 1, 0, 1]


def test_a_change_behind_the_start_is_seen_and_one_before_it_is_not() -> None:
    model = ARCHITECTURES["llama"]()
    copied = structural_copy(model)
    resumable = Resumable(copied)
    ids = token_ids(16)
    state = resumable.boundary(lambda: logits(copied, ids), 0, None)
    first, second = copied.model.layers
    first.mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
    assert torch.equal(resumable.run(lambda: logits(copied, ids), 1, state), logits(model, ids))
    first.mlp.down_proj = model.model.layers[0].mlp.down_proj
    second.mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
    found = resumable.run(lambda: logits(copied, ids), 1, state)
    assert torch.equal(found, logits(copied, ids))
    assert not torch.equal(found, logits(model, ids))


def test_threads_do_not_see_each_others_states() -> None:
    model = ARCHITECTURES["llama"]()
    resumable = Resumable(model)
    windows = [token_ids(24, seed=seed) for seed in range(12)]
    whole = [logits(model, ids) for ids in windows]

    def twice(ids: Tensor) -> Tensor:
        state = resumable.boundary(lambda: logits(model, ids), 0, None)
        return resumable.run(lambda: logits(model, ids), 1, state)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(twice, windows))
    assert all(map(torch.equal, found, whole))


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = ARCHITECTURES["llama"]()
    resumable = Resumable(model)
    ids = token_ids(16)
    whole = logits(model, ids)

    def broken() -> Tensor:
        logits(model, ids)
        raise RuntimeError("broken")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            resumable.run(broken, 1, torch.zeros(1, 16, 32))
        assert torch.equal(logits(model, ids), whole)
