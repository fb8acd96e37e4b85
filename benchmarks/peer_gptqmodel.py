"""Quantize with gptqmodel: run by `peers.py` in another environment, which has no pytest-qlab.

    python peer_gptqmodel.py JOB.json

as `peer_llmcompressor.py`; the only `method` is gptq, with the options of our defaults.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("gptqmodel", "transformers", "torch")


def main(job_file: str) -> None:
    """Do one job and write its answer."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    keep_to_cores(job["threads"])
    try:
        import_module("gptqmodel")
    except ModuleNotFoundError as error:
        answer: dict[str, Any] = {"missing": error.name}
    else:
        answer = quantize(job)
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def keep_to_cores(threads: int) -> None:
    """Its pool needs two workers or more, which are to share as many cores as ours has threads."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, threads))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Load the model, time the quantization alone, write the weights."""
    torch = import_module("torch")
    torch.set_num_threads(job["threads"])
    library = import_module("gptqmodel")
    # Compiled at its first use, once on a machine, which is no part of the quantization.
    import_module("gptqmodel.extension").is_available("pack_block_cpu")
    model = library.GPTQModel.load(job["model"], configuration(job), dtype=torch.float32)
    sequences = json.loads(Path(job["tokens"]).read_text(encoding="utf-8"))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
    started = time.perf_counter()
    model.quantize(rows, batch_size=1, calibration_data_min_length=1)
    elapsed = time.perf_counter() - started
    tensors = {
        f"{name}.weight": dequantized(module, job["bits"])
        for name, module in model.model.named_modules()
        if hasattr(module, "qweight")
    }
    import_module("safetensors.torch").save_file(tensors, job["weights"])
    return {"seconds": elapsed, "versions": {name: version(name) for name in LIBRARIES}}


def configuration(job: dict[str, Any]) -> Any:
    """GPTQ as we have it by default, and all in memory."""
    return import_module("gptqmodel").QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=False,
        desc_act=True,
        act_group_aware=False,
        static_groups=True,
        damp_percent=0.01,
        true_sequential=False,
        offload_to_disk=False,
        device="cpu",
        # The older format holds zero points less one.
        format="gptq_v2",
    )


def dequantized(module: Any, bits: int) -> Any:
    """The weight (out, in) of a packed layer, in float32, where its own method gives float16.

    Codes lie one above the other in the words of `qweight` (words, out), zero points side by side
    in those of `qzeros` (groups, words), the lowest bits first.
    """
    torch = import_module("torch")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = 2**bits - 1
    codes = ((module.qweight[:, None, :] >> shifts[:, None]) & mask).flatten(0, 1)
    zeros = ((module.qzeros[:, :, None] >> shifts) & mask).flatten(1)
    groups = module.g_idx.long()
    return ((codes - zeros[groups]) * module.scales.float()[groups]).T.contiguous()


if __name__ == "__main__":
    main(sys.argv[1])
