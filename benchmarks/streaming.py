"""Memory of quantizing block by block: a 2 GiB checkpoint under a limit it does not fit in."""

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
    "method",
    "limit",
    "way",
    "peak",
    "above idle",
    "above idle / largest block",
    "CPU time",
)


def benchmark_streaming(benchmark: Benchmark) -> Section:
    """Two depths, block by block and whole, without calibration and with."""
    section = Section("Memory of quantizing block by block", HEADER)
    section.rows = rows = []
    full = 2 * GIB // block_bytes()
    with TemporaryDirectory(prefix="qlab-bench-") as place:
        for blocks in (full // 4, full):
            model = Path(place) / f"model-{blocks}"
            nbytes = write_model(model, blocks)
            runs = [("rtn", "always"), ("gptq", "always"), ("rtn", "never")]
            for spec, stream in runs:
                say(f"streaming: {blocks} blocks, {spec}, --qlab-stream={stream}")
                with TemporaryDirectory(prefix="qlab-bench-") as store:
                    found = quantize(model, Path(store), spec, stream, LIMIT)
                section.raw[f"{blocks} {spec} {stream}"] = found
                above = found["peak"] - found["idle"]
                shares = [f"{above / MIB:.0f} MiB", number(above / block_bytes())]
                rows.append(
                    [
                        str(blocks),
                        f"{nbytes / GIB:.2f} GiB",
                        spec,
                        f"{LIMIT / GIB:.0f} GiB",
                        "block by block" if stream == "always" else "whole",
                        *(
                            ["memory refused", "", ""]
                            if "error" in found
                            else [f"{found['peak'] / MIB:.0f} MiB", *shares]
                        ),
                        f"{found['seconds']:.0f} s",
                    ]
                )
        section.notes = [
            f"Random Llama blocks, {WIDTH} wide, {block_bytes() / MIB:.0f} MiB each "
            f"in float32, in several safetensors files; {SEQUENCES} sequences of {LENGTH} tokens; "
            "one thread. Each row is a process whose private writable memory the kernel limits "
            "(RLIMIT_DATA), imports included. Peak is what was resident at most, pages of mapped "
            "files included; idle is the same after the imports and the tokenizing."
        ]
    return section


def quantize(
    model: Path,
    store: Path,
    spec: str,
    stream: str,
    limit: int,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
) -> dict[str, Any]:
    """What a child process of `streaming_child` answers."""
    arguments = [str(model), str(store), spec, stream, str(limit), str(sequences), str(length)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming_child", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"A child has failed to quantize {model}:\n{done.stderr[-2000:]}")
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
