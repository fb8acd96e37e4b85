"""Load a packed model by itself and generate; a program, whose memory is what is asked.

A job comes in on standard input and the answer goes out as the last line, both JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pytest_qlab.checkpoint import open_checkpoint
from pytest_qlab.kernels.choose import LayerKernel, build
from pytest_qlab.machine import peak_resident_bytes
from pytest_qlab.measuring.alone import load_alone
from pytest_qlab.models.load import DTYPES


def generate(model: Any, ids: list[int], new: int) -> list[int]:
    """The likeliest `new` tokens after `ids`, one at a time, with the cache of those before."""
    device = next(model.parameters()).device
    given, cache, found = torch.tensor([ids], device=device), None, list[int]()
    with torch.inference_mode():
        for _ in range(new):
            output = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            given = output.logits[:, -1:].argmax(dim=-1)
            found.append(int(given))
    return found


def load(job: dict[str, Any], config: Any) -> Any:
    """The packed model, its layers on the kernels that the job names.

    They are built without the check, which multiplies by dequantized weights in float32: whoever
    gives the job has made it, and its memory is none that running the model takes.
    """
    kernels = {name: LayerKernel(**each) for name, each in job["layers"].items()}
    return load_alone(
        open_checkpoint(Path(job["checkpoint"])),
        config,
        DTYPES[job["dtype"]],
        device=job["device"],
        chosen=lambda name, layer: build(layer, kernels.get(name), name),
    )


def main() -> None:
    """Do the job and answer with the tokens and with bytes: before the model came, and at most."""
    from transformers import AutoConfig

    job: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(job["config"])
    idle = peak_resident_bytes()
    tokens = generate(load(job, config), job["ids"], job["new"])
    print(json.dumps({"tokens": tokens, "idle": idle, "peak": peak_resident_bytes()}))


if __name__ == "__main__":
    main()
