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
SCHEMES = {
    "dynamic": "W8A8",
    "smoothquant": "W8A8",
    "fp8": "FP8_DYNAMIC",
    "mxfp4": "MXFP4A16",
    "nvfp4": "NVFP4A16",
}


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
    originals = {name: value.detach().clone() for name, value in model.named_parameters()}
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
    rescales = job["method"] in ("awq", "smoothquant")
    tensors = weights_of(model, before=rescales)
    if rescales:
        tensors |= changed_besides(model, originals, tensors)
    import_module("safetensors.torch").save_file(tensors, job["weights"])
    return {"seconds": elapsed, "versions": {name: version(name) for name in LIBRARIES}}


def token_dataset(file: str) -> Any:
    """The token ids of a JSON file, one sequence a row."""
    sequences = json.loads(Path(file).read_text(encoding="utf-8"))
    return import_module("datasets").Dataset.from_dict(
        {"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]}
    )


def recipe_of(job: dict[str, Any]) -> list[Any]:
    """The library's own defaults; the bits and groups of GPTQ and AWQ as the job says."""
    modifiers = "llmcompressor.modifiers"
    if job["method"] in SCHEMES:
        preset = {"scheme": SCHEMES[job["method"]], "targets": "Linear", "ignore": ["lm_head"]}
        rounding = import_module(f"{modifiers}.quantization").QuantizationModifier(**preset)
        if job["method"] != "smoothquant":
            return [rounding]
        smooth = import_module(f"{modifiers}.transform.smoothquant").SmoothQuantModifier
        return [smooth(smoothing_strength=0.5), rounding]
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


def changed_besides(model: Any, originals: Any, known: Any) -> dict[str, Any]:
    """PARAMETER.changed for parameters other than the quantized weights that have new values."""
    return {
        f"{name}.changed": value.detach().float().contiguous().clone()
        for name, value in model.named_parameters()
        if name in originals and name not in known and not value.equal(originals[name])
    }


if __name__ == "__main__":
    main(sys.argv[1])
