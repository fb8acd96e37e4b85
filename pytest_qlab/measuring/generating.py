"""Load a packed model by itself and generate; a program, whose memory is what is asked.

A job comes in on standard input and the answer goes out as the last line, both JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from pytest_qlab.machine import peak_resident_bytes
from pytest_qlab.measuring.alone import load_as_run


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


def main() -> None:
    """Do the job and answer with the tokens and with bytes: before the model came, and at most."""
    from transformers import AutoConfig

    job: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(job["config"])
    idle = peak_resident_bytes()
    tokens = generate(load_as_run(job, config), job["ids"], job["new"])
    print(json.dumps({"tokens": tokens, "idle": idle, "peak": peak_resident_bytes()}))


if __name__ == "__main__":
    main()
