"""Round a model's weights with hqq, bitsandbytes or torchao: run by `peers.py` as another process.

    python peer_weights.py JOB.json

as `peer_llmcompressor.py`; `method` is a name of `QUANTIZERS`. Nothing is calibrated: every linear
layer but the output head is rounded by itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(job_file: str) -> None:
    """Do one job and write its answer."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    library, quantizer = QUANTIZERS[job["method"]]
    try:
        import_module(library)
    except ModuleNotFoundError as error:
        answer: dict[str, Any] = {"missing": error.name}
    else:
        answer = quantize(job, library, quantizer)
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def quantize(job: dict[str, Any], library: str, quantizer: Callable[..., Any]) -> dict[str, Any]:
    """Round and dequantize all weights; time that alone."""
    torch = import_module("torch")
    torch.set_num_threads(job["threads"])
    model = import_module("transformers").AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32
    )
    layers = {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    started = time.perf_counter()
    found = {
        f"{name}.weight": quantizer(weight, job["bits"], job["group_size"])
        for name, weight in layers.items()
    }
    elapsed = time.perf_counter() - started
    tensors = {name: weight.float().contiguous() for name, weight in found.items()}
    import_module("safetensors.torch").save_file(tensors, job["weights"])
    names = (library, "transformers", "torch")
    return {"seconds": elapsed, "versions": {name: version(name) for name in names}}


def hqq(weight: Any, bits: int, group_size: int) -> Any:
    """The default solver; with 4 bits zero points are whole, as in its configuration."""
    quantizer = import_module("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        weight,
        nbits=bits,
        channel_wise=True,
        group_size=group_size,
        optimize=True,
        round_zero=bits == 4,
        axis=1,
        bitpack=False,
        compute_dtype=weight.dtype,
        device="cpu",
    )
    return ((codes.float() - meta["zero"].float()) * meta["scale"].float()).view(weight.shape)


def blockwise(kind: str, double_quant: bool, weight: Any, bits: int, group_size: int) -> Any:
    """NF4 or FP4 of bitsandbytes."""
    functional = import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(
        *functional.quantize_4bit(
            weight, blocksize=group_size, quant_type=kind, compress_statistics=double_quant
        )
    )


def mxfp4(weight: Any, bits: int, group_size: int) -> Any:
    """MXFP4 of torchao, with the specification's rule for scales."""
    library = import_module("torchao.prototype.mx_formats.mx_tensor")
    made = library.MXTensor.to_mx(
        weight,
        import_module("torch").float4_e2m1fn_x2,
        group_size,
        scaling_mode=library.ScaleCalculationMode.FLOOR,
    )
    return made.dequantize(weight.dtype)


def nvfp4(weight: Any, bits: int, group_size: int) -> Any:
    """NVFP4 of torchao, with a scale of the whole tensor."""
    library = import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    scale = library.per_tensor_amax_to_scale(weight.abs().max())
    return library.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(weight.dtype)


def with_options(kind: str, double_quant: bool) -> Callable[..., Any]:
    """`blockwise` with its first options settled."""

    def quantizer(weight: Any, bits: int, group_size: int) -> Any:
        return blockwise(kind, double_quant, weight, bits, group_size)

    return quantizer


QUANTIZERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "hqq": ("hqq", hqq),
    "nf4": ("bitsandbytes", with_options("nf4", False)),
    "nf4 double": ("bitsandbytes", with_options("nf4", True)),
    "fp4": ("bitsandbytes", with_options("fp4", False)),
    "mxfp4": ("torchao", mxfp4),
    "nvfp4": ("torchao", nvfp4),
}

if __name__ == "__main__":
    main(sys.argv[1])
