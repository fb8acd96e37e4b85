"""A quantized model on disk: everything that has to be shipped, packed, in one safetensors file.

`model.safetensors` holds the packed tensors of every quantized layer under
`layers.NAME.weight.*` (and `.activation.*`), those of a quantized embedding or head under
`embeddings.NAME.weight.*`, and every other parameter under `model.NAME` in the dtype that the
method says, or that the original checkpoint stores it in. Its size, less the header, is the size
that the compression ratio is computed from. `qlab.json` says how to read it; `scales.safetensors`
keeps what folds did to each layer, which only the per-layer error report needs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pytest_qlab.formats.activations import ActivationQuantizer, load_activation
from pytest_qlab.formats.base import PackedWeight, load_packed
from pytest_qlab.formats.plain import PlainWeight
from pytest_qlab.kernels.embedding import PackedEmbedding
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.methods.base import QuantizedLayer
from pytest_qlab.methods.pipeline import QuantizedModel, describe_layer
from pytest_qlab.metrics.size import Size
from pytest_qlab.models.rotation import LayerRotation, Rotation, attach_to_model
from pytest_qlab.models.structure import LinearSite, all_linears
from pytest_qlab.models.tensorfile import Stored, join_files, read_header, write_tensors

if TYPE_CHECKING:
    from pytest_qlab.models.load import LoadedModel

MODEL_FILE = "model.safetensors"
INDEX_FILE = "qlab.json"
SCALES_FILE = "scales.safetensors"
T = TypeVar("T")
ALIGNMENT = 64


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model as it lies on disk; tensors are read when they are asked for."""

    directory: Path
    index: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Wall time of the quantization."""
        return float(self.index["seconds"])

    @property
    def kernel(self) -> str:
        """What runs the layers, such as `dequantize-matmul`."""
        return str(self.index["kernel"])

    @property
    def simulated(self) -> bool:
        """Whether some layer's packed bits are not what runs."""
        return bool(self.wanted_kernels)

    @property
    def wanted_kernels(self) -> list[str]:
        """The kernels that would have to run for the latency to be the formats'."""
        return list(self.index["wanted_kernels"])

    @property
    def size(self) -> Size:
        """Bytes of everything that is stored, beside the base model's."""
        stored = self.index["size"]
        layers = [(name, (rows, columns), n) for name, (rows, columns), n in stored["layers"]]
        return Size.of(
            layers,
            stored["others"],
            parameters=stored["parameters"],
            base_bytes=stored["base_bytes"],
        )

    @property
    def rotation(self) -> Rotation | None:
        """Of the hidden states between the blocks, if the layers work on rotated ones."""
        stored = self.index.get("rotation")
        return None if stored is None else Rotation.from_dict(stored["hidden"])

    def rotations(self) -> dict[str, LayerRotation]:
        """Per layer what was rotated, after it was scaled, where anything was."""
        stored = self.index.get("rotation") or {"layers": {}}
        return {name: LayerRotation.from_dict(each) for name, each in stored["layers"].items()}

    def layers(self, names: Container[str] | None = None) -> dict[str, QuantizedLayer]:
        """The quantized layers of the decoder blocks, by name: all, or those of `names`."""
        return self._packed("layers", names)

    def layer_readers(self) -> dict[str, Callable[[], QuantizedLayer]]:
        """By name what reads each of them into memory of its own; the file is not kept mapped."""
        header = read_header(self.directory / MODEL_FILE)
        grouped = _by_layer(
            {
                key.removeprefix("layers."): stored
                for key, stored in header.items()
                if key.startswith("layers.")
            }
        )
        return {
            name: partial(_read_stored_layer, meta, grouped.get(name, {}))
            for name, meta in self.index["layers"].items()
        }

    def embeddings(self, names: Container[str] | None = None) -> dict[str, QuantizedLayer]:
        """The input embedding and the output head where they are quantized, likewise."""
        return self._packed("embeddings", names)

    def _packed(self, kind: str, names: Container[str] | None) -> dict[str, QuantizedLayer]:
        index = {
            name: meta for name, meta in self.index[kind].items() if names is None or name in names
        }
        found = _load(
            self.directory / MODEL_FILE, f"{kind}.", lambda key: key.rsplit(".", 2)[0] in index
        )
        grouped = _by_layer(found)
        return {name: _read_layer(meta, grouped.get(name, {})) for name, meta in index.items()}

    def others(self, names: Container[str] | None = None) -> dict[str, Tensor]:
        """Parameters that are not quantized, by name, in the dtype they are stored in: all, or
        those of `names`.
        """
        return _load(
            self.directory / MODEL_FILE, "model.", lambda key: names is None or key in names
        )

    def each_other(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The same one at a time in another dtype, each in memory of its own."""
        for key, stored in read_header(self.directory / MODEL_FILE).items():
            if key.startswith("model."):
                yield key.removeprefix("model."), stored.read(dtype)

    def scales(self) -> dict[str, dict[str, Tensor]]:
        """Per layer the `column` and `row` scale that folds applied, where there are any."""
        file = self.directory / SCALES_FILE
        scales: dict[str, dict[str, Tensor]] = {}
        for key, tensor in (load_file(file) if file.exists() else {}).items():
            name, _, kind = key.rpartition(".")
            scales.setdefault(name, {})[kind] = tensor
        return scales


def save_checkpoint(
    directory: Path,
    quantized: QuantizedModel,
    loaded: LoadedModel,
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `quantized`, made from `loaded`, into a directory without a checkpoint.

    Args:
        parameters: those of the base model that it is about, if it is a part; all by default.
    """
    if parameters is None:
        parameters = dict(loaded.model.named_parameters())
    packed = {
        f"{kind}.{name}.{part}.{field}": tensor
        for kind, layers in (("layers", quantized.layers), ("embeddings", quantized.embeddings))
        for name, layer in layers.items()
        for part, holder in (("weight", layer.weight), ("activation", layer.activation))
        if holder is not None
        for field, tensor in holder.tensors().items()
    }
    weights = {f"{name}.weight" for name in (*quantized.layers, *quantized.embeddings)}
    others = {
        f"model.{name}": quantized.changed[name]
        if name in quantized.changed
        else parameter.detach()
        .to(quantized.stored_dtype or loaded.storage_dtypes.get(name, parameter.dtype))
        .cpu()
        for name, parameter in parameters.items()
        if name not in weights
    }
    write_tensors(directory / MODEL_FILE, {**packed, **others})
    if quantized.scales:
        write_tensors(
            directory / SCALES_FILE,
            {
                f"{name}.{kind}": scale
                for name, scales in quantized.scales.items()
                for kind, scale in scales.items()
            },
        )
    embeddings = quantized.embeddings
    runners = [packed_linear(layer, None, torch.float32) for layer in quantized.layers.values()]
    index = {
        "layers": {name: describe_layer(layer) for name, layer in quantized.layers.items()},
        "embeddings": {name: describe_layer(layer) for name, layer in quantized.embeddings.items()},
        "seconds": quantized.seconds,
        "forwards": quantized.forwards,
        "kernel": quantized.kernel or ", ".join(sorted({runner.kernel for runner in runners})),
        "wanted_kernels": []
        if quantized.kernel
        else sorted({each.wanted_kernel for each in runners if each.simulated}),
        "size": {
            "layers": [
                (name, layer.weight.shape, layer_bytes(layer))
                for name, layer in quantized.layers.items()
            ],
            "others": {
                **{f"embeddings.{name}": layer_bytes(each) for name, each in embeddings.items()},
                **{key: tensor.nbytes for key, tensor in others.items()},
            },
            "parameters": sum(each.numel() for each in loaded.model.parameters()),
            "base_bytes": loaded.nbytes,
        },
    }
    if quantized.rotation is not None:
        index["rotation"] = {
            "hidden": quantized.rotation.to_dict(),
            "layers": {name: each.to_dict() for name, each in quantized.rotations.items()},
        }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")


def join_checkpoints(directory: Path, parts: Sequence[Path]) -> None:
    """Make one checkpoint of those of a model's parts, whose directories are given in order.

    Nothing but one piece of a tensor is held in memory. The index comes last, in one step.
    """
    join_files(directory / MODEL_FILE, [part / MODEL_FILE for part in parts])
    scales = [file for part in parts if (file := part / SCALES_FILE).exists()]
    if scales:
        join_files(directory / SCALES_FILE, scales)
    found = [json.loads((part / INDEX_FILE).read_text("utf-8")) for part in parts]
    kernels = {kernel for each in found for kernel in each["kernel"].split(", ") if kernel}
    sizes = [each["size"] for each in found]
    index = {
        "layers": {name: meta for each in found for name, meta in each["layers"].items()},
        "embeddings": {name: meta for each in found for name, meta in each["embeddings"].items()},
        "seconds": sum(each["seconds"] for each in found),
        "forwards": max(each["forwards"] for each in found),
        "kernel": ", ".join(sorted(kernels)),
        "wanted_kernels": sorted({name for each in found for name in each["wanted_kernels"]}),
        "size": {
            "layers": [layer for size in sizes for layer in size["layers"]],
            "others": {key: n for size in sizes for key, n in size["others"].items()},
            "parameters": sizes[0]["parameters"],
            "base_bytes": sizes[0]["base_bytes"],
        },
    }
    rotations = [each["rotation"] for each in found if "rotation" in each]
    if rotations:
        layers = {name: each for known in rotations for name, each in known["layers"].items()}
        index["rotation"] = {"hidden": rotations[0]["hidden"], "layers": layers}
    partial = directory / f"{INDEX_FILE}.partial"
    partial.write_text(json.dumps(index, indent=1), encoding="utf-8")
    partial.replace(directory / INDEX_FILE)


def layer_bytes(layer: QuantizedLayer) -> int:
    """Bytes of everything that is stored for a layer but its bias."""
    activation = {} if layer.activation is None else layer.activation.tensors()
    return layer.weight.nbytes + sum(tensor.nbytes for tensor in activation.values())


def _load(file: Path, prefix: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of a file under a prefix, by the rest of their names, aligned as torch
    allocates.

    Matrix products of memory that starts elsewhere may add in another order, and then even an exact
    copy of a model does not give the same bits.
    """
    with safe_open(file, framework="pt") as stored:
        tensors = {
            key.removeprefix(prefix): stored.get_tensor(key)
            for key in stored.keys()  # noqa: SIM118  (it is no mapping)
            if key.startswith(prefix) and wanted(key.removeprefix(prefix))
        }
    return {key: t.clone() if t.data_ptr() % ALIGNMENT else t for key, t in tensors.items()}


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint's index."""
    return Checkpoint(directory, json.loads((directory / INDEX_FILE).read_text("utf-8")))


def _by_layer(entries: Mapping[str, T]) -> dict[str, dict[str, dict[str, T]]]:
    """Entries named LAYER.PART.FIELD, by these three."""
    grouped: dict[str, dict[str, dict[str, T]]] = {}
    for key, entry in entries.items():
        name, part, field = key.rsplit(".", 2)
        grouped.setdefault(name, {}).setdefault(part, {})[field] = entry
    return grouped


def _read_layer(meta: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> QuantizedLayer:
    weight: PackedWeight = load_packed(meta["weight"], tensors.get("weight", {}))
    activation: ActivationQuantizer | None = None
    if meta["activation"] is not None:
        activation = load_activation(meta["activation"], tensors.get("activation", {}))
    return QuantizedLayer(weight, activation)


def _read_stored_layer(
    meta: dict[str, Any], stored: dict[str, dict[str, Stored]]
) -> QuantizedLayer:
    parts = {
        part: {field: each.read() for field, each in fields.items()}
        for part, fields in stored.items()
    }
    return _read_layer(meta, parts)


def structural_copy(model: nn.Module) -> Any:
    """A copy whose modules can be replaced; its parameters are the model's own."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo=dict(shared))


def instantiate(checkpoint: Checkpoint, base: nn.Module) -> nn.Module:
    """A model with the checkpoint's packed layers; parameters it does not change are shared."""
    model = structural_copy(base)
    reference = next(base.parameters())
    originals = dict(base.named_parameters())
    if checkpoint.rotation is not None:
        attach_to_model(model, checkpoint.rotation)
    with torch.no_grad():
        for name, tensor in checkpoint.others().items():
            value = tensor.to(dtype=originals[name].dtype, device=reference.device)
            if not torch.equal(value, originals[name]):
                replace_parameter(model, name, value)
        place_embeddings(model, checkpoint.embeddings(), reference)
        place_layers(model, all_linears(model), checkpoint.layers(), reference)
    evaluated: nn.Module = model.eval()
    return evaluated


def packed_linears(model: nn.Module) -> list[str]:
    """Names of a model's packed linear layers, so that those that are replaced are let go of."""
    return [name for name, each in model.named_modules() if isinstance(each, PackedLinear)]


def place_layers(
    model: nn.Module,
    sites: Sequence[LinearSite],
    layers: Mapping[str, QuantizedLayer],
    like: Tensor,
) -> None:
    """Put packed layers in the places of linear ones, whose biases they get; `like` has the dtype
    and device to compute in.
    """
    for site in sites:
        module = packed_linear(layers[site.name], site.bias, like.dtype)
        site.replace(model, module.to(like.device))


def place_embeddings(model: nn.Module, embeddings: dict[str, QuantizedLayer], like: Tensor) -> None:
    """Put quantized embeddings in their places, and a head that is tied to one beside it.

    Those that are stored as numbers are held in the dtype to compute in.
    """
    for name, stored in embeddings.items():
        layer = stored
        if isinstance(stored.weight, PlainWeight):
            weight = PlainWeight(stored.weight.weight.to(like.dtype))
            layer = QuantizedLayer(weight, stored.activation)
        for place in (name, *tied_to(model, name)):
            place_embedding(model, place, layer, like)


def tied_to(model: nn.Module, name: str) -> list[str]:
    """Names of the other modules whose weight is that of the module of that name."""
    weight = model.get_submodule(name).get_parameter("weight")
    return [
        other
        for other, each in model.named_modules()
        if other != name and each._parameters.get("weight") is weight
    ]


def place_embedding(model: nn.Module, name: str, layer: QuantizedLayer, like: Tensor) -> None:
    """Put a quantized embedding or head in the place of that name; `like` has the dtype and device
    to compute in.
    """
    module = model.get_submodule(name)
    packed: nn.Module
    if type(module) is nn.Embedding:
        packed = PackedEmbedding(layer.weight, like.dtype)
    elif isinstance(module, nn.Linear):
        packed = packed_linear(layer, module.bias, like.dtype)
    else:  # An embedding that does more than look up, such as Gemma's, which scales: it keeps to it
        weight = layer.weight.dequantize().to(dtype=like.dtype, device=like.device)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        return
    model.set_submodule(name, packed.to(like.device))


def packed_linear(layer: QuantizedLayer, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """The module of a quantized layer, computing in that dtype."""
    return PackedLinear(layer.weight, bias, layer.activation, dtype)


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in the place of a parameter, and of all that are tied to it."""
    old, new = model.get_parameter(name), nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for attribute, each in list(module._parameters.items()):
            if each is old:
                module.register_parameter(attribute, new)
