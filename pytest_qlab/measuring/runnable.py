"""The models that speed and memory are measured on: in bfloat16, packed bits through real kernels.

Quality is measured elsewhere, on dequantized weights in the lab's dtype: how fast bits run is one
question, what they say is another.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from pytest_qlab.checkpoint import (
    instantiate,
    packed_linears,
    replace_parameter,
    structural_copy,
)
from pytest_qlab.kernels.choose import LayerKernel, build, choose
from pytest_qlab.kernels.real import CrossedLinear, has_operator
from pytest_qlab.machine import processor_of
from pytest_qlab.measuring.alone import load_alone
from pytest_qlab.models.load import DTYPES
from pytest_qlab.store import content_hash

if TYPE_CHECKING:
    from pytest_qlab.candidate import Candidate
    from pytest_qlab.checkpoint import Checkpoint
    from pytest_qlab.kernels.linear import PackedLinear
    from pytest_qlab.lab import Lab

KERNELS_VERSION = 4


@dataclass(frozen=True)
class KernelUse:
    """What runs the quantized layers of a candidate where its speed and memory are measured.

    Attributes:
        counts: layers by kernel.
        wanted: for layers that dequantize, the kernels that would have to run.
        reasons: why they do, with the number of layers.
        rounding: most that a kernel's own rounding adds to a layer's weight, relative.
        most_rows: of kernels for few rows, up to how many they run, by kernel and shape.
        layers: what each layer runs on, by name; empty where no bits need a kernel of ours.
    """

    counts: dict[str, int]
    wanted: tuple[str, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)
    rounding: float = 0.0
    most_rows: dict[str, int] = field(default_factory=dict)
    layers: dict[str, LayerKernel] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """Whether some layer's packed bits are not what runs."""
        return bool(self.wanted)

    @property
    def dequantizing(self) -> int:
        """Layers that dequantize before they multiply."""
        return sum(self.reasons.values())

    def in_tiles(self, rows: int) -> int:
        """Layers whose kernel is not for so many rows, which are multiplied by dense tiles."""
        limits = [each.most_rows for each in self.layers.values()]
        return sum(limit is not None and limit < rows for limit in limits)

    def __str__(self) -> str:
        """Such as `int4pack 42, dequantize-matmul 2`."""
        ordered = sorted(self.counts.items(), key=lambda each: (-each[1], each[0]))
        return ", ".join(f"{kernel} {count}" for kernel, count in ordered)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "wanted": list(self.wanted)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        layers = {name: LayerKernel(**each) for name, each in fields["layers"].items()}
        return cls(**{**fields, "wanted": tuple(fields["wanted"]), "layers": layers})

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Of a candidate whose bits need no kernel of ours: plain weights, another runtime."""
        return cls({checkpoint.kernel: len(checkpoint.size.layers)})


def speed_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in where speed is measured: bfloat16, unless products are not fast in it.

    They are on CUDA, and on processors with instructions for them; on others, a baseline in
    bfloat16 would be slow, and every candidate look fast beside it.
    """
    if device.type == "cuda":
        return torch.bfloat16
    supported = has_operator("mkldnn", "_is_mkldnn_bf16_supported")
    if device.type == "cpu" and supported and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return dtype


def _dtype_of_speed(lab: Lab) -> torch.dtype:
    return speed_dtype(DTYPES[lab.model.dtype], torch.device(lab.model.device))


def speed_dtype_name(lab: Lab) -> str:
    """What speed is measured in, such as `bfloat16`, without a model."""
    return _name(_dtype_of_speed(lab))


def speed_base(base: Any) -> Any:
    """The base model as its speed is measured: itself, or a copy in `speed_dtype`."""
    first = next(base.parameters())
    dtype = speed_dtype(first.dtype, first.device)
    return base if dtype == first.dtype else copy_in(base, dtype)


def copy_in(base: Any, dtype: torch.dtype) -> Any:
    """A copy of a model whose parameters have another dtype; what is tied stays tied.

    Buffers, such as rotary frequencies, stay as exact as they are.
    """
    model = structural_copy(base)
    for name, parameter in base.named_parameters():
        replace_parameter(model, name, parameter.detach().to(dtype))
    return model.eval()


def dtype_name(model: Any) -> str:
    """What a model computes in, such as `bfloat16`; for conventions."""
    return _name(next(model.parameters()).dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Runnable:
    """A model to measure speed and memory on, and what runs its quantized layers."""

    model: Any
    kernels: KernelUse


def runnable(candidate: Candidate) -> Runnable:
    """The candidate's model in `speed_dtype`, with the kernels that were chosen for it.

    Every layer proves itself when it is chosen, see `kernels.choose`; what does not dequantizes and
    multiplies. Parameters that the method left alone are shared with `Lab.speed_base`.
    """
    if not candidate.checkpoint.simulated:
        return _chosen_anew(candidate)
    use = candidate.kernels
    model = instantiate(candidate.checkpoint, candidate.lab.speed_base)
    place_kernels(model, use.layers)
    return Runnable(model, use)


def _chosen_anew(candidate: Candidate) -> Runnable:
    model = instantiate(candidate.checkpoint, candidate.lab.speed_base)
    return Runnable(model, use_kernels(model))


def _chosen_alone(candidate: Candidate) -> KernelUse:
    """The same choice without the base model, and with one packed layer in memory at a time."""
    choices, lab = Choices(), candidate.lab

    def forgotten(name: str, layer: Any) -> nn.Module:
        choices.choose(name, layer)
        return nn.Identity()

    config, dtype = copy.deepcopy(lab.described.model.config), _dtype_of_speed(lab)
    load_alone(candidate.checkpoint, config, dtype, device=lab.model.device, chosen=forgotten)
    return choices.use


def speed_model(candidate: Candidate) -> Any:
    """The candidate's model as its speed is measured; made once and kept by the candidate."""
    return candidate.speed_model


def kernel_use_parts(candidate: Candidate) -> dict[str, Any]:
    """What determines which kernels run a candidate, as plain JSON types."""
    return {
        "quantized": candidate.lab.quantized_identity(candidate.method),
        "processor": processor_of(candidate.lab.model.device),
        "torch": torch.__version__,
        "code": KERNELS_VERSION,
    }


def kernels_key(candidate: Candidate) -> str:
    """Different for everything that runs a candidate's layers in another way."""
    return content_hash([KERNELS_VERSION, candidate.kernels.to_dict()])


def kernel_use(candidate: Candidate) -> KernelUse:
    """What runs the candidate's layers on this machine.

    Chosen once and remembered in the store, so that what is measured on later models, such as the
    memory of the tiles that a crossover decides on, is of the same kernels.
    """
    if not candidate.checkpoint.simulated:
        return KernelUse.of_checkpoint(candidate.checkpoint)

    def chosen() -> dict[str, Any]:
        if candidate.lab.lazy is not None:
            return _chosen_alone(candidate).to_dict()
        return _chosen_anew(candidate).kernels.to_dict()

    stored = candidate.lab.store.json("kernels", kernel_use_parts(candidate), chosen)
    return KernelUse.from_dict(stored)


def known_kernel_use(candidate: Candidate) -> KernelUse | None:
    """The same if it is known; computes nothing."""
    stored = candidate.lab.store.peek("kernels", kernel_use_parts(candidate))
    return None if stored is None else KernelUse.from_dict(stored)


@contextmanager
def packed_job(candidate: Candidate) -> Iterator[dict[str, Any]]:
    """What a fresh process has to know to load the candidate as it runs (`alone.load_as_run`).

    The configuration lies in a directory that is there within the block.
    """
    lab, layers = candidate.lab, candidate.kernels.layers
    with tempfile.TemporaryDirectory(prefix="qlab-") as directory:
        lab.described.model.config.save_pretrained(directory)
        yield {
            "checkpoint": str(candidate.checkpoint.directory),
            "config": directory,
            "dtype": speed_dtype_name(lab),
            "device": lab.model.device,
            "layers": {name: asdict(each) for name, each in layers.items()},
        }


class Choices:
    """What is chosen for layers, one after the other."""

    def __init__(self) -> None:
        self._layers: dict[str, LayerKernel] = {}
        self._reasons: Counter[str] = Counter()
        self._wanted: set[str] = set()
        self._rounding, self._most_rows = 0.0, dict[str, int]()

    def choose(self, name: str, source: PackedLinear) -> nn.Module:
        """The best module for a packed linear layer.

        Raises:
            CorruptEntryError: its weight is not finite.
        """
        choice = choose(source, name)
        self._layers[name] = choice.layer_kernel
        self._rounding = max(self._rounding, choice.rounding)
        if choice.reason:
            self._reasons[choice.reason] += 1
            self._wanted.add(source.wanted_kernel)
        if isinstance(choice.module, CrossedLinear):
            shape = f"{source.out_features}x{source.in_features}"
            self._most_rows[f"{choice.module.kernel} {shape}"] = choice.module.most_rows
        return choice.module

    @property
    def use(self) -> KernelUse:
        """All that was chosen."""
        return KernelUse(
            dict(Counter(each.kernel for each in self._layers.values())),
            tuple(sorted(self._wanted)),
            dict(self._reasons),
            self._rounding,
            self._most_rows,
            self._layers,
        )


def use_kernels(model: nn.Module) -> KernelUse:
    """Put the best module in the place of every packed linear layer of a model.

    Raises:
        CorruptEntryError: a packed weight is not finite.
    """
    choices = Choices()
    for name in packed_linears(model):
        source: Any = model.get_submodule(name)
        model.set_submodule(name, choices.choose(name, source))
    return choices.use


def place_kernels(model: nn.Module, layers: Mapping[str, LayerKernel]) -> None:
    """Put the modules that were chosen before in the places of a model's packed linear layers.

    Raises:
        StoreError: a kernel cannot be built here.
    """
    for name in packed_linears(model):
        source: Any = model.get_submodule(name)
        model.set_submodule(name, build(source, layers.get(name), name))
