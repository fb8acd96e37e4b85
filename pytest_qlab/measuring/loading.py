"""A program that loads a packed model as a fresh process does, and times it and its first token.

Nothing is read but the configuration and the checkpoint, which holds every parameter. A job comes
in on standard input and the answer goes out as the last line, both JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from pytest_qlab.measuring.alone import load_as_run
from pytest_qlab.parallel import one_thread_per_operation

STEADY = 5
_PAGE = 4096


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
    from transformers import AutoConfig, AutoModelForCausalLM

    job: dict[str, Any] = json.load(sys.stdin)
    one_thread_per_operation()
    with torch.device("meta"):  # Imports the architecture's code, which is no part of loading.
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["config"]))  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    model = load_as_run(job, AutoConfig.from_pretrained(job["config"]))
    for tensor in (*model.parameters(), *model.buffers()):
        touch(tensor)
    loaded = time.perf_counter()
    ids = torch.tensor([job["ids"]], device=job["device"])
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
