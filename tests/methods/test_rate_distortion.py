"""No method beats the rate-distortion bound: all bits are counted. Who hides some is found."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.formats import AffineGroups, register_format
from pytest_qlab.formats import base as formats_base
from pytest_qlab.methods.base import Method, QuantizedLayer
from pytest_qlab.methods.registry import _BUILTIN
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.methods.squeezellm import SqueezeLlm
from scripts.rate_distortion import (
    Point,
    UncountedBitsError,
    gaussian_source,
    layerwise_methods,
    lloyd_max_levels,
    main,
    measure,
    reference_points,
    scalar_distortion,
    statistics_of,
    table,
    uniform_levels,
    variations,
)

ROWS, COLUMNS = 256, 512
METHODS = [method for kind in layerwise_methods().values() for method in variations(kind)]


@pytest.fixture(scope="module")
def source() -> Tensor:
    return gaussian_source(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def statistics() -> LayerStatistics:
    generator = torch.Generator().manual_seed(1)
    return statistics_of(torch.randn(4 * COLUMNS, COLUMNS, generator=generator), ROWS)


def test_only_methods_that_bring_finished_bits_are_left_out() -> None:
    assert set(_BUILTIN) - set(layerwise_methods()) == {"gguf", "gguf_file", "llamacpp"}


def test_every_choice_of_every_method_is_held_to_the_bound() -> None:
    ids = {method.id for method in METHODS}
    assert len(ids) == len(METHODS)
    assert {"rtn-w4g128", "rtn-w2g128", "rtn-w4g32", "rtn-w4-channel", "rtn-w4g128-mse"} <= ids
    assert {"ggml-Q2_K", "ggml-F32", "ggml-Q4_K-imatrix", "squeezellm-w3"} <= ids


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.id)
def test_no_method_beats_the_bound(
    method: Method, source: Tensor, statistics: LayerStatistics
) -> None:
    point = measure(method, source, statistics)
    assert point.distortion >= 4**-point.bits
    assert point.decibels >= 0
    assert point.excess_bits >= 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_table_for_each_row_comes_close_to_lloyd_max(bits: Any) -> None:
    """Fitted to the 4096 weights of a row it is a little better."""
    statistics = statistics_of(torch.ones(1, 4096), 32)
    point = measure(SqueezeLlm(bits=bits), gaussian_source(32, 4096), statistics)
    least = scalar_distortion(lloyd_max_levels(bits))
    assert 0.94 * least < point.distortion < 1.015 * least


@register_format
class HalfCounted(AffineGroups):
    """Says that it takes half of the bytes."""

    format: ClassVar[str] = "test-half-counted"

    @property
    def nbytes(self) -> int:
        return super().nbytes // 2


@register_format
class Remembered(AffineGroups):
    """Leaves its scales out of what is stored and keeps them in memory."""

    format: ClassVar[str] = "test-remembered"

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "scales": torch.ones_like(self.scales)}


@register_format
class InMetadata(AffineGroups):
    """Keeps its codes in the metadata."""

    format: ClassVar[str] = "test-in-metadata"

    def tensors(self) -> dict[str, Tensor]:
        return {name: each for name, each in super().tensors().items() if name != "codes"}

    def metadata(self) -> dict[str, Any]:
        codes = base64.b64encode(self._codes.numpy().tobytes()).decode()
        return {**super().metadata(), "codes": codes, "width": self._codes.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        raw = bytearray(base64.b64decode(metadata["codes"]))
        codes = torch.frombuffer(raw, dtype=torch.uint8).view(-1, metadata["width"])
        return super().from_tensors({**tensors, "codes": codes}, metadata)


@register_format
class FromNowhere(AffineGroups):
    """Stores no codes, and finds them again where nobody looks: only the bound can tell."""

    format: ClassVar[str] = "test-from-nowhere"
    hidden: ClassVar[dict[int, Tensor]] = {}

    def tensors(self) -> dict[str, Tensor]:
        self.hidden[0] = self._codes
        return {name: each for name, each in super().tensors().items() if name != "codes"}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        return super().from_tensors({**tensors, "codes": cls.hidden[0]}, metadata)


class Cheat(Rtn):
    """Rounds to nearest, into a format that hides bits."""

    name: ClassVar[str] = "cheat"
    into: ClassVar[type[AffineGroups]] = AffineGroups

    def quantize(
        self, weight: Tensor, statistics: LayerStatistics | None, *, name: str = ""
    ) -> QuantizedLayer:
        honest = super().quantize(weight, statistics, name=name).weight
        assert isinstance(honest, AffineGroups)
        return QuantizedLayer(
            self.into(
                honest._codes,
                honest.scales,
                honest._zeros,
                shape=honest.shape,
                bits=honest.bits,
                group_size=honest.group_size,
            )
        )


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (HalfCounted, "are counted"),
        (Remembered, "another weight"),
        (InMetadata, "metadata take"),
        (FromNowhere, r"cheat-w4g128 claims 0\.156 bits .* not counted"),
    ],
)
def test_hidden_bits_are_found(
    into: type[AffineGroups],
    message: str,
    source: Tensor,
    statistics: LayerStatistics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cheat, "into", AffineGroups)
    assert measure(Cheat(), source, statistics).bits == 4 + 20 / 128
    monkeypatch.setattr(Cheat, "into", into)
    with pytest.raises(UncountedBitsError, match=message):
        measure(Cheat(), source, statistics)


@pytest.fixture(autouse=True, scope="module")
def no_formats_stay_behind() -> Any:
    yield
    for name in [name for name in formats_base._formats if name.startswith("test-")]:
        del formats_base._formats[name]


@pytest.mark.parametrize(
    ("bits", "lloyd_max", "uniform", "step"),
    [
        (1, 0.36338, 0.36338, 1.5958),
        (2, 0.11748, 0.11885, 0.9957),
        (3, 0.03454, 0.03744, 0.5860),
        (4, 0.009497, 0.01154, 0.3352),
    ],
)
def test_scalar_quantizers_are_those_of_the_tables(
    bits: int, lloyd_max: float, uniform: float, step: float
) -> None:
    """Max, "Quantizing for minimum distortion", 1960, tables I and II."""
    assert scalar_distortion(lloyd_max_levels(bits)) == pytest.approx(lloyd_max, rel=5e-4)
    levels = uniform_levels(bits)
    assert scalar_distortion(levels) == pytest.approx(uniform, rel=5e-4)
    assert levels[1] - levels[0] == pytest.approx(step, abs=1e-3)


def test_scalar_distortion_is_that_of_a_sample() -> None:
    levels = torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64)
    sample = gaussian_source(1000, 1000)
    nearest = levels[(sample.unsqueeze(-1) - levels).abs().argmin(-1)]
    found = float((sample - nearest).square().mean())
    assert scalar_distortion(levels.tolist()) == pytest.approx(found, rel=0.01)


def test_the_command_writes_its_tables_into_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rate-distortion -->\nold\n<!-- /rate-distortion -->\nafter\n")
    main(["--rows=8", "--columns=64", "--methods", "rtn", f"--into={page}"])
    printed = capsys.readouterr().out
    assert page.read_text().startswith("before\n<!-- rate-distortion -->\nScalar quantizers")
    assert page.read_text().endswith("|\n<!-- /rate-distortion -->\nafter\n")
    assert printed.strip() in page.read_text()
    rows = [line for line in printed.splitlines() if line.startswith("| rtn")]
    # Rows are one group of 64; 20 bits for its scale and zero point, padded to 24.
    assert [row.split("|")[2].strip() for row in rows] == ["2.375", "3.375", "4.375", "8.375"]


def test_distances_from_the_bound() -> None:
    point = Point("at twice the bound", 3, 2 * 4**-3)
    assert point.decibels == pytest.approx(3.0103, abs=1e-4)
    assert point.excess_bits == pytest.approx(0.5)
    assert "| at twice the bound | 3.000 | 0.0312 | 3.01 | 0.50 |" in table([point])
    assert all(point.excess_bits > 0 for point in reference_points())
