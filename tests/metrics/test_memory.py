"""Memory against sums that can be made by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.memory import (
    MemoryUse,
    StorageTracker,
    kv_bytes_per_token,
    peak_temporary_bytes,
    resident_bytes,
    storage_bytes,
)

X = torch.zeros(10, 100)  # 4,000 bytes
W = torch.zeros(100, 100)  # 40,000 bytes


def chain_that_forgets() -> Tensor:
    a = X @ W  # 4,000 alive
    b = a @ W  # 8,000
    del a
    c = b @ W  # 8,000
    del b
    return c @ W  # 8,000


def chain_that_keeps() -> list[Tensor]:
    kept = [X]
    for _ in range(5):
        kept.append(kept[-1] @ W)
    return kept  # 20,000


def views() -> Tensor:
    a = X @ W
    return a.T.reshape(100, 10)[3:7].unsqueeze(0) if a.is_contiguous() else a


def copying_view() -> Tensor:
    return (X @ W).T.contiguous()  # 4,000 and its copy


def in_place() -> Tensor:
    a = X @ W
    a.add_(1).mul_(2)
    a[2:4] = 7
    torch.relu_(a)
    return torch.mm(X, W, out=a)


def two_results() -> tuple[Tensor, Tensor]:
    # 10 float32 and 10 int64
    found = X.max(dim=1)
    return found.values, found.indices


def a_large_one_that_dies() -> Tensor:
    large = torch.ones(1000, 100)  # 400,000
    small = large.sum()  # and 4
    del large
    return small


def inputs_only() -> Tensor:
    return X.view(100, 10)[5:]


@pytest.mark.parametrize(
    ("run", "peak"),
    [
        (chain_that_forgets, 8_000),
        (chain_that_keeps, 20_000),
        (copying_view, 8_000),
        (in_place, 4_000),
        (two_results, 120),
        (a_large_one_that_dies, 400_004),
        (inputs_only, 0),
    ],
)
def test_the_peak_is_what_a_hand_counts(run: Callable[[], object], peak: int) -> None:
    assert peak_temporary_bytes(run) == peak
    assert peak_temporary_bytes(run) == peak


def test_a_view_counts_once() -> None:
    with StorageTracker() as tracker:
        a = X @ W
        shown = [a.T, a[3:7], a.view(100, 10), a.unsqueeze(0)]
        assert tracker.live == 4_000
        del a
        assert tracker.live == 4_000  # the views keep the storage
        del shown
        assert tracker.live == 0
    assert tracker.peak == 4_000


def test_storages_that_change_size_are_followed() -> None:
    with StorageTracker() as tracker:
        a = torch.empty(0)
        a.resize_(100)
        assert tracker.live == 400
        a.resize_(1000)
        assert tracker.live == 4_000
    assert tracker.peak == 4_000


def test_nothing_is_counted_after_the_end() -> None:
    with StorageTracker() as tracker:
        a = X @ W
    b = X @ W
    del a
    assert tracker.live == 4_000
    assert b.shape == (10, 100)


def test_inference_mode_sees_what_an_operation_is_made_of() -> None:
    """Attention by hand keeps a matrix of scores; the composed operation must count it, too."""
    query = torch.zeros(1, 2, 50, 8)
    mask = torch.zeros(50, 50)

    def attention() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    def inferring() -> Tensor:
        with torch.inference_mode():
            return attention()

    scores = 2 * 50 * 50 * 4
    assert peak_temporary_bytes(inferring) >= scores
    linear = nn.Linear(100, 30)
    three = torch.zeros(2, 5, 100)

    def projected() -> object:
        with torch.inference_mode():
            return linear(three)

    assert peak_temporary_bytes(projected) == 2 * 5 * 30 * 4


def test_results_of_a_call_are_unchanged_by_counting() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer(x)
        with StorageTracker() as tracker:
            found = layer(x)
    assert torch.equal(found, expected)
    assert tracker.peak >= found.numel() * 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 20)  # 800 + 80 bytes
        self.tied = nn.Linear(10, 20, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("codes", torch.zeros(50, dtype=torch.uint8))
        self.register_buffer("shown", self.get_buffer("codes")[:10])
        self.register_buffer("nothing", None)


def test_resident_bytes_count_shared_storages_once() -> None:
    assert resident_bytes(Model()) == 800 + 80 + 50
    assert resident_bytes(Model().to("meta")) == 0
    assert resident_bytes(nn.Linear(10, 20).bfloat16()) == 440


def test_a_view_keeps_its_whole_storage_resident() -> None:
    assert storage_bytes(iter([torch.zeros(1000)[:3]])) == 4_000


def test_estimates_of_memory() -> None:
    use = MemoryUse(resident=1000, temporary=300, kv_bytes_per_token=64, convention="512 tokens")
    found = use.estimates("rtn", simulated=True)
    assert {name: float(value) for name, value in found.items()} == {
        "memory.resident": 1000,
        "memory.peak": 1300,
        "memory.kv_per_token": 64,
    }
    assert found["memory.peak"].simulated
    assert not found["memory.resident"].simulated
    assert found["memory.peak"].unit == "bytes"
    assert "memory.kv_per_token" not in MemoryUse(1, 2).estimates()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # Llama-2-7B in 2 bytes: 2 * 32 * 32 * 128 * 2 = 512 KiB, a known number.
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}, 524_288),
        # Llama-3-8B has 8 key-value heads: 128 KiB.
        (
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "hidden_size": 4096,
            },
            131_072,
        ),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 2 * 12 * 12 * 64 * 2),
        # Gemma gives the width of a head, which is not hidden / heads.
        (
            {
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "head_dim": 256,
                "hidden_size": 3072,
            },
            2 * 28 * 16 * 256 * 2,
        ),
        (
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 71,
                "num_kv_heads": 71,
                "multi_query": True,
                "hidden_size": 4544,
            },
            2 * 32 * 64 * 2,
        ),
    ],
)
def test_bytes_of_the_cache(fields: dict[str, object], expected: int) -> None:
    assert kv_bytes_per_token(SimpleNamespace(**fields), itemsize=2) == expected


def test_the_text_part_of_a_configuration_counts() -> None:
    text = SimpleNamespace(n_layer=1, n_head=1, n_embd=8)
    assert kv_bytes_per_token(SimpleNamespace(get_text_config=lambda: text), 4) == 2 * 8 * 4


def test_a_configuration_without_heads_is_refused() -> None:
    with pytest.raises(MetricError, match="names no number of layers"):
        kv_bytes_per_token(SimpleNamespace(num_hidden_layers=3), 2)


def test_what_was_prepared_counts_as_long_as_it_lives() -> None:
    kept: list[Tensor] = []

    def prepare() -> None:
        chain_that_keeps()  # 20,000 bytes, all gone again
        kept.append(X @ W)  # 4,000 that stay

    def run() -> Tensor:
        grown = torch.cat([kept[0], X])  # 8,000 beside the 4,000 that it takes the place of
        kept[0] = grown
        return grown[:1] @ W  # 400 beside the 8,000

    assert peak_temporary_bytes(run, prepare=prepare) == 12_000
    assert peak_temporary_bytes(lambda: X @ W, prepare=lambda: chain_that_keeps()) == 24_000
