"""A program that loads a packed model as a fresh process does, and times it and its first token.

It reads a JSON object from standard input and prints one as its last line. Run it as
`python -m pytest_qlab.measuring.loading`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_qlab.checkpoint import instantiate, open_checkpoint
from pytest_qlab.models.experts import is_fused, unfuse_experts
from pytest_qlab.models.load import DTYPES
from pytest_qlab.parallel import one_thread_per_operation

STEADY = 5
_PAGE = 4096


def load(config: Path, checkpoint: Path, *, dtype: str, device: str) -> nn.Module:
    """The model of a checkpoint in the store, with all its weights in memory.

    Nothing is read but the configuration and the checkpoint, which holds every parameter.

    Args:
        config: directory with the base model's config.json.
    """
    model = empty_model(config, dtype)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if is_fused(module):  # The check of what they compute must not meet a NaN.
            for parameter in module.parameters():
                parameter.zero_()
    unfuse_experts(model)
    loaded = instantiate(open_checkpoint(checkpoint), model.to(device))
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        touch(tensor)
    return loaded


def empty_model(config: Path, dtype: str) -> Any:
    """A model with the configuration's structure, whose weights are whatever was in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    known = AutoConfig.from_pretrained(config)
    with torch.no_grad(), no_init_weights():
        return AutoModelForCausalLM.from_config(known, dtype=DTYPES[dtype])  # type: ignore[no-untyped-call]


def touch(tensor: Tensor) -> None:
    """Read a byte of every page, because a file that is mapped is not read before it is used."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type == "cpu" and tensor.numel():
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::_PAGE].sum().item()


def generate_one(model: Any, ids: Tensor) -> int:
    """The most likely next token, by the model's own `generate`."""
    with torch.inference_mode():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False
        )
    return int(found[0, -1])


def main() -> None:
    """Load what standard input describes; print seconds of the load and of first tokens."""
    given = json.load(sys.stdin)
    one_thread_per_operation()
    with torch.device("meta"):  # Imports the architecture's code, which is no part of loading.
        empty_model(Path(given["config"]), given["dtype"])
    started = time.perf_counter()
    model = load(
        Path(given["config"]),
        Path(given["checkpoint"]),
        dtype=given["dtype"],
        device=given["device"],
    )
    loaded = time.perf_counter()
    ids = torch.tensor([given["ids"]], device=given["device"])
    times = []
    token = -1
    for _ in range(1 + STEADY):
        before = time.perf_counter()
        token = generate_one(model, ids)
        times.append(time.perf_counter() - before)
    answer = {"load": loaded - started, "first": times[0], "steady": times[1:], "token": token}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
