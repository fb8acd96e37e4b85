"""Calibration follows the model: the same inputs as in whole forward passes, block by block."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pytest_qlab.calibration.sources import StoredStatistics, write_statistics
from pytest_qlab.calibration.statistics import Accumulator, LayerStatistics
from pytest_qlab.calibration.stream import BlockStream, capture_calls
from pytest_qlab.errors import MethodError, ModelError
from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.structure import all_linears, decoder_blocks, quantizable_linears
from tests.architectures import ARCHITECTURES, VOCABULARY

LENGTH = 12


def sequences(count: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
    return [list(map(int, row)) for row in drawn]


def build(name: str) -> Any:
    model = ARCHITECTURES[name]()
    unfuse_experts(model)
    return model


def inputs_by_hook(model: Any, ids: list[list[int]]) -> dict[str, list[Tensor]]:
    """The inputs of every linear in plain forward passes: the oracle."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in all_linears(model)}
    handles = [
        site.module.register_forward_pre_hook(
            lambda _module, args, name=site.name: found[name].append(
                args[0].reshape(-1, args[0].shape[-1])
            )
        )
        for site in all_linears(model)
    ]
    with torch.no_grad():
        for each in ids:
            model(input_ids=torch.tensor([each]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("threads", [1, 2])
def test_statistics_are_those_of_whole_forwards(name: str, threads: int, tmp_path: Path) -> None:
    model, ids = build(name), sequences()
    forwards = write_statistics(
        tmp_path, model, ids, gram=True, threads=threads, progress=lambda line: None
    )
    assert forwards == len(ids)
    stored = StoredStatistics(tmp_path)
    expected = inputs_by_hook(model, ids)
    names = []
    for index, (prefix, block) in enumerate(decoder_blocks(model)):
        statistics = stored(index)
        for site in quantizable_linears(block, prefix):
            names.append(site.name)
            seen = expected[site.name]
            x = torch.cat(seen) if seen else torch.zeros(0, site.in_features)
            found = statistics[site.name]
            assert found.tokens == len(x)
            assert found.gram is not None
            torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-4, atol=1e-4)
            if len(x):
                torch.testing.assert_close(found.mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.minimum, x.amin(0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.maximum, x.amax(0), rtol=1e-4, atol=1e-5)
    assert names == [site.name for site in all_linears(model)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_advancing_through_all_blocks_is_the_model(name: str) -> None:
    model, ids = build(name), sequences(2)
    blocks = decoder_blocks(model)
    outputs: list[Tensor] = []
    handle = blocks[-1][1].register_forward_hook(
        lambda _module, _args, output: outputs.append(
            output if isinstance(output, Tensor) else output[0]
        )
    )
    with torch.no_grad():
        for each in ids:
            model(input_ids=torch.tensor([each]), use_cache=False)
    handle.remove()
    stream = BlockStream(model, blocks, ids)
    for index, (_, block) in enumerate(blocks):
        stream.advance(index, block)
    for found, expected in zip(stream._hidden, outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [5, 19])  # shares of one sequence, and of two
def test_results_do_not_depend_on_threads(count: int, tmp_path: Path) -> None:
    model, ids = build("llama"), sequences(count)
    found = []
    for threads in (1, 3):
        directory = tmp_path / str(threads)
        directory.mkdir()
        write_statistics(directory, model, ids, gram=True, threads=threads, progress=print)
        found.append([path.read_bytes() for path in sorted(directory.iterdir())])
    assert found[0] == found[1]


def test_input_groups_of_a_llama_block() -> None:
    model = build("llama")
    for call in capture_calls(model, decoder_blocks(model), sequences()[0]):
        groups = {name.rpartition(".")[2]: number for name, number in call.groups.items()}
        assert groups["q_proj"] == groups["k_proj"] == groups["v_proj"] == 0
        assert groups["gate_proj"] == groups["up_proj"] == 2
        assert groups["o_proj"] == 1
        assert groups["down_proj"] == 3


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_linears_of_one_group_are_those_that_read_the_same_numbers(name: str) -> None:
    model, (ids,) = build(name), sequences(1)
    calls = capture_calls(model, decoder_blocks(model), ids)
    read = inputs_by_hook(model, [ids])
    for call, (prefix, block) in zip(calls, decoder_blocks(model), strict=True):
        sites = quantizable_linears(block, prefix)
        assert {site.name for site in sites} <= set(call.groups)
        for a, b in combinations(sites, 2):
            ran = read[a.name] and read[b.name]
            same = bool(ran) and torch.equal(read[a.name][0], read[b.name][0])
            assert (call.groups[a.name] == call.groups[b.name]) == same, (a.name, b.name)


def test_capturing_calls_runs_every_block_and_no_head() -> None:
    model = build("llama")
    ran: list[str] = []
    for name, module in [*decoder_blocks(model), ("head", model.get_output_embeddings())]:
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    capture_calls(model, decoder_blocks(model), sequences(1)[0])
    assert ran == [name for name, _ in decoder_blocks(model)]


@pytest.mark.parametrize("count", [1, 7, 17, 40])
def test_shares_are_all_hidden_states_in_their_order(count: int) -> None:
    model = build("llama")
    stream = BlockStream(model, decoder_blocks(model), sequences(count))
    shares = list(stream._shares())
    together = [state for share in shares for state in share]
    assert all(a is b for a, b in zip(together, stream._hidden, strict=True))
    assert len(shares) >= min(count, 8)
    assert len({len(share) for share in shares[:-1]}) <= 1


def test_rescaled_statistics_are_those_of_rescaled_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=generator)
    scale = torch.rand(6, generator=generator) + 0.5
    plain, scaled = Accumulator(6, gram=True), Accumulator(6, gram=True)
    plain.add(x)
    scaled.add(x / scale)
    ours, expected = plain.result().rescaled(scale), scaled.result()
    for field in ("minimum", "maximum", "mean_abs", "gram"):
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field))
    again = LayerStatistics.from_tensors(ours.tensors())
    assert again.tokens == 20
    assert again.gram is not None


def test_the_gram_matrix_alone_says_what_channels_sum_up_to_and_no_more() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 6, generator=generator)
    alone, both = (Accumulator(6, gram=True, channels=channels) for channels in (False, True))
    for each in (alone, both):
        for part in x.chunk(3):
            batch = Accumulator(6, gram=True, channels=each is both)
            batch.add(part)
            each.merge(batch)
    found, expected = alone.result(), both.result()
    assert found.tokens == expected.tokens == 20
    assert torch.equal(cast(Tensor, found.gram), cast(Tensor, expected.gram))
    torch.testing.assert_close(found.square_sum, expected.square_sum)
    scaled = found.rescaled(torch.full((6,), 2.0))
    torch.testing.assert_close(scaled.square_sum, expected.square_sum / 4)
    for known in (found, scaled, LayerStatistics.from_tensors(found.tensors())):
        assert known.channels is None
        for name in ("minimum", "maximum", "mean_abs"):
            with pytest.raises(MethodError, match='has "channels" in its `needs`'):
                getattr(known, name)
    with pytest.raises(ValueError, match="only one of the two"):
        alone.merge(both)
    with pytest.raises(ValueError, match="nothing to add up"):
        Accumulator(6, gram=False, channels=False)


def test_an_expert_without_tokens_has_zero_statistics() -> None:
    accumulator = Accumulator(4, gram=True)
    accumulator.add(torch.zeros(0, 4))
    found = accumulator.result()
    assert found.tokens == 0
    assert torch.equal(found.mean_abs, torch.zeros(4))
    assert torch.isfinite(found.minimum).all()


def test_a_block_that_is_called_otherwise_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(2, 2)

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            return torch.as_tensor(self.block(input=torch.zeros(1, 2)))

    odd = Odd()
    with pytest.raises(ModelError, match="hidden_states"):
        capture_calls(odd, [("block", odd.block)], [1, 2])


@pytest.mark.parametrize("features", [1, 95, 97, 200, 1000])
def test_half_of_the_gram_matrix_is_enough(features: int) -> None:
    """Batch by batch and merged, against the product itself in float64."""
    generator = torch.Generator().manual_seed(features)
    batches = [torch.randn(2, 7, features, generator=generator) for _ in range(3)]
    first, second = Accumulator(features, gram=True), Accumulator(features, gram=True)
    first.add(batches[0])
    second.add(batches[1])
    second.add(batches[2])
    total = Accumulator(features, gram=True)
    total.merge(first)
    total.merge(Accumulator(features, gram=True))
    total.merge(second)
    x = torch.cat(batches).reshape(-1, features).double()
    found = total.result()
    assert found.tokens == len(x)
    assert found.gram is not None
    torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.gram, found.gram.T)
    torch.testing.assert_close(found.square_sum.double(), x.square().sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=0)


class Chain(nn.Module):
    """Two linears, the second of which runs a number of times, and what comes after them."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.repeats = repeats
        self.ends = 0

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden)
        for _ in range(self.repeats):
            hidden = torch.tanh(self.second(hidden))
        self.ends += 1
        return hidden


class OneBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.scale = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return torch.as_tensor(self.block(input_ids[..., None] * self.scale))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("repeats", "whole"), [(1, 1), (2, 6)])
def test_a_forward_ends_at_the_last_input_that_is_asked_for(
    repeats: int, whole: int, threads: int
) -> None:
    """Not if a linear runs twice, whose second inputs would be lost."""
    block = Chain(repeats)
    model = OneBlock(block)
    ids = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
    stream = BlockStream(model, [("block", block)], ids, threads=threads)
    block.ends = 0
    sites = quantizable_linears(block, "block")
    found = stream.collect(0, block, sites, gram=True)
    assert whole <= block.ends <= max(whole, threads)
    x = block.first(torch.tensor(ids).reshape(-1, 1) * model.scale)
    seen = [x]
    for _ in range(1, repeats):
        seen.append(torch.tanh(block.second(seen[-1])))
    expected = torch.cat(seen)
    assert found["block.second"].tokens == len(expected)
    gram = found["block.second"].gram
    assert gram is not None
    torch.testing.assert_close(gram, expected.T @ expected)
    before = list(stream._hidden)
    stream.collect(0, block, sites, gram=False, advance=True)
    moved = [model(torch.tensor([each]), use_cache=False) for each in ids]
    assert len(before) == len(ids)
    torch.testing.assert_close(list(stream._hidden), moved)
