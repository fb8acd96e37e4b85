"""Memory of quantizing and measuring block by block: 2 GiB under a limit they do not fit in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.runs import RunError
from benchmarks.settings import ROOT, Benchmark, say
from benchmarks.tables import Section, number
from pytest_qlab.models.tensorfile import write_tensors
from tests.architectures import character_tokenizer

MIB, GIB = 2**20, 2**30
WIDTH, INNER, ROWS = 1024, 2816, 4096
SEQUENCES, LENGTH = 8, 128
LIMIT = GIB
HEADER = (
    "blocks",
    "checkpoint",
    "work",
    "limit",
    "way",
    "peak",
    "above idle",
    "above idle / largest block",
    "CPU time",
)


def benchmark_streaming(benchmark: Benchmark) -> Section:
    """Two depths, block by block and whole: quantized with and without calibration, measured."""
    section = Section("Memory of quantizing and measuring block by block", HEADER)
    section.rows = []
    full = 2 * GIB // block_bytes()
    with TemporaryDirectory(prefix="qlab-bench-") as place:
        for blocks in (full // 4, full):
            model, stores = Path(place) / f"model-{blocks}", Path(place) / f"stores-{blocks}"
            nbytes = write_model(model, blocks)
            # What is measured is what was quantized block by block, whichever way it is measured.
            runs = [
                ("quantize", "rtn", "always", "rtn"),
                ("quantize", "gptq", "always", "gptq"),
                ("quantize", "rtn", "never", "whole"),
                ("measure", "rtn", "never", "rtn"),
                ("measure", "rtn", "always", "rtn"),
            ]
            for work, spec, stream, store in runs:
                say(f"streaming: {blocks} blocks, {work} {spec}, --qlab-stream={stream}")
                found = run_child(work, model, stores / store, spec, stream, LIMIT)
                section.raw[f"{blocks} {work} {spec} {stream}"] = found
                section.rows.append(_row(blocks, nbytes, work, spec, stream, found))
        section.notes = [
            f"Random Llama blocks, {WIDTH} wide, {block_bytes() / MIB:.0f} MiB each "
            f"in float32, in several safetensors files; {SEQUENCES} sequences of {LENGTH} tokens; "
            "one thread. Measured is the KL of what was quantized block by block, the base model's "
            "predictions and the noise floor included. Each row is a process whose private "
            "writable memory the kernel limits (RLIMIT_DATA), imports included. Peak is what was "
            "resident at most, pages of mapped files included; idle is the same after the imports "
            "and the tokenizing."
        ]
    return section


def _row(
    blocks: int, nbytes: int, work: str, spec: str, stream: str, found: dict[str, Any]
) -> list[str]:
    above = found["peak"] - found["idle"]
    shares = [f"{above / MIB:.0f} MiB", number(above / block_bytes())]
    peaks = [f"{found['peak'] / MIB:.0f} MiB", *shares]
    return [
        str(blocks),
        f"{nbytes / GIB:.2f} GiB",
        f"{work} {spec}",
        f"{LIMIT / GIB:.0f} GiB",
        "block by block" if stream == "always" else "whole",
        *(["memory refused", "", ""] if "error" in found else peaks),
        f"{found['seconds']:.0f} s",
    ]


def run_child(
    work: str,
    model: Path,
    store: Path,
    spec: str,
    stream: str,
    limit: int,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
) -> dict[str, Any]:
    """What a child process of `streaming_child` answers, whose arguments these are."""
    arguments = [
        work,
        str(model),
        str(store),
        spec,
        stream,
        str(limit),
        str(sequences),
        str(length),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming_child", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"A child has failed to {work} {model}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def write_model(directory: Path, blocks: int, width: int = WIDTH, inner: int = INNER) -> int:
    """Write a random Llama in float32, a file for every few blocks; returns its bytes."""
    directory.mkdir()
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    batch: dict[str, torch.Tensor] = {}
    total = 0
    for name, shape in shapes(blocks, width, inner):
        value = torch.ones(shape)
        if len(shape) == 2:
            value = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        batch[name] = value
        if sum(each.nbytes for each in batch.values()) > 256 * MIB or name == "lm_head.weight":
            file = f"model-{len(set(where.values())):05d}.safetensors"
            write_tensors(directory / file, batch)
            where.update(dict.fromkeys(batch, file))
            total += sum(each.nbytes for each in batch.values())
            batch = {}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def shapes(blocks: int, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a Llama, the head last."""
    yield "model.embed_tokens.weight", (ROWS, width)
    for index in range(blocks):
        prefix = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (width,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (width, width)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (inner, width)
        yield f"{prefix}.mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (ROWS, width)


def block_bytes(width: int = WIDTH, inner: int = INNER) -> int:
    """Bytes of one block's weights in float32."""
    return 4 * (2 * width + 4 * width**2 + 3 * width * inner)
