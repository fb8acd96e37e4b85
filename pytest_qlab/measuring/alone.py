"""A packed model by itself: loaded from its checkpoint and a configuration, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_qlab.checkpoint import (
    Checkpoint,
    open_checkpoint,
    packed_linear,
    packed_linears,
    place_embeddings,
    replace_parameter,
)
from pytest_qlab.errors import ModelError
from pytest_qlab.kernels.choose import LayerKernel, build
from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.load import DTYPES
from pytest_qlab.models.rotation import attach_to_model
from pytest_qlab.models.structure import all_linears


def load_alone(
    checkpoint: Checkpoint,
    config: Any,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    chosen: Callable[[str, Any], nn.Module] = lambda name, layer: layer,
) -> nn.Module:
    """The model of a checkpoint, without its base model ever being in memory.

    Args:
        config: of a transformers causal language model.
        dtype: in which it computes.
        chosen: what is to run a packed linear layer of that name. Layers are read one at a time,
            so that no more than one is held both as it is stored and as it runs.

    Raises:
        ModelError: the checkpoint lacks parameters that the configuration asks for.
    """
    from transformers import AutoModelForCausalLM

    with _parameters_without_memory():
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    unfuse_experts(model, check=False)
    if checkpoint.rotation is not None:
        attach_to_model(model, checkpoint.rotation)
    with torch.no_grad():
        for name, value in checkpoint.each_other(dtype):
            replace_parameter(model, name, value.to(device))
        sites = {site.name: site for site in all_linears(model)}
        place_embeddings(model, checkpoint.embeddings(), torch.empty(0, dtype=dtype, device=device))
        for name in packed_linears(model):
            model.set_submodule(name, chosen(name, model.get_submodule(name)))
        for name, read in checkpoint.layer_readers().items():  # no variable holds on to a layer
            model.set_submodule(
                name, chosen(name, packed_linear(read(), sites[name].bias, dtype).to(device))
            )
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ModelError(
            f"The packed model has no {empty[0]}, which a {type(model).__name__} made from its "
            "configuration has, so it cannot be loaded without its base model."
        )
    loaded: nn.Module = model.to(device).eval()  # buffers that are no parameters
    return loaded


def load_as_run(job: dict[str, Any], config: Any) -> nn.Module:
    """The packed model of a job (`runnable.packed_job`), its layers on the kernels that it names.

    They are built without the check, which multiplies by dequantized weights in float32: whoever
    gives the job has made it, and its memory and time are none that running the model takes.
    """
    kernels = {name: LayerKernel(**each) for name, each in job["layers"].items()}
    return load_alone(
        open_checkpoint(Path(job["checkpoint"])),
        config,
        DTYPES[job["dtype"]],
        device=job["device"],
        chosen=lambda name, layer: build(layer, kernels.get(name), name),
    )


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that modules register inside have a shape only; buffers are as always."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
