"""What each layer causes: against plain forwards of models with that layer written in by hand."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pytest_qlab import Lab, Method, QuantizedLayer
from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.data.windows import Window
from pytest_qlab.formats.activations import PerTokenSymmetric
from pytest_qlab.measuring.attribution import (
    SCORED,
    WINDOWS,
    Attribution,
    affordable,
    beginnings,
    runs,
)
from pytest_qlab.methods.awq import Awq
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.models.structure import all_linears
from tests.architectures import ARCHITECTURES, character_tokenizer
from tests.lab.test_gguf import Elsewhere
from tests.lab.tiny import documents, tiny_lab
from tests.measuring.oracle import mean_kl, with_one_layer

FEW: dict[str, Any] = {"max_windows": 3}


class FoldedAndRounded(Awq):
    """AWQ's folds and weights, with inputs rounded per token."""

    name: ClassVar[str] = "folded_rounded"

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        found = super().quantize(weight, statistics, name=name)
        return QuantizedLayer(found.weight, PerTokenSymmetric(4))


class HalfPrecise(Rtn):
    """Keeps all that it does not round in bfloat16."""

    name: ClassVar[str] = "half_precise"
    stored_dtype: ClassVar[str | None] = "bfloat16"


def check_by_hand(lab: Lab, spec: str | Method) -> Attribution:
    """Some layers against the oracle, the whole against the candidate's own evaluation."""
    candidate = lab.candidate(spec)
    found, base, windows = candidate.attribution, lab.base_model, lab.eval_data.windows
    names = [site.name for site in all_linears(base)]
    assert list(found.layers) == names
    assert (found.windows, found.tokens) == (len(windows), lab.eval_data.scored)
    for name in {names[0], names[len(names) // 3], names[2 * len(names) // 3], names[-1]}:
        model = with_one_layer(lab, candidate.checkpoint, name)
        expected = mean_kl(base, model, windows)
        assert found.layers[name] == pytest.approx(expected, rel=2e-3, abs=1e-10), name
    assert found.total == pytest.approx(mean_kl(base, candidate.model, windows), rel=2e-3)
    assert found.total == pytest.approx(float(candidate.kl.mean), rel=1e-4)
    assert found.control == 0
    return found


CASES = [
    ("llama", "gptq:bits=3:group_size=8"),
    ("llama", "static:bits=8:activation_bits=4"),
    ("llama-tied", "awq:bits=3:group_size=8"),
    ("llama-tied", "dynamic:bits=4"),
    ("gpt2", "rtn:bits=4:group_size=8"),
    ("opt", "awq:bits=3:group_size=8"),
    ("opt", "static:bits=8"),
    ("qwen2", "gptq:bits=4:group_size=8"),
    ("qwen3", "awq:bits=4:group_size=8"),
    ("gemma", "awq:bits=3:group_size=8"),
    ("gemma2", "dynamic:bits=3"),
    ("phi", "rtn:bits=3:group_size=8"),
    ("falcon", "dynamic:bits=4"),
    ("mixtral", "gptq:bits=3:group_size=8"),
    ("mixtral", "awq:bits=3:group_size=8"),
]


@pytest.mark.parametrize(("architecture", "spec"), CASES)
def test_is_what_a_model_with_one_layer_says(architecture: str, spec: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture, **FEW)
    found = check_by_hand(lab, spec)
    assert found.resumed
    assert found.rest == 0
    assert not found.embeddings
    if spec.startswith("awq"):
        assert lab.candidate(spec).checkpoint.scales(), "nothing was folded, so nothing was tested"


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_inputs_that_are_rounded_behind_a_fold(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture, **FEW)
    check_by_hand(lab, FoldedAndRounded(bits=4, group_size=8))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_embeddings_of_a_mix_are_parts_of_their_own(architecture: str, tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, architecture, **FEW)
    candidate = lab.candidate("gguf:Q4_0")
    found = check_by_hand(lab, "gguf:Q4_0")
    packed = candidate.checkpoint.embeddings()
    assert set(found.embeddings) == set(packed)
    for name, layer in packed.items():
        model = copy.deepcopy(lab.base_model)
        with torch.no_grad():  # Tied ones are one parameter, so both change.
            model.get_submodule(name).weight.copy_(layer.weight.dequantize())
        expected = mean_kl(lab.base_model, model, lab.eval_data.windows)
        assert found.embeddings[name] == pytest.approx(expected, rel=2e-3)
    assert len(packed) == (1 if architecture == "llama-tied" else 2)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "opt"])
def test_all_other_parameters_are_one_part(architecture: str, tmp_path: Path) -> None:
    """Those of no matrix, tied or not; a bias belongs to its layer."""
    lab = tiny_lab(tmp_path, architecture, **FEW)
    found = lab.candidate(HalfPrecise(bits=4, group_size=8)).attribution
    base, windows = lab.base_model, lab.eval_data.windows
    quantized = {site.name for site in all_linears(base)}
    rest, whole = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in rest.named_parameters():
            if name.rpartition(".")[0] not in quantized:
                parameter.copy_(parameter.bfloat16())
        layers = lab.candidate(HalfPrecise(bits=4, group_size=8)).checkpoint.layers()
        for name, parameter in whole.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            parameter.copy_(parameter.bfloat16() if layer is None else layer.weight.dequantize())
    assert found.rest == pytest.approx(mean_kl(base, rest, windows), rel=5e-3)
    assert found.rest > 0
    assert found.total == pytest.approx(mean_kl(base, whole, windows), rel=2e-3)


def test_an_exact_copy_has_no_parts(tmp_path: Path) -> None:
    found = tiny_lab(tmp_path, **FEW).baseline.attribution
    assert found.sum == found.total == found.control == 0
    assert found.additivity == 1
    assert found.additive
    assert found.largest() == []


def test_a_runtime_of_its_own_is_attributed_by_its_bits_in_torch(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, **FEW)
    ours = lab.candidate("gguf:Q4_0")
    Elsewhere.models[:] = [ours.model]
    assert lab.candidate(Elsewhere(type="Q4_0")).attribution == ours.attribution


def by_hand(**changes: Any) -> Attribution:
    fields: dict[str, Any] = {
        "layers": {"a": 0.3, "b": 0.0, "c": 0.1, "d": 0.2},
        "embeddings": {"e": 0.25},
        "rest": 0.15,
        "total": 0.8,
        "control": 0.0,
        "resumed": True,
        "windows": 8,
        "tokens": 768,
    }
    return Attribution(**{**fields, **changes})


def test_additivity_is_the_sum_over_the_whole() -> None:
    found = by_hand()
    assert found.sum == pytest.approx(1.0)
    assert found.additivity == pytest.approx(1.25)
    assert found.additive == (found.additivity <= 1.25)
    assert not by_hand(total=0.79).additive
    assert not by_hand(total=1.34).additive
    assert by_hand(total=1.0).additive
    assert by_hand(total=0.0).additivity == float("inf")
    assert not by_hand(total=0.0).additive


def test_the_largest_parts_come_first_and_idle_ones_not_at_all() -> None:
    assert by_hand().largest(4) == [
        ("a", 0.3),
        ("e", 0.25),
        ("d", 0.2),
        ("(other parameters)", 0.15),
    ]
    assert [name for name, _ in by_hand().largest(9)][-1] == "c"


def test_is_stored_and_read_without_a_forward(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, **FEW)
    first = lab.candidate("rtn:bits=3:group_size=8").attribution
    again = tiny_lab(tmp_path, **FEW)
    candidate = again.candidate("rtn:bits=3:group_size=8")
    assert candidate.attribution == first
    assert again.forwards == 0
    assert Attribution.from_dict(first.to_dict()) == first


def test_threads_change_nothing(tmp_path: Path) -> None:
    found = [
        tiny_lab(tmp_path / str(threads), threads=threads)
        .candidate("rtn:bits=3:group_size=8")
        .attribution
        for threads in (1, 3)
    ]
    assert found[0] == found[1]


def test_layers_say_it_and_so_does_the_document(tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path, **FEW).candidate("rtn:bits=3:group_size=8")
    assert [row.kl for row in candidate.fragment().layers] == []
    _ = candidate.layers
    assert {row.kl for row in candidate.fragment().layers} == {None}
    assert {each.name: each.kl for each in candidate.layers} == candidate.attribution.layers
    found = candidate.fragment()
    assert {row.name: row.kl for row in found.layers} == candidate.attribution.layers
    assert found.additivity is not None
    assert found.additivity.sum == pytest.approx(sum(row.kl or 0 for row in found.layers))
    assert found.additivity.total == candidate.attribution.total


def test_the_document_knows_the_layers_without_their_errors(tmp_path: Path) -> None:
    candidate = tiny_lab(tmp_path, **FEW).candidate("rtn:bits=3:group_size=8")
    parts = candidate.attribution.layers
    rows = {row.name: row for row in candidate.fragment().layers}
    assert {name: row.kl for name, row in rows.items()} == parts
    for name, layer in candidate.checkpoint.layers().items():
        assert rows[name].shape == layer.weight.shape
        assert rows[name].bits_per_weight == pytest.approx(layer.weight.bits_per_weight)


# Architectures that cannot be resumed


class Chatty(torch.nn.Module):
    """Puts a note into a list that all blocks share, and reads the one of the block before."""

    def __init__(self, block: torch.nn.Module, notes: list[Tensor], first: bool) -> None:
        super().__init__()
        self.block, self.notes, self.first = block, notes, first

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self.block(hidden, *args, **kwargs)
        if self.first:
            self.notes[:] = [hidden.mean()]
            return found
        output = found[0] if isinstance(found, tuple) else found
        output = output + self.note()
        return (output, *found[1:]) if isinstance(found, tuple) else output

    def note(self) -> Tensor:
        return self.notes[0]


class Forgetful(Chatty):
    """Reads the note only once, so that a block that is skipped is missed."""

    def note(self) -> Tensor:
        return self.notes.pop()


@pytest.mark.parametrize("kind", [Chatty, Forgetful])
def test_blocks_that_pass_on_more_are_run_from_the_start(
    kind: type[Chatty], tmp_path: Path
) -> None:
    model = ARCHITECTURES["llama"]()
    notes: list[Tensor] = []
    blocks = model.model.layers
    for index, block in enumerate(list(blocks)):
        blocks[index] = kind(block, notes, first=index == 0)
    lab = Lab(
        model,
        tokenizer=character_tokenizer(),
        evaluation=documents(6, seed=1),
        calibration=documents(8, seed=2),
        window_length=48,
        calibration_length=32,
        threads=1,
        store=tmp_path,
        **FEW,
    )
    found = check_by_hand(lab, "rtn:bits=3:group_size=8")
    assert not found.resumed


# What it takes


@pytest.mark.parametrize(
    ("count", "length", "first"), [(1, 40, 1), (3, 200, 1), (8, 97, 1), (50, 300, 100)]
)
def test_few_windows_are_begun(count: int, length: int, first: int) -> None:
    windows = [Window(n, tuple(range(n, n + length)), first) for n in range(count)]
    found = beginnings(windows)
    assert len(found) == min(count, WINDOWS)
    assert len({each.document for each in found}) == len(found)
    for each in found:
        assert each.scored == min(SCORED, length - first)
        assert each.ids == windows[each.document].ids[: len(each.ids)]
    gaps = {after.document - before.document for before, after in pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_how_many_forwards_it_takes() -> None:
    """Two layers in the first of two blocks run both, one in the second half; and two whole."""
    assert runs([2, 1], windows=4) == 4 * (2 + 0.5 + 2)
    assert runs([3], windows=1) == 5


def test_is_affordable_where_the_evaluation_runs_more_tokens(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path, max_windows=0)
    checkpoint = lab.candidate("rtn:bits=3:group_size=8").checkpoint
    blocks = lab.base_model.config.num_hidden_layers
    per_block = len(all_linears(lab.base_model)) // blocks
    assert blocks == 2
    passes = per_block * 1.0 + per_block * 0.5 + 2
    windows = lab.eval_data.windows
    # All windows are shorter than what is scored of each, so it is a matter of their number.
    ratio = passes * sum(len(each.ids) for each in beginnings(windows))
    ratio /= sum(len(each.ids) for each in windows)
    assert affordable(lab, checkpoint) == (ratio <= 1)
    assert not affordable(lab, checkpoint)
    longer = tiny_lab(tmp_path, max_windows=0, evaluation=documents(60, seed=1), window_length=48)
    assert affordable(longer, checkpoint)
    known = longer.candidate("rtn:bits=3:group_size=8").affordable_attribution()
    assert known is not None
    dear = lab.candidate("rtn:bits=3:group_size=8")
    assert dear.affordable_attribution() is None
    stored = dear.attribution
    reread = tiny_lab(tmp_path, max_windows=0).candidate("rtn:bits=3:group_size=8")
    assert reread.affordable_attribution() == stored
