"""A model whose weights stay in their files: parameters are read where they are used, then dropped.

The model is built from its configuration with parameters on torch's meta device and real buffers.
Reading a part of it puts real parameters in their places; leaving the part puts back what was
there, modules that were replaced in between included.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pytest_qlab.errors import ModelError
from pytest_qlab.models.checks import check_finite
from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.source import weight_files
from pytest_qlab.models.structure import decoder_blocks
from pytest_qlab.models.tensorfile import Stored, read_header

if TYPE_CHECKING:
    from pytest_qlab.models.load import LoadedModel

_REMEDY = "Give --qlab-stream=never to load it whole."
# What the files of Mixtral and its like call an expert's matrices.
_ALIASES = (
    (re.compile(r"\.experts\.(\d+)\.gate_proj\."), r".experts.\1.w1."),
    (re.compile(r"\.experts\.(\d+)\.up_proj\."), r".experts.\1.w3."),
    (re.compile(r"\.experts\.(\d+)\.down_proj\."), r".experts.\1.w2."),
)
_UNDONE = {"MergeModulelist", "Concatenate"}
_building = threading.Lock()


@dataclass(eq=False)
class LazyModel:
    """A model that is read part by part.

    Attributes:
        loaded: the model, its parameters on the meta device, with all that is known of it.
        device: where parts are put.
        tensors: those of its files, by the names that transformers gives them.
        blocks: its decoder blocks in order, with their names.
        outside: all other modules that have parameters of their own, with their names.
    """

    loaded: LoadedModel
    device: torch.device
    tensors: Mapping[str, Stored]
    blocks: list[tuple[str, nn.Module]] = field(init=False)
    outside: list[tuple[str, nn.Module]] = field(init=False)

    def __post_init__(self) -> None:
        model: nn.Module = self.loaded.model
        self.blocks = decoder_blocks(model)
        inside = {id(each) for _, block in self.blocks for each in block.modules()}
        self.outside = [
            (name, module)
            for name, module in model.named_modules()
            if id(module) not in inside
            and any(each is not None for each in module._parameters.values())
        ]
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._stored = {name: self._find(name) for name in self._names.values()}
        self._live: dict[int, nn.Parameter] = {}

    @property
    def model(self) -> Any:
        """The model, a transformers causal LM."""
        return self.loaded.model

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in the dtype that the model computes in."""
        return sum(each.nbytes for each in self.model.parameters())

    def name_of(self, parameter: nn.Parameter) -> str:
        """The name of one of the model's parameters; the first of those that are tied."""
        return self._names[id(parameter)]

    def read(self, name: str) -> Tensor:
        """The parameter of that name, as the whole model in memory would have it.

        Raises:
            ModelError: it holds values that are not finite.
        """
        dtype = self.model.get_parameter(name).dtype
        value = self._stored[name].read(dtype)
        check_finite(name, value, self.loaded.name)
        return value.to(self.device)

    @contextmanager
    def resident(self, module: nn.Module, *, alone: bool = False) -> Iterator[None]:
        """Within, the parameters of a module are real, or (`alone`) those that it owns itself."""
        modules = [module] if alone else list(module.modules())
        mine: list[int] = []
        try:
            with restored(modules):
                for each in modules:
                    for attribute, parameter in each._parameters.items():
                        if parameter is None or parameter.device.type != "meta":
                            continue
                        key = id(parameter)
                        if key not in self._live:
                            value = self.read(self.name_of(parameter))
                            self._live[key] = nn.Parameter(value, requires_grad=False)
                            mine.append(key)
                        each._parameters[attribute] = self._live[key]
                yield
        finally:
            for key in mine:
                del self._live[key]

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Within, everything outside the blocks is real, but for a head of its own."""
        head = self.model.get_output_embeddings()
        with ExitStack() as stack:
            for _, module in self.outside:
                if module is not head:
                    stack.enter_context(self.resident(module, alone=True))
            yield

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Within, the whole model can be run: each block is read, run and dropped.

        One forward pass at a time.
        """
        head = self.model.get_output_embeddings()
        parts = [module for _, module in self.blocks] + ([] if head is None else [head])
        handles = []
        with self.embedding():
            try:
                for module in parts:
                    stack = ExitStack()
                    handles += [
                        module.register_forward_pre_hook(
                            lambda module, _, stack=stack: stack.enter_context(
                                self.resident(module)
                            )
                        ),
                        module.register_forward_hook(
                            lambda *_, stack=stack: stack.close(), always_call=True
                        ),
                    ]
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _find(self, name: str) -> Stored:
        """The tensor of a parameter, whose name in the file may have a prefix more or less.

        Raises:
            ModelError: there is none of that shape.
        """
        names = [name, *(each for pair in _ALIASES if (each := pair[0].sub(pair[1], name)) != name)]
        prefix = f"{self.model.base_model_prefix}."
        shape = tuple(self.model.get_parameter(name).shape)
        for known in names:
            for each in (known, known.removeprefix(prefix), prefix + known):
                found = self.tensors.get(each)
                if found is not None and found.shape == shape:
                    return found
        raise ModelError(
            f"The model {self.loaded.name!r} cannot be read block by block: no tensor of its files "
            f"is its parameter {name} of shape {shape}, so it must be converted as a whole when it "
            f"is loaded. {_REMEDY}"
        )


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back, in the end, which children and parameters modules have."""
    before = [(each, dict(each._modules), dict(each._parameters)) for each in modules]
    try:
        yield
    finally:
        for each, children, parameters in before:
            each._modules.clear()
            each._modules.update(children)
            each._parameters.clear()
            each._parameters.update(parameters)


def stored_tensors(directory: Path, source: str) -> dict[str, Stored]:
    """All tensors of a model's safetensors files by name; nothing but the headers is read.

    Raises:
        ModelError: the weights are in another format, or a file is damaged.
    """
    files = weight_files(directory, source)
    if files[0].suffix != ".safetensors":
        raise ModelError(
            f"The weights of the model {source!r} are {files[0].name} and the like, which cannot "
            f"be read block by block. Save the model as safetensors. {_REMEDY}"
        )
    return {name: each for file in files for name, each in read_header(file).items()}


def skeleton(
    config: Any, dtype: torch.dtype, tensors: Mapping[str, Stored], trust_remote_code: bool
) -> tuple[Any, dict[str, Stored]]:
    """The model of a configuration in evaluation mode, without weights: parameters are on meta.

    Buffers are real; those that are stored have their stored values. Experts have one linear layer
    for each matrix. Beside the model, the tensors by the names that transformers gives them.

    Raises:
        ModelError: some weights are to stay in float32 whatever the dtype, or transformers changes
            values when it loads the model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _building, _parameters_on_meta(), _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever the modelling code makes of weights that are not there
        raise ModelError(
            f"A model of type {config.model_type!r} cannot be built without weights: "
            f"{str(error).partition(chr(10))[0]}. {_REMEDY}"
        ) from error
    kept = getattr(model, "_keep_in_fp32_modules", None)
    strictly = getattr(model, "_keep_in_fp32_modules_strict", None)
    if dtype != torch.float32 and (kept or strictly):
        raise ModelError(
            f"{type(model).__name__} keeps some weights in float32 whatever the dtype, which is "
            f"not known how to do block by block. Give --qlab-dtype=float32, or {_REMEDY[5:]}"
        )
    _check_conversions(model)
    stored = _renamed(tensors, model)
    unfuse_experts(model, check=False)
    for name, buffer in list(model.named_buffers()):
        parent, _, attribute = name.rpartition(".")
        if name in stored:
            value = stored[name].read(buffer.dtype)
            model.get_submodule(parent)._buffers[attribute] = value
        elif buffer.device.type == "meta":
            raise ModelError(
                f"The buffer {name} of {type(model).__name__} has no known values. {_REMEDY}"
            )
    model.requires_grad_(False)
    return model.train(False), stored


def _renamed(tensors: Mapping[str, Stored], model: Any) -> dict[str, Stored]:
    """Tensors by the names that they get when transformers loads the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [
        each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)
    ]
    found = {}
    for name in sorted(tensors):  # in which order some decide whether they apply
        new = name
        for each in renamings:
            new, _ = each.rename_source_key(new)
        found[new] = tensors[name]
    return found


def _check_conversions(model: Any) -> None:
    """Joining matrices into fused ones is undone here; no other conversion is."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for each in get_model_conversion_mapping(model, add_legacy=False):
        kinds = {type(step).__name__ for step in getattr(each, "operations", ())}
        if kinds - _UNDONE:
            raise ModelError(
                f"transformers changes weights of {type(model).__name__} when it loads them "
                f"({', '.join(sorted(kinds))}), so they cannot be read block by block. {_REMEDY}"
            )


class _EmptyOnMeta(TorchFunctionMode):
    """Within, memory that would be filled later is not taken: most parameters begin like that."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, parameters of new modules have no memory; buffers do."""
    register, here = nn.Module.register_parameter, threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        mine = threading.get_ident() == here  # other threads may make modules meanwhile
        if mine and parameter is not None and parameter.device.type != "meta":
            bare = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[name] = bare

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
