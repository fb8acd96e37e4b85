"""Time and layer output error of a quantizer, beside the same work in another library."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from benchmarks.peers import Answer, PeerMissingError, ask, original_weights
from benchmarks.settings import Benchmark, load, say
from benchmarks.tables import Sample, Section, number, ratio, seconds
from pytest_qlab import Lab
from pytest_qlab.measuring.layers import original_terms
from pytest_qlab.metrics.weights import WeightError, total, weight_error
from pytest_qlab.models.source import resolve
from pytest_qlab.models.structure import all_linears, decoder_blocks, quantizable_linears

# The second AWQ is the search that llmcompressor makes by default: with duo scaling, no clipping.
OURS = {
    "gptq": ("gptq",),
    "awq": ("awq", "awq:clip=false:duo_scaling=true"),
}
# The other library's clock, and what else is the same.
TIMED = {
    "llmcompressor": "llmcompressor's `oneshot` from the loaded model to the quantized model in "
    "memory. Both compute in float32, on the same token ids with the same threads.",
    "gptqmodel": "gptqmodel's `quantize` from the loaded model to the packed model in memory. Both "
    "compute in float32, on the same token ids with the same threads of torch; gptqmodel's own "
    "workers share as many cores.",
}
OPTIONS = {
    "llmcompressor": "its own defaults",
    "gptqmodel": "act-order with static groups, 1 % damping, `true_sequential=False`, all else its "
    "own defaults",
}
HEADER = (
    "quantizer",
    "time",
    "time / peer's",
    "output error, whole model",
    "/ peer's",
    "sum of layers' relative errors",
    "/ peer's",
)


@dataclass
class Measured:
    """One quantizer: its time in every repetition, and its error, which is always the same."""

    times: list[float] = field(default_factory=list)
    whole: float = 0.0
    summed: float = 0.0

    def judge(self, errors: list[WeightError]) -> None:
        """Take over the errors of all layers."""
        self.whole = total(errors).relative_output_error or 0.0
        self.summed = fsum(each.relative_output_error or 0.0 for each in errors)


def benchmark_quantizer(
    method: str, benchmark: Benchmark, library: str = "llmcompressor"
) -> Section:
    """Repeat ours and theirs in turns, and judge both on the original model's Gram matrices."""
    specs = OURS[method]
    found = {spec: Measured() for spec in (*specs, "rtn")}
    peer, versions, missing = Measured(), dict[str, str](), ""
    with TemporaryDirectory(prefix="qlab-bench-") as name:
        work = Path(name)
        judge = benchmark.lab(work / "judge")
        for repetition in range(benchmark.repeat):
            first = repetition == 0
            for spec, measured in found.items():
                say(f"{method}: {spec}, repetition {repetition + 1}/{benchmark.repeat}")
                elapsed, weights = quantize_ours(spec, benchmark)
                measured.times.append(elapsed)
                if first:
                    measured.judge(layer_errors(judge, weights))
            if missing:
                continue
            say(f"{method}: {library}, repetition {repetition + 1}/{benchmark.repeat}")
            try:
                answer = quantize_theirs(library, method, benchmark, judge, work)
            except PeerMissingError as error:
                missing = str(error)
                continue
            peer.times.append(answer.seconds)
            versions = answer.versions
            if first:
                peer.judge(layer_errors(judge, original_weights(answer.tensors, weights_of(judge))))
    title = f"{method.upper()}, 4 bits, groups of 128, with zero points"
    beside = "" if library == "llmcompressor" else f", beside {library}"
    section = Section(title + beside, HEADER)
    section.rows = rows(found, None if missing else peer, missing, library)
    section.notes = notes(versions, library)
    section.raw = {
        "ours": {spec: vars(measured) for spec, measured in found.items()},
        library: {"missing": missing} if missing else vars(peer),
        "versions": versions,
    }
    return section


def quantize_ours(spec: str, benchmark: Benchmark) -> tuple[float, dict[str, Tensor]]:
    """Seconds from a loaded model to a packed checkpoint on disk, and the weights it holds."""
    with TemporaryDirectory(prefix="qlab-bench-") as store:
        lab = benchmark.lab(Path(store))
        load(lab)
        started = time.perf_counter()
        checkpoint = lab.candidate(spec).checkpoint
        elapsed = time.perf_counter() - started
        scales = checkpoint.scales()
        return elapsed, {
            name: original_terms(layer.weight.dequantize(), scales.get(name, {}))
            for name, layer in checkpoint.layers().items()
        }


def quantize_theirs(
    library: str, method: str, benchmark: Benchmark, judge: Lab, work: Path
) -> Answer:
    """The same on the same tokens, in the comparison environment."""
    return ask(
        library,
        benchmark.pythons,
        method,
        resolve(benchmark.model).resolve(),
        judge.calibration.sequences,
        threads=benchmark.threads,
        work=work,
    )


def weights_of(lab: Lab) -> dict[str, Tensor]:
    """The original weights of all layers that are quantized, (out, in), by name."""
    return {site.name: site.weight() for site in all_linears(lab.base_model)}


def layer_errors(judge: Lab, weights: Mapping[str, Tensor]) -> list[WeightError]:
    """The error of every layer, on the original model's calibration inputs."""
    statistics = judge.statistics(gram=True)
    errors = []
    for index, (name, block) in enumerate(decoder_blocks(judge.base_model)):
        known = statistics(index)
        for site in quantizable_linears(block, name):
            gram = known[site.name].gram
            errors.append(weight_error(site.weight(), weights[site.name], gram, name=site.name))
    return errors


def rows(
    found: Mapping[str, Measured], peer: Measured | None, missing: str, library: str
) -> list[list[str]]:
    """One row for each quantizer; the peer's is last and is what the ratios are over."""
    made = []
    for spec, measured in found.items():
        time_ratio = whole_ratio = summed_ratio = "-"
        if peer is not None:
            time_ratio = ratio(Sample(tuple(measured.times)).over(Sample(tuple(peer.times))))
            whole_ratio = number(measured.whole / peer.whole) + "x"
            summed_ratio = number(measured.summed / peer.summed) + "x"
        made.append([spec, *_cells(measured, time_ratio, whole_ratio, summed_ratio)])
    if peer is None:
        return [*made, [library, missing, *["-"] * (len(HEADER) - 2)]]
    return [*made, [library, *_cells(peer, "1", "1", "1")]]


def _cells(measured: Measured, time_ratio: str, whole: str, summed: str) -> list[str]:
    return [
        seconds(Sample(tuple(measured.times))),
        time_ratio,
        number(measured.whole),
        whole,
        number(measured.summed),
        summed,
    ]


def notes(versions: Mapping[str, str], library: str) -> list[str]:
    """What the table's numbers are."""
    listed = ", ".join(f"{name} {value}" for name, value in versions.items())
    return [
        "Ours is timed from the loaded model to the packed checkpoint on disk, calibration "
        f"included; {TIMED[library]} The output error is the squared error of the layers' outputs "
        "over the squared outputs, on the original model's calibration inputs, computed by our "
        "code for both; scales that a method has folded into other layers are taken back first.",
        *([f"Comparison environment: {listed}; {OPTIONS[library]}."] if listed else []),
    ]
