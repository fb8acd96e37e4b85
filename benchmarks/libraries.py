"""Methods beside the same methods of other libraries: what each does to the model's predictions.

The weights that the other library makes are put into the base model, and the evaluation is ours for
both. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import PLACES, Answer, PeerMissingError, original_weights
from benchmarks.peers import ask as ask_peer
from benchmarks.quantizers import weights_of
from benchmarks.settings import Benchmark, say
from benchmarks.tables import Section, number
from pytest_qlab import Lab
from pytest_qlab.checkpoint import replace_parameter, structural_copy
from pytest_qlab.formats.activations import PerTokenFloat8
from pytest_qlab.measuring.evaluation import comparable_head, evaluate
from pytest_qlab.measuring.layers import original_terms
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.metrics.tokens import TokenArrays
from pytest_qlab.models.source import resolve

HEADER = (
    "library",
    "theirs",
    "ours",
    "KL, theirs",
    "KL, ours",
    "ours / theirs",
    "weights apart",
)
SUFFIX = ".changed"


@dataclass(frozen=True)
class Pair:
    """One method in both.

    Attributes:
        ours: specifications of ours; some of theirs have two.
        library, theirs: what the table calls theirs.
        method: what the child's script calls it.
        inputs: what their inputs go through at run time.
    """

    ours: tuple[str, ...]
    library: str
    theirs: str
    method: str
    bits: int = 4
    group_size: int = 64
    inputs: Callable[[Tensor], Tensor] | None = None


def int8_inputs(x: Tensor) -> Tensor:
    """Inputs in 8 bits as compressed-tensors rounds them: 255 steps of max|x| / 127.5 a token."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    scale = scale.masked_fill(scale == 0, 1)
    return (x / scale).round().clamp(-128, 127) * scale


OTHER = "llmcompressor"
PAIRS = (
    *(
        Pair((f"hqq:bits={bits}",), "hqq", f"{bits} bits, groups of 64", "hqq", bits)
        for bits in (4, 3, 2)
    ),
    Pair(("nf4",), "bitsandbytes", "NF4, blocks of 64", "nf4"),
    Pair(("nf4:double_quant",), "bitsandbytes", "NF4, absmax quantized", "nf4 double"),
    Pair(("fp4",), "bitsandbytes", "FP4, blocks of 64", "fp4"),
    Pair(("mxfp4",), "torchao", "MXFP4, FLOOR", "mxfp4", group_size=32),
    Pair(("nvfp4",), "torchao", "NVFP4, two-level scales", "nvfp4", group_size=16),
    Pair(("mxfp4:scale=even", "mxfp4"), OTHER, "MXFP4A16", "mxfp4"),
    Pair(("nvfp4",), OTHER, "NVFP4A16", "nvfp4"),
    Pair(("fp8",), OTHER, "FP8_DYNAMIC", "fp8", inputs=PerTokenFloat8()),
    Pair(("dynamic",), OTHER, "W8A8", "dynamic", inputs=int8_inputs),
    Pair(("smoothquant",), OTHER, "SmoothQuant, W8A8", "smoothquant", inputs=int8_inputs),
    Pair(("gptq",), OTHER, "GPTQ, 4 bits, groups of 128", "gptq", group_size=128),
    Pair(("gptq",), "gptqmodel", "GPTQ, 4 bits, groups of 128", "gptq", group_size=128),
    Pair(
        ("awq", "awq:clip=false:duo_scaling=true"),
        OTHER,
        "AWQ, 4 bits, groups of 128",
        "awq",
        group_size=128,
    ),
)


def benchmark_libraries(benchmark: Benchmark) -> Section:
    """Run all pairs on the same model, calibration tokens and evaluation windows."""
    section = Section("Methods beside those of other libraries", HEADER)
    rows: list[list[str]] = []
    versions: dict[str, dict[str, str]] = {}
    with TemporaryDirectory(prefix="qlab-bench-") as name:
        work = Path(name)
        lab = benchmark.lab(work / "store")
        for pair in PAIRS:
            say(f"libraries: {pair.library}, {pair.theirs}")
            try:
                answer = ask(pair, benchmark, lab, work)
            except PeerMissingError as error:
                rows.append([pair.library, pair.theirs, ", ".join(pair.ours), str(error), *"---"])
                continue
            option = PLACES[pair.library][1].option
            versions[option] = versions.get(option, {}) | answer.versions
            for measured in beside(pair, answer, lab):
                rows.append([pair.library, pair.theirs, *cells(measured)])
                section.raw[f"{pair.library} {pair.theirs}, {measured['ours']}"] = measured
    section.rows = rows
    section.notes = notes(versions)
    return section


def ask(pair: Pair, benchmark: Benchmark, lab: Lab, work: Path) -> Answer:
    """Theirs, in the comparison environment."""
    return ask_peer(
        pair.library,
        benchmark.pythons,
        pair.method,
        resolve(benchmark.model).resolve(),
        lab.calibration.sequences,
        threads=benchmark.threads,
        work=work,
        bits=pair.bits,
        group_size=pair.group_size,
    )


def beside(pair: Pair, answer: Answer, lab: Lab) -> Iterator[dict[str, Any]]:
    """KL divergences of both from the base model, and the distance of their weights."""
    weights = weights_of(lab)
    changed = {k: v for k, v in answer.tensors.items() if k.endswith(SUFFIX)}
    tensors = {k: v for k, v in answer.tensors.items() if k not in changed}
    theirs = original_weights(tensors, weights)
    kl = float(kl_of(lab, model_of(lab, tensors, changed, pair.inputs)))
    for spec in pair.ours:
        candidate = lab.candidate(spec)
        scales = candidate.checkpoint.scales()
        ours = {
            name: original_terms(layer.weight.dequantize(), scales.get(name, {}))
            for name, layer in candidate.checkpoint.layers().items()
        }
        yield {
            "ours": spec,
            "kl_theirs": kl,
            "kl_ours": float(candidate.kl.mean),
            "apart": distance(ours, theirs) / distance(theirs, weights),
        }


def model_of(
    lab: Lab,
    tensors: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    inputs: Callable[[Tensor], Tensor] | None,
) -> nn.Module:
    """The base model with the weights of an answer, and inputs that are rounded as theirs are."""
    model: nn.Module = structural_copy(lab.base_model)
    new = {name: value for name, value in tensors.items() if name.endswith(".weight")}
    new |= {name.removesuffix(SUFFIX): value for name, value in changed.items()}
    with torch.no_grad():
        for name, value in new.items():
            like = model.get_parameter(name)
            replace_parameter(model, name, value.to(dtype=like.dtype, device=like.device))
    if inputs is not None:
        rounding = inputs
        for name in tensors:
            if name.endswith(".weight"):
                layer = model.get_submodule(name.removesuffix(".weight"))
                layer.register_forward_pre_hook(lambda _, found: (rounding(found[0]), *found[1:]))
    return model.eval()


def kl_of(lab: Lab, model: nn.Module) -> float:
    """Mean KL divergence of a model from the base model over all windows, nats per token."""
    head = comparable_head(lab, model)
    looks = [evaluate(lab, head, look) for look in range(len(lab.looks))]
    return Fidelity(
        TokenArrays.joined(looks, lab.looks),
        domains=[domain for _, domain in lab.eval_data.documents],
    ).kl.mean


def distance(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the difference over all layers."""
    return sqrt(sum(float((some[name] - others[name]).double().square().sum()) for name in others))


def cells(measured: Mapping[str, Any]) -> list[str]:
    """The row of a pair, from our specification on."""
    return [
        f"`{measured['ours']}`",
        number(measured["kl_theirs"]),
        number(measured["kl_ours"]),
        f"{measured['kl_ours'] / measured['kl_theirs']:.4f}",
        number(measured["apart"]),
    ]


def notes(versions: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What the table's numbers are, and the versions in each environment."""
    return [
        "KL is the mean divergence from the original model, in nats per token, by our evaluation "
        "for both: the weights that the other library makes are put into the original model, and "
        "where it rounds inputs, they are rounded by its rule. *Weights apart* is the distance of "
        "the two libraries' weights over the distance of theirs from the original ones; 0 is the "
        "same bits. Methods that calibrate do so on the same tokens.",
        *(
            f"Comparison environment of `{option}`: "
            + ", ".join(f"{name} {value}" for name, value in found.items())
            + "."
            for option, found in versions.items()
        ),
    ]
