"""Packed bits through real kernels beside float32 and bfloat16, on a slice of a 4096-wide model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.settings import Benchmark, say
from benchmarks.tables import Sample, Section, number, ratio
from pytest_qlab.checkpoint import structural_copy
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.measuring.runnable import KernelUse, copy_in, use_kernels
from pytest_qlab.methods.base import Method
from pytest_qlab.methods.dynamic import Dynamic
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.models.structure import all_linears

LAYERS = 2
TOKENS = {1: 15, 128: 4}
"""Lengths of the input, and for each how many rounds a repetition has."""
METHODS: Mapping[str, Method] = {
    "rtn:bits=4:group_size=128": Rtn(bits=4, group_size=128),
    "rtn:bits=8:group_size=-1:symmetric=true": Rtn(bits=8, group_size=-1, symmetric=True),
    "dynamic:bits=8": Dynamic(bits=8),
}
HEADER = ("model", "tokens", "runs on", "time", "time / float32's", "time / bfloat16's")


@dataclass(frozen=True)
class Side:
    """One way to run the slice."""

    name: str
    kernels: str
    model: Any

    def run(self, ids: torch.Tensor) -> None:
        """One forward pass from an empty cache, up to the last token's logits."""
        with torch.inference_mode():
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)


def benchmark_kernels(benchmark: Benchmark) -> Section:
    """Forward passes of all sides in turns, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = slice_of_a_model()
        sides, uses = made(base)
        return section(sides, uses, base.config, benchmark.repeat)
    finally:
        torch.set_num_threads(before)


def slice_of_a_model(hidden: int = 4096, intermediate: int = 11008, heads: int = 32) -> Any:
    """Two decoder layers of a Llama with random weights in bfloat16, and a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def made(base: Any) -> tuple[list[Side], dict[str, KernelUse]]:
    """The sides, float32 and bfloat16 first, and what runs those that are quantized."""
    wide = copy_in(base, torch.float32)
    plain = "torch.nn.functional.linear"
    sides, uses = [Side("float32", plain, wide), Side("bfloat16", plain, base)], {}
    for name, method in METHODS.items():
        say(f"kernels: {name}")
        model = structural_copy(base)
        for site in all_linears(model):
            layer = method.quantize(site.weight(), None, name=site.name)
            packed = PackedLinear(layer.weight, site.bias, layer.activation, torch.bfloat16)
            site.replace(model, packed)
        uses[name] = use_kernels(model)
        sides.append(Side(name, str(uses[name]), model))
    return sides, uses


def section(
    sides: list[Side],
    uses: Mapping[str, KernelUse],
    config: Any,
    repeat: int,
    clock: Callable[[], int] = time.process_time_ns,
) -> Section:
    """Time all sides in turns, beginning with another one in each round."""
    made = Section(
        f"Kernels on {LAYERS} decoder layers, {config.hidden_size} wide",
        HEADER,
        notes=[
            f"Forward passes over 1 and 128 tokens from an empty cache, one thread; in each "
            "round all take turns, the first of them another each time. Processor time: medians of "
            f"a repetition's {' and '.join(map(str, TOKENS.values()))} rounds, and their ratios. "
            "Weights are random, the feed-forward network is "
            f"{config.intermediate_size} wide, head and embeddings are small.",
            *(
                f"`{name}`: kernels add {number(use.rounding)} to the weights at most (relative "
                f"Frobenius norm)"
                + "".join(f"; {each} runs up to {n} rows" for each, n in use.most_rows.items())
                + "."
                for name, use in uses.items()
            ),
        ],
    )
    rows = []
    for tokens, a_repetition in TOKENS.items():
        ids = torch.arange(tokens).view(1, -1)
        times: dict[str, list[int]] = {side.name: [] for side in sides}
        for turn in range(-1, repeat * a_repetition):  # the first to warm up
            first = turn % len(sides)
            for side in (*sides[first:], *sides[:first]):
                started = clock()
                side.run(ids)
                taken = clock() - started
                if turn >= 0:
                    times[side.name].append(taken)
        say(f"kernels: {tokens} tokens done")
        found = {name: medians(each, repeat) for name, each in times.items()}
        for side in sides:
            mine = found[side.name]
            rows.append(
                [
                    side.name,
                    str(tokens),
                    side.kernels,
                    mine.times(1e-6).show(" ms"),
                    ratio(mine.over(found["float32"])),
                    ratio(mine.over(found["bfloat16"])),
                ]
            )
        made.raw[str(tokens)] = times
    made.rows = rows
    return made


def medians(times: list[int], repeat: int) -> Sample:
    """The median of each repetition's rounds."""
    count = len(times) // repeat
    return Sample(tuple(median(times[n * count : (n + 1) * count]) for n in range(repeat)))
