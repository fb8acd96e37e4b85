"""Which kernel runs a packed layer: the one made for its format, if it proves itself; else none.

A kernel is used only after its products were compared, on the actual weight, with dequantizing and
multiplying in float32. What it may differ by comes from bfloat16, whose rounding error is at most
u = 2**-8, relative: the kernel rounds scales, zero points and outputs to it, each once. `TOLERANCE`
is 8 u in any output channel, relative to the channel's size: rounding takes 1 to 2 u on weights
as they are, and more where most weights of a group are small beside its zero point. A single group
of wrong codes among the G of a row makes about sqrt(2 / G), which is above 0.1 up to G = 200.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_qlab.errors import CorruptEntryError, StoreError
from pytest_qlab.finite import is_finite
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.kernels.crossover import crossover, slowdown
from pytest_qlab.kernels.fp4 import Mxfp4CudaLinear, Nvfp4CudaLinear
from pytest_qlab.kernels.fp8 import Float8CudaLinear
from pytest_qlab.kernels.int4 import Int4CpuLinear, Int4CudaLinear
from pytest_qlab.kernels.int8 import Int8Linear
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import CrossedLinear, KernelLinear
from pytest_qlab.kernels.w8a8 import W8A8CpuLinear, W8A8CudaLinear

KERNELS: tuple[type[KernelLinear], ...] = (
    Int4CpuLinear,
    Int4CudaLinear,
    Int8Linear,
    W8A8CpuLinear,
    W8A8CudaLinear,
    Float8CudaLinear,
    Mxfp4CudaLinear,
    Nvfp4CudaLinear,
)
_BY_NAME = {kind.kernel: kind for kind in KERNELS}
TOLERANCE = 2.0**-5
PROBE_ROWS = 8
SLOWEST = 8.0
"""From so many times dequantizing's time on, a kernel is none that was made for this processor."""


@dataclass(frozen=True)
class Choice:
    """What runs a layer.

    Attributes:
        module: a `KernelLinear`, or a `PackedLinear` that dequantizes or is plain.
        reason: why no kernel runs it; empty if one does, or if there is nothing to dequantize.
        rounding: Frobenius norm of what the kernel adds to the weight, relative to the weight's.
    """

    module: nn.Module
    reason: str = ""
    rounding: float = 0.0

    @property
    def layer_kernel(self) -> LayerKernel:
        """The same without the module."""
        module: Any = self.module
        return LayerKernel(module.kernel, getattr(module, "most_rows", None))


@dataclass(frozen=True)
class LayerKernel:
    """What was chosen for a layer, in so many words that it can be built again.

    Attributes:
        kernel: name of what runs it.
        most_rows: of a `CrossedLinear`, up to how many rows its kernel runs; else None.
    """

    kernel: str
    most_rows: int | None = None


def choose(source: PackedLinear, name: str = "") -> Choice:
    """The fastest module that is right for a packed layer, on the device that it is on.

    Args:
        source: the layer as it dequantizes and multiplies, in the dtype to compute in.
        name: of the layer, for errors.

    Raises:
        CorruptEntryError: the weight is not finite.
    """
    if not source.simulated:
        return Choice(as_computed(source))
    weight = source.packed.dequantize()
    if not is_finite(weight):
        raise CorruptEntryError(
            f"The packed weight of {name or 'a layer'} dequantizes to numbers that are not finite, "
            "so no kernel can be checked on it. The stored artefact is damaged: delete it and run "
            "again."
        )
    for kind in KERNELS:
        if not kind.applies(source):
            continue
        reason = kind.refusal(source)
        if reason:
            return Choice(source, reason)
        try:
            module = kind(source)
            rows = probe(source, weight)
            error = largest_error(module, source, weight, rows)
        except (RuntimeError, ValueError) as failure:  # what operators make of shapes, processors
            return Choice(source, f"{kind.kernel} failed: {str(failure).splitlines()[0]}")
        if not error <= TOLERANCE:  # nor if it is NaN
            return Choice(
                source,
                f"{kind.kernel} is off by {error:.2g} where {TOLERANCE:.2g} is allowed",
            )
        if isinstance(module, CrossedLinear):
            module.most_rows = crossover(module)
        else:
            factor = slowdown(module, source, rows)
            if factor > SLOWEST:
                return Choice(
                    source, f"{kind.kernel} takes {factor:.0f} times as long as dequantizing here"
                )
        return Choice(module, rounding=_relative(module.dequantized() - weight, weight))
    return Choice(source, f"there is no {source.wanted_kernel} kernel here")


def build(source: PackedLinear, chosen: LayerKernel | None, name: str = "") -> nn.Module:
    """The module that was chosen for a layer before; nothing is checked or timed again.

    Args:
        source: as for `choose`, on a processor like that of the choice.
        chosen: None for a plain layer, for which there is no choice.
        name: of the layer, for errors.

    Raises:
        StoreError: the kernel that was chosen cannot be built here.
    """
    if not source.simulated:
        return as_computed(source)
    if chosen is not None and chosen.kernel == source.kernel:
        return source
    kind = _BY_NAME.get(chosen.kernel) if chosen is not None else None
    if chosen is None or kind is None or not kind.applies(source):
        raise _not_built(name, chosen, "it is not made for this format and device")
    try:
        module = kind(source)
    except (RuntimeError, ValueError) as failure:
        raise _not_built(name, chosen, str(failure).splitlines()[0]) from failure
    if isinstance(module, CrossedLinear) and chosen.most_rows is not None:
        module.most_rows = chosen.most_rows
    return module


def _not_built(name: str, chosen: LayerKernel | None, why: str) -> StoreError:
    return StoreError(
        f"{name or 'A layer'} was to run on {chosen.kernel if chosen else 'a kernel'}, but that "
        f"cannot be built: {why}. If the machine or torch's build has changed, delete `v1/kernels` "
        "in the store, and kernels are chosen anew."
    )


def as_computed(source: PackedLinear) -> PackedLinear:
    """A plain layer with its weight in the type to compute in, so that nothing is converted."""
    return PackedLinear(PlainWeight(source.weight), source.bias, None, source.dtype)


def largest_error(
    module: KernelLinear, source: PackedLinear, weight: Tensor, rows: Tensor
) -> float:
    """The worst output channel's error against `weight`, the source's, multiplied in float32.

    Of every path, with one row and with several. Relative to the norm of the channel's outputs, or
    to what that is for inputs of no direction, if that is more.
    """
    inputs = rows if source.activation is None else source.activation(rows)
    exact = inputs.to(torch.float32) @ weight.t()
    errors = []
    for part in (slice(0, 1), slice(None)):
        usual = weight.norm(dim=1) * inputs[part].to(torch.float32).norm()
        size = torch.maximum(usual / source.in_features**0.5, exact[part].norm(dim=0))
        size = size.clamp(min=torch.finfo(torch.float32).tiny)
        for path in module.paths():
            off = path(rows[part]).to(torch.float32) - exact[part]
            errors.append((off.norm(dim=0) / size).max())
    return float(torch.stack(errors).max())  # NaN if one is


def probe(source: PackedLinear, weight: Tensor) -> Tensor:
    """Inputs (PROBE_ROWS, n) of the layer's dtype: Gaussian, and one for the greatest sum.

    The last row has the signs of a row of the weight, at the ends of the inputs' range: an int8
    product that saturates would do so there.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(PROBE_ROWS, source.in_features, generator=generator).to(weight.device)
    held = None if source.activation is None else source.activation.largest
    if held is not None:
        rows *= held / 3
    rows[-1] = weight[0].sign() * (held or 1.0)
    return rows.to(source.dtype)


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm().clamp(min=torch.finfo(torch.float32).tiny))
