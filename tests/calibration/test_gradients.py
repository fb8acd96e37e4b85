"""Squared gradients: those of a loop over sequences, and those of finite differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pytest_qlab.calibration import gradients as gradients_module
from pytest_qlab.calibration.gradients import StoredGradients, WithGradients, write_gradients
from pytest_qlab.calibration.sources import StoredStatistics, write_statistics
from pytest_qlab.calibration.statistics import Accumulator, LayerStatistics
from pytest_qlab.errors import MethodError
from pytest_qlab.methods.awq import Awq
from pytest_qlab.methods.base import Method, QuantizedLayer, Statistic
from pytest_qlab.methods.blocks import FoldContext, LayerContext
from pytest_qlab.methods.gptq import Gptq
from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.structure import all_linears, decoder_blocks, quantizable_linears
from tests.architectures import ARCHITECTURES, VOCABULARY
from tests.lab.tiny import tiny_lab


def build(name: str) -> Any:
    model = ARCHITECTURES[name]()
    unfuse_experts(model)
    return model


def sequences(count: int = 3, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


def written(model: nn.Module, ids: list[list[int]], directory: Path, threads: int = 1) -> Any:
    directory.mkdir(exist_ok=True)
    count = write_gradients(directory, model, ids, threads=threads, progress=lambda line: None)
    assert count == len(ids)
    stored = StoredGradients(directory)
    blocks = range(len(decoder_blocks(model)))
    return {name: found for index in blocks for name, found in stored(index).items()}


def loss_of(model: Any, ids: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return cross_entropy(logits[:-1], torch.tensor(ids[1:]))


def by_backward(model: Any, ids: list[list[int]]) -> dict[str, Tensor]:
    """One backward pass for each sequence into `.grad`; (out_features, in_features)."""
    sites = all_linears(model)
    found = {site.name: torch.zeros(site.out_features, site.in_features) for site in sites}
    model.requires_grad_(True)
    for each in ids:
        model.zero_grad()
        torch.autograd.backward(loss_of(model, each))
        for site in sites:
            if site.stored.grad is not None:
                grad = site.stored.grad.t() if site.transposed else site.stored.grad
                found[site.name] += grad**2
    model.zero_grad()
    model.requires_grad_(False)
    return found


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_they_are_those_of_a_backward_for_each_sequence(name: str, tmp_path: Path) -> None:
    model, ids = build(name), sequences()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = written(model, ids, tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    expected = by_backward(model, ids)
    assert list(expected) == [site.name for site in all_linears(model)]
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-9)


def test_they_are_finite_differences_squared_for_each_sequence(tmp_path: Path) -> None:
    # GPT-2 computes its norms in the dtype that it has.
    model, ids = build("gpt2").double(), sequences(2)
    found = written(model, ids, tmp_path)
    step = 1e-5
    for site in all_linears(model)[::3]:
        for i, j in ((0, 0), (3, 7)):
            total = 0.0
            for each in ids:
                losses = []
                for sign in (1, -1):
                    weight = site.stored.detach()
                    weight = weight.t() if site.transposed else weight
                    kept = weight[i, j].item()
                    weight[i, j] = kept + sign * step
                    with torch.no_grad():
                        losses.append(float(loss_of(model, each)))
                    weight[i, j] = kept
                total += ((losses[0] - losses[1]) / (2 * step)) ** 2
            assert float(found[site.name][i, j]) == pytest.approx(total, rel=1e-3, abs=1e-12)


def test_gradients_are_squared_for_each_sequence_and_not_added_first(tmp_path: Path) -> None:
    model, ids = build("llama"), sequences(1)
    one = written(model, ids, tmp_path / "1")
    three = written(model, ids * 3, tmp_path / "3")
    for name, value in one.items():
        torch.testing.assert_close(three[name], 3 * value)


def test_results_do_not_depend_on_threads(tmp_path: Path) -> None:
    model, ids = build("mixtral"), sequences(5)
    found = []
    for threads in (1, 2, 3):
        directory = tmp_path / str(threads)
        written(model, ids, directory, threads)
        found.append([path.read_bytes() for path in sorted(directory.iterdir())])
    assert found[0] == found[1] == found[2]


def test_short_memory_runs_fewer_sequences_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    lines: list[str] = []
    weights = sum(8 * site.stored.numel() for site in all_linears(model))
    for copies, steps in ((100, 2), (4, 3), (0, 6)):
        monkeypatch.setattr(gradients_module, "available_memory", lambda n=copies: n * weights)
        lines.clear()
        write_gradients(tmp_path, model, sequences(6), threads=3, progress=lines.append)
        assert len(lines) == steps


def test_an_expert_that_no_token_reaches_has_none(tmp_path: Path) -> None:
    model, ids = build("mixtral"), sequences(1, 2)
    found = written(model, ids, tmp_path)
    sums = {name: float(value.sum()) for name, value in found.items() if "experts" in name}
    assert 0 in sums.values()
    assert max(sums.values()) > 0


def test_they_work_inside_inference_mode(tmp_path: Path) -> None:
    model, ids = build("gpt2"), sequences(2)
    expected = written(model, ids, tmp_path / "out")
    with torch.inference_mode():
        found = written(model, ids, tmp_path / "in")
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_requires_grad_is_put_back_even_after_a_failure(tmp_path: Path) -> None:
    model = build("llama")
    model.lm_head.requires_grad_(True)
    before = [p.requires_grad for p in model.parameters()]
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(MethodError, match=r"gradients of model\.layers\.0.* not finite"):
        written(model, sequences(1), tmp_path)
    assert [p.requires_grad for p in model.parameters()] == before


def test_a_model_without_gradients_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    forward = model.forward
    model.forward = torch.no_grad()(forward)
    with pytest.raises(MethodError, match="LlamaForCausalLM cannot be computed"):
        written(model, sequences(1), tmp_path)


@pytest.mark.parametrize("ids", [[], [[5]]])
def test_too_little_text_is_refused(ids: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="at least 2 tokens"):
        written(build("llama"), ids, tmp_path)


def test_float16_does_not_lose_small_gradients(tmp_path: Path) -> None:
    exact = written(build("llama"), sequences(2), tmp_path / "32")
    half = written(build("llama").half(), sequences(2), tmp_path / "16")
    for name, value in exact.items():
        difference = (half[name].sqrt() - value.sqrt()).norm() / value.sqrt().norm()
        assert float(difference) < 0.02


def test_a_source_of_statistics_takes_them_along(tmp_path: Path) -> None:
    model, ids = build("mixtral"), sequences(2)
    expected = written(model, ids, tmp_path / "gradients")
    (tmp_path / "statistics").mkdir()
    write_statistics(
        tmp_path / "statistics", model, ids, gram=False, threads=1, progress=lambda line: None
    )
    plain = StoredStatistics(tmp_path / "statistics")
    both = WithGradients(plain, StoredGradients(tmp_path / "gradients"))
    for index in range(len(decoder_blocks(model))):
        for name, known in both(index).items():
            assert known.tokens == plain(index)[name].tokens
            if name in expected:
                assert known.fisher is not None
                assert torch.equal(known.fisher, expected[name])
            else:  # a router
                assert known.fisher is None


seen: dict[str, LayerStatistics] = {}


class Watching(Gptq):
    """Keeps the statistics that it is given, those of a stream of quantized blocks."""

    name: ClassVar[str] = "watching"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"gram", "fisher"})

    def quantize_shared(
        self, weights: Mapping[str, Tensor], statistics: LayerStatistics | None
    ) -> list[QuantizedLayer]:
        assert statistics is not None
        seen.update(dict.fromkeys(weights, statistics))
        return super().quantize_shared(weights, statistics)


class Scaling(Awq):
    """Keeps the statistics that it is given, those of the original model after folds."""

    name: ClassVar[str] = "scaling"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels", "gram", "fisher"})

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        assert statistics is not None
        seen[name] = statistics
        return super().quantize(weight, statistics, name=name)


@pytest.mark.parametrize("method", [Watching(), Scaling(bits=3)], ids=lambda method: method.name)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_layer_is_given_its_own(method: Method, architecture: str, tmp_path: Path) -> None:
    """On the stream of quantized blocks, too; and changed by folds as the weights are."""
    seen.clear()
    lab = tiny_lab(tmp_path, architecture)
    scales = lab.checkpoint(method).scales()
    assert bool(scales) == (method.name == "scaling")
    gradients = lab.gradients()
    for index, (name, block) in enumerate(decoder_blocks(lab.base_model)):
        for site in quantizable_linears(block, name):
            expected = gradients(index)[site.name]
            folds = scales.get(site.name, {})
            if "column" in folds:
                expected = expected / folds["column"] ** 2
            if "row" in folds:
                expected = expected * folds["row"][:, None] ** 2
            given = seen.pop(site.name)
            assert given.gram is not None
            assert given.fisher is not None
            torch.testing.assert_close(given.fisher, expected)
    assert not seen


def test_they_follow_a_fold() -> None:
    """Two layers, the second scaled, the first divided: against gradients of what they are then."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    second = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    scale = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5

    def squares(a: Tensor, b: Tensor) -> list[Tensor]:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        return [g**2 for g in torch.autograd.grad(((x @ a.T) @ b.T).tanh().sum(), (a, b))]

    before = squares(first, second)
    after = squares(first / scale[:, None], second * scale)

    def context(name: str, columns: int, fisher: Tensor) -> LayerContext:
        accumulator = Accumulator(columns, gram=False)
        accumulator.add(torch.ones(2, columns))
        known = replace(accumulator.result(), fisher=fisher)
        return LayerContext(name, object(), known)  # type: ignore[arg-type]

    class Fold:
        def apply(self, scale: Tensor) -> None:
            """The weights are not looked at."""

    layers = [context("first", 4, before[0]), context("second", 6, before[1])]
    FoldContext(Fold(), [layers[1]], layers[0]).apply(scale)  # type: ignore[arg-type]
    for layer, expected in zip(layers, after, strict=True):
        assert layer.statistics is not None
        assert layer.statistics.fisher is not None
        torch.testing.assert_close(layer.statistics.fisher, expected)
