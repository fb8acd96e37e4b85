"""How far from the least possible error is each method, for the bits that it takes?

    python -m scripts.rate_distortion

prints the table of docs/explanation/rate-distortion.md: every built-in method that quantizes layer
by layer, at each of its widths, on a Gaussian weight of 256 x 4096 with white inputs. It takes some
minutes. No code whatever can have a mean squared error below 4**-b of the variance with b bits per
weight, so that a method below it has bits that were not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from pytest_qlab.methods.base import Method
from pytest_qlab.methods.registry import _BUILTIN, find_method
from scripts import markdown
from scripts.update_readme import replaced

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics
    from pytest_qlab.formats.base import PackedWeight

ROWS, COLUMNS = 256, 4096
HEAD = ("", "bits per weight", "MSE / variance", "dB above the bound", "bits above the bound")
MOST_METADATA = 1024
WIDTHS = ("bits", "type")
GROUP_SIZES = (32, 128, -1)


class UncountedBitsError(Exception):
    """A weight takes more bits than it says."""


# --- methods -------------------------------------------------------------------------------------


def layerwise_methods() -> dict[str, type[Method]]:
    """The built-in methods that choose the codes of one matrix themselves, by name."""
    kinds = {name: find_method(name) for name in _BUILTIN}
    return {
        name: kind
        for name, kind in kinds.items()
        if kind.import_model is Method.import_model and kind.quantize is not Method.quantize
    }


def variations(kind: type[Method], options: Sequence[str] | None = None) -> list[Method]:
    """The method with its defaults, and with each other choice of one option.

    Args:
        options: those that are varied; all whose choices are known if None.
    """
    found = [kind()]
    for name, field in kind.model_fields.items():
        if options is not None and name not in options:
            continue
        for value in _choices(name, field.annotation):
            try:
                method = kind(**{name: value})
            except ValidationError:  # not with the defaults of the others
                continue
            if method not in found:
                found.append(method)
    return found


def _choices(name: str, annotation: Any) -> list[Any]:
    if name == "group_size":
        return list(GROUP_SIZES)
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for each in get_args(annotation) for value in _choices(name, each)]


# --- rate and distortion -------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Bits per weight, and mean squared error over variance."""

    name: str
    bits: float
    distortion: float

    @property
    def decibels(self) -> float:
        """The error over the least possible one with as many bits."""
        return 10 * math.log10(self.distortion) + 20 * self.bits * math.log10(2)

    @property
    def excess_bits(self) -> float:
        """Bits beyond those that the same error takes at least."""
        return self.bits + math.log2(self.distortion) / 2


def gaussian_source(rows: int, columns: int, seed: int = 0) -> Tensor:
    """float64 (rows, columns), so that rounding it to float32 counts as an error, too."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def statistics_of(inputs: Tensor, rows: int) -> LayerStatistics:
    """What calibration knows of inputs (tokens, n) and of m = `rows` equally sensitive outputs."""
    import torch

    from pytest_qlab.calibration.statistics import ChannelRange, LayerStatistics

    return LayerStatistics(
        tokens=len(inputs),
        channels=ChannelRange(inputs.amin(0), inputs.amax(0), inputs.abs().mean(0)),
        square_sum=inputs.square().sum(0),
        gram=inputs.T @ inputs,
        fisher=torch.ones(rows, inputs.shape[1]),
    )


def measure(method: Method, source: Tensor, statistics: LayerStatistics) -> Point:
    """Quantize a source (m, n), and count.

    Raises:
        UncountedBitsError: what was counted is not all, as far as can be told.
    """
    weight = method.quantize(source.float(), statistics, name="layer").weight
    check_stored(weight)
    error = (weight.dequantize().double() - source).square().mean()
    point = Point(method.id, weight.bits_per_weight, float(error / source.square().mean()))
    if point.distortion < 4**-point.bits:
        raise UncountedBitsError(
            f"{method.id} claims {point.bits:.3f} bits per weight and an error of "
            f"{point.distortion:.3g} of the variance; with that many bits, {4**-point.bits:.3g} is "
            "the least there is. It has bits that are not counted."
        )
    return point


def check_stored(weight: PackedWeight) -> None:
    """See that a weight is what its stored tensors say, and takes the bytes that it says.

    Raises:
        UncountedBitsError: it does not.
    """
    import torch
    from safetensors.torch import load, save

    from pytest_qlab.formats import load_packed

    stored = save(weight.tensors())
    payload = len(stored) - 8 - int.from_bytes(stored[:8], "little")
    # The header of a file is padded to 8 bytes; the tensors are not.
    if weight.nbytes != payload:
        raise UncountedBitsError(f"{payload} bytes are stored, and {weight.nbytes} are counted.")
    metadata = json.dumps(weight.metadata())
    if len(metadata) > MOST_METADATA:
        raise UncountedBitsError(
            f"The metadata take {len(metadata)} bytes, which are not counted; more than "
            f"{MOST_METADATA} belong into tensors."
        )
    again = load_packed(json.loads(metadata), load(stored))
    if not torch.equal(again.dequantize(), weight.dequantize()):
        raise UncountedBitsError("The stored tensors stand for another weight.")


# --- scalar quantizers of a Gaussian --------------------------------------------------------------


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def _below(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def scalar_distortion(levels: Sequence[float]) -> float:
    """Mean squared error of a unit Gaussian rounded to the nearest of some rising levels."""
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    total = 1.0
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        share, moment = _below(high) - _below(low), _density(low) - _density(high)
        total += level * level * share - 2 * level * moment
    return total


@cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels with the least mean squared error for a unit Gaussian."""
    count = 2**bits
    levels = [6 * (index + 0.5) / count - 3 for index in range(count)]
    for _ in range(20_000):
        middle = [(a + b) / 2 for a, b in pairwise(levels)]
        edges = [-math.inf, *middle, math.inf]
        moved = [
            (_density(low) - _density(high)) / (_below(high) - _below(low))
            for low, high in pairwise(edges)
        ]
        change = max(abs(a - b) for a, b in zip(levels, moved, strict=True))
        levels = moved
        if change < 1e-13:
            break
    return tuple(levels)


@cache
def uniform_levels(bits: int) -> tuple[float, ...]:
    """2**bits levels at equal distances around 0, with the best distance for a unit Gaussian."""
    count = 2**bits

    def levels(step: float) -> tuple[float, ...]:
        return tuple(step * (index - (count - 1) / 2) for index in range(count))

    low, high = 0.01, 4.0
    for _ in range(100):
        third = (high - low) / 3
        if scalar_distortion(levels(low + third)) < scalar_distortion(levels(high - third)):
            high -= third
        else:
            low += third
    return levels((low + high) / 2)


def reference_points() -> Iterator[Point]:
    """The best scalar quantizers, whose tables take no bits."""
    for bits in (1, 2, 3, 4):
        yield Point(f"Lloyd-Max, 2^{bits} levels", bits, scalar_distortion(lloyd_max_levels(bits)))
    for bits in (2, 3, 4):
        yield Point(f"uniform, 2^{bits} levels", bits, scalar_distortion(uniform_levels(bits)))


# --- the table -----------------------------------------------------------------------------------


def table(points: Sequence[Point]) -> str:
    """A Markdown table, from few bits to many."""
    rows = [
        [
            point.name,
            f"{point.bits:.3f}",
            f"{point.distortion:.3g}",
            f"{point.decibels:.2f}",
            f"{point.excess_bits:.2f}",
        ]
        for point in sorted(points, key=lambda point: (point.bits, point.distortion))
    ]
    return markdown.table(HEAD, rows)


def report(rows: int, columns: int, names: Sequence[str] = ()) -> str:
    """Both tables, of the scalar quantizers and of the methods."""
    import torch

    source = gaussian_source(rows, columns)
    statistics = statistics_of(math.sqrt(columns) * torch.eye(columns), rows)
    points = []
    for name, kind in layerwise_methods().items():
        if names and name not in names:
            continue
        for method in variations(kind, WIDTHS):
            began = time.perf_counter()
            points.append(measure(method, source, statistics))
            seconds = time.perf_counter() - began
            sys.stderr.write(f"{method.id}: {seconds:.1f} s\n")
    return "\n\n".join(
        [
            "Scalar quantizers of a Gaussian:",
            table(list(reference_points())),
            f"Methods, on a weight of {rows} x {columns}:",
            table(points),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m scripts.rate_distortion", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=ROWS, help="of the weight")
    parser.add_argument("--columns", type=int, default=COLUMNS, help="of the weight")
    parser.add_argument("--methods", nargs="*", default=(), help="names; by default all")
    parser.add_argument("--into", type=Path, help="page whose part `rate-distortion` is rewritten")
    options = parser.parse_args(arguments)
    tables = report(options.rows, options.columns, options.methods)
    sys.stdout.write(f"{tables}\n")
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(replaced(page, "rate-distortion", tables), encoding="utf-8")


if __name__ == "__main__":
    main()
