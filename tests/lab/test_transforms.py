"""Methods of other people that transform a block: with and without calibration of their own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from pytest_qlab import Method, QuantizedLayer
from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.checkpoint import instantiate
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.methods.base import Statistic, Stream
from pytest_qlab.methods.blocks import BlockContext
from pytest_qlab.methods.rtn import Rtn
from tests.architectures import token_ids
from tests.lab.tiny import tiny_lab


class Moved(Rtn):
    """Scales folded, though nothing is calibrated."""

    name: ClassVar[str] = "moved"

    def transform_block(self, block: BlockContext) -> None:
        for fold in block.folds:
            fold.apply(torch.full((fold.fold.channels,), 4.0))

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        return QuantizedLayer(PlainWeight(weight))


class MovedStream(Moved):
    """The same, on the outputs of quantized blocks."""

    name: ClassVar[str] = "moved_stream"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"channels"})

    @property
    def stream(self) -> Stream:
        return "quantized"


class Listening(Rtn):
    """Writes down what it is told."""

    name: ClassVar[str] = "listening"
    told: ClassVar[list[LayerStatistics]] = []

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        assert statistics is not None
        self.told.append(statistics)
        return super().quantize(weight, statistics, name=name)


@pytest.mark.parametrize(
    ("needs", "gram", "channels"),
    [
        ({"gram"}, True, False),
        ({"channels"}, False, True),
        ({"channels", "gram"}, True, True),
        ({"fisher"}, False, True),
        ({"fisher", "gram"}, True, True),
    ],
)
@pytest.mark.parametrize("where", ["original", "quantized"])
def test_a_method_is_told_what_it_needs(
    where: Stream, needs: set[Statistic], gram: bool, channels: bool, tmp_path: Path
) -> None:
    class Mine(Listening):
        needs: ClassVar[frozenset[Statistic]] = frozenset()

        @property
        def stream(self) -> Stream:
            return where

    Mine.needs, Mine.told = frozenset(needs), []
    lab = tiny_lab(tmp_path)
    layers = lab.checkpoint(Mine()).layers()
    assert len(Mine.told) == len(layers)
    for known in Mine.told:
        assert known.gram is not None or not gram
        assert (known.channels is not None) == channels
        assert (known.fisher is not None) == ("fisher" in needs)
        if channels:
            assert bool((known.maximum >= known.minimum).all())


@pytest.mark.parametrize("method", [Moved(), MovedStream()])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_every_stream_can_transform(
    architecture: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Calibration sequences are longer than what folds are traced on.
    monkeypatch.setattr("pytest_qlab.methods.pipeline.TRACE_TOKENS", 8)
    lab = tiny_lab(tmp_path, architecture)
    checkpoint = lab.checkpoint(method)
    assert checkpoint.scales()
    ids = token_ids(24)
    with torch.no_grad():
        expected = lab.base_model(input_ids=ids).logits
        found = instantiate(checkpoint, lab.base_model)(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
