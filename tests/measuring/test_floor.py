"""The noise floor: measured as is said, once, lazily; budgets below it are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pytest_qlab import Estimate, Lab
from pytest_qlab.errors import MetricError
from pytest_qlab.measuring.floor import MOST_NATS, WINDOWS, NoiseFloor
from tests.architectures import ARCHITECTURES, character_tokenizer
from tests.lab.tiny import documents, tiny_lab
from tests.measuring.oracle import naive_kl

METHOD = "rtn:bits=3:group_size=8"


def built(lab: Lab, kind: str) -> int:
    return sum(count for name, count in lab.store.built.items() if name.startswith(f"{kind}/"))


def in_two_pieces(model: Any, ids: Tensor) -> Tensor:
    """Logits of a Llama, from hidden states of two forwards that share a cache."""
    half = ids.shape[1] // 2
    with torch.no_grad():
        first = model.model(input_ids=ids[:, :half], use_cache=True)
        second = model.model(
            input_ids=ids[:, half:], past_key_values=first.past_key_values, use_cache=True
        )
        hidden = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    logits: Tensor = hidden[0].float() @ model.lm_head.weight.float().T
    return logits


def at_once(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits: Tensor = hidden[0].float() @ model.lm_head.weight.float().T
    return logits


@pytest.mark.parametrize("most", [5, 60])
def test_is_the_model_with_its_cache_against_itself(most: int, tmp_path: Path) -> None:
    """In bfloat16, where the difference is large enough to be known to three digits."""
    lab = tiny_lab(tmp_path, dtype="bfloat16", max_windows=most, evaluation=documents(20, seed=1))
    floor, windows = lab.noise_floor, lab.windows_of(0)
    count = min(len(windows), WINDOWS)
    chosen = [windows[int((place + 0.5) * len(windows) / count)] for place in range(count)]
    found = []
    for window in chosen:
        ids = torch.tensor([window.ids])
        rows = slice(window.first_scored - 1, len(window.ids) - 1)
        pair = at_once(lab.base_model, ids)[rows], in_two_pieces(lab.base_model, ids)[rows]
        found.append(naive_kl(*pair))
    kl = np.sort(torch.cat(found).numpy())
    assert floor.path == "base model prefilled in two pieces"
    assert floor.windows == count
    assert floor.mean == pytest.approx(kl.mean(), rel=1e-3)
    assert floor.max == pytest.approx(kl[-1], rel=1e-3)
    assert floor.p99 == pytest.approx(kl[int(np.ceil(0.99 * len(kl))) - 1], rel=1e-3)
    assert floor.median == pytest.approx(kl[int(np.ceil(0.5 * len(kl))) - 1], rel=1e-3, abs=1e-9)
    assert 0 < floor.mean < 1e-2


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_layout_has_one_that_is_rounding(architecture: str, tmp_path: Path) -> None:
    floor = tiny_lab(tmp_path, architecture, max_windows=3).noise_floor
    assert floor.path
    assert 0 <= floor.median <= floor.p99 <= floor.max < 1e-8


def test_a_candidates_kl_carries_it_and_nothing_else_does(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, evaluation=[*documents(3, seed=1), *in_code(3)])
    candidate, floor = lab.candidate(METHOD), lab.noise_floor
    expected = {f"kl.{name}": getattr(floor, name) for name in ("mean", "median", "p99", "max")}
    found = candidate.fidelity.estimates()
    assert "kl.mean[code]" in found
    for name, estimate in found.items():
        assert estimate.floor == expected.get(name.partition("[")[0]), name
    measures = candidate.fragment().measures
    assert measures["kl.mean"].floor == floor.mean
    assert lab.describe()["evaluation"]["noise_floor"] == floor.to_dict()


def in_code(count: int) -> list[Any]:
    return [
        type(each)(f"code-{n}", "code", each.text)
        for n, each in enumerate(documents(count, seed=7))
    ]


def test_an_exact_copy_has_none_and_measures_none(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    kl = lab.baseline.kl
    assert kl.mean.floor is kl.p99.floor is None
    assert kl.mean <= 0
    assert not kl.mean < 0
    assert kl.mean.within(0)
    assert built(lab, "noise_floor") == 0
    assert "noise_floor" not in lab.describe()["evaluation"]


def test_is_measured_once_and_only_if_damage_is(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    _ = lab.candidate(METHOD).compression_ratio
    assert built(lab, "noise_floor") == 0
    assert lab.candidate(METHOD).kl.mean > 0
    assert built(lab, "noise_floor") == 1
    assert lab.candidate("rtn:bits=2:group_size=8").kl.mean > 0
    assert built(lab, "noise_floor") == 1
    again = tiny_lab(tmp_path)
    assert again.candidate(METHOD).kl.mean.floor == lab.noise_floor.mean
    assert again.forwards == 0


def test_a_careful_assertion_that_stops_early_runs_no_window_for_it(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, evaluation=documents(40, seed=1), max_windows=64)
    assert len(lab.looks) > 1
    assert lab.candidate(METHOD).kl.mean.within(5.0).looks == 1
    assert built(lab, "noise_floor") == 1
    assert built(lab, "reference") == 1


# Budgets


def kl_of(value: float, floor: float | None, metric: str = "kl.mean") -> Estimate:
    return Estimate(value, metric=metric, candidate="rtn", n=100, clusters=5, floor=floor)


BELOW: dict[str, Callable[[Estimate, float], object]] = {
    "less": lambda kl, budget: kl < budget,
    "at most": lambda kl, budget: kl <= budget,
    "mirrored": lambda kl, budget: budget > kl,
    "mirrored at least": lambda kl, budget: budget >= kl,
    "distance": lambda kl, budget: abs(kl) < budget,
}


@pytest.mark.parametrize("hold", BELOW.values(), ids=BELOW)
@pytest.mark.parametrize("metric", ["kl.mean", "kl.p99", "kl.mean[code]"])
def test_a_budget_below_twice_the_floor_is_refused(
    metric: str, hold: Callable[[Estimate, float], object]
) -> None:
    kl = kl_of(0.5, 0.001, metric)
    for budget in (0.0019999, 0.001, 0, -1):
        with pytest.raises(MetricError) as caught:
            hold(kl, budget)
        assert f"budget of {budget:.4g}" in str(caught.value)
        assert "is 0.001," in str(caught.value)
        assert metric in str(caught.value)
    assert not hold(kl, 0.002)
    assert hold(kl, 0.6)


def test_what_is_no_budget_on_it_is_not_refused() -> None:
    kl = kl_of(0.0005, 0.001)
    assert kl > 0
    assert kl >= 0.0001
    assert kl != 0
    assert kl < kl_of(0.0006, 0.001)
    assert kl <= kl_of(0.0006, None)
    assert kl_of(0.0005, None) < 0.001
    assert kl_of(0.0, 0.0) <= 0


def test_a_careful_budget_is_refused_as_well(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, dtype="bfloat16")
    candidate, floor = lab.candidate(METHOD), lab.noise_floor.mean
    assert floor > 1e-7
    for refused in (
        lambda: candidate.kl.mean.within(1.9 * floor),
        lambda: candidate["kl.mean"].within(1.9 * floor),
        lambda: candidate.fidelity.kl.mean.within(1.9 * floor),
        lambda: candidate.kl.mean < 1.9 * floor,
    ):
        with pytest.raises(MetricError, match="noise floor") as caught:
            refused()
        assert f"{1.9 * floor:.4g}" in str(caught.value)
        assert f"{floor:.4g}" in str(caught.value)
    assert not candidate.kl.mean.within(2.1 * floor)


# Models that cannot be run in every way


class NoCache(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Forgets what it has seen: with a cache, it is another function."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["past_key_values"] = None
        return super().forward(*args, **kwargs)


class OneWay(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Runs one sequence at a time, and without a cache."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 1 or kwargs.get("use_cache"):
            raise NotImplementedError("one sequence at a time")
        return super().forward(input_ids=input_ids, **kwargs)


def lab_of(kind: type[LlamaForCausalLM], store: Path) -> Lab:
    model = ARCHITECTURES["llama"]()
    model.__class__ = kind
    return Lab(
        model,
        tokenizer=character_tokenizer(),
        evaluation=documents(6, seed=1),
        calibration=documents(8, seed=2),
        window_length=48,
        calibration_length=32,
        threads=2,
        store=store,
    )


def test_a_cache_that_does_not_work_is_no_noise(tmp_path: Path) -> None:
    lab = lab_of(NoCache, tmp_path)
    window = lab.windows_of(0)[0]
    ids = torch.tensor([window.ids])
    with torch.no_grad():
        half = ids.shape[1] // 2
        alone = lab.base_model(input_ids=ids[:, half:]).logits[0]
        whole = lab.base_model(input_ids=ids).logits[0, half:]
    assert float(naive_kl(whole, alone).mean()) > MOST_NATS
    assert lab.noise_floor.path == "base model in a batch of two"
    assert lab.noise_floor.max < 1e-8


def test_a_model_that_runs_in_one_way_has_none_and_refuses_nothing(tmp_path: Path) -> None:
    lab = lab_of(OneWay, tmp_path)
    candidate = lab.candidate(METHOD)
    assert candidate.kl.mean.floor is None
    assert not candidate.kl.mean < 1e-12
    assert not candidate.kl.mean.within(1e-12)
    count = lab.noise_floor.windows
    assert lab.noise_floor == NoiseFloor(0.0, 0.0, 0.0, 0.0, "", count)
    assert lab.noise_floor.by_metric == {}
