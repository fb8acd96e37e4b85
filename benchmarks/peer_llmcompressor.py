"""Quantize with llmcompressor: run by `peers.py` in another environment, which has no pytest-qlab.

    python peer_llmcompressor.py JOB.json

JOB.json says what to do (`peers.Job`); a `result.json` and the weights go where it says. Everything
is imported when it is needed, so that a missing library becomes an answer and not a crash.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def main(job_file: str) -> None:
    """Do one job and write its answer."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        import_module("llmcompressor")
    except ModuleNotFoundError as error:
        answer: dict[str, Any] = {"missing": error.name}
    else:
        answer = quantize(job)
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Load the model, time the quantization alone, write the weights."""
    torch = import_module("torch")
    torch.set_num_threads(job["threads"])
    model = import_module("transformers").AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32
    )
    dataset = token_dataset(job["tokens"])
    recipe = recipe_of(job)
    without_pinned_memory(torch)
    oneshot = import_module("llmcompressor").oneshot
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=len(dataset),
        max_seq_length=len(dataset[0]["input_ids"]),
        shuffle_calibration_samples=False,
    )
    elapsed = time.perf_counter() - started
    tensors = weights_of(model, before=job["method"] == "awq")
    import_module("safetensors.torch").save_file(tensors, job["weights"])
    return {"seconds": elapsed, "versions": {name: version(name) for name in LIBRARIES}}


def token_dataset(file: str) -> Any:
    """The token ids of a JSON file, one sequence a row."""
    sequences = json.loads(Path(file).read_text(encoding="utf-8"))
    return import_module("datasets").Dataset.from_dict(
        {"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]}
    )


def recipe_of(job: dict[str, Any]) -> list[Any]:
    """The library's own defaults for the method; bits and groups as the job says."""
    modifiers = "llmcompressor.modifiers"
    scheme = {
        "weights": {
            "num_bits": job["bits"],
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": job["group_size"],
        },
        "targets": ["Linear"],
    }
    common = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if job["method"] == "gptq":
        return [import_module(f"{modifiers}.gptq").GPTQModifier(**common)]
    return [
        import_module(f"{modifiers}.transform.awq").AWQModifier(),
        import_module(f"{modifiers}.quantization").QuantizationModifier(**common),
    ]


def without_pinned_memory(torch: Any) -> None:
    """Where there is no accelerator the library's cache raises on `pin_memory`; leave it out."""
    if not torch.accelerator.is_available():
        cache = import_module("llmcompressor.pipelines.cache").IntermediatesCache
        cache._pin_intermediate = classmethod(lambda cls, intermediate: None)


def weights_of(model: Any, *, before: bool) -> dict[str, Any]:
    """NAME.weight as its rounded codes dequantize; if asked, NAME.before: the same unrounded."""
    forward_quantize = import_module("compressed_tensors.quantization").forward_quantize
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            weight = module.weight.detach()
            rounded = forward_quantize(module, weight, "weight", scheme.weights)
            found[f"{name}.weight"] = rounded.detach().float().contiguous()
            if before:
                found[f"{name}.before"] = weight.float().contiguous().clone()
    return found


if __name__ == "__main__":
    main(sys.argv[1])
