"""The GGML quantizers beside llama.cpp's own: speed, and the share of blocks with the same bytes.

`python -m benchmarks.ggml --identical` prints the latter as Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.peers import PeerError
from benchmarks.settings import Benchmark, say
from benchmarks.tables import Sample, Section, number, ratio, table
from pytest_qlab.errors import MethodError
from pytest_qlab.formats.ggml import GGML_TYPES, dequantize_blocks, unpack_blocks
from pytest_qlab.solvers.ggml import quantize_ggml
from tests.methods.ggml_inputs import Floats, embedded_weights, huge, kinds, of_kinds
from tests.methods.ggml_reference import MISSING, dequantizer, library, quantizer

START, END = "<!-- ggml-identical -->", "<!-- /ggml-identical -->"
WITHOUT_SEARCH = ("Q8_0", "MXFP4")
ROWS, COLUMNS = 512, 4096
HEADER = (
    "type",
    "work",
    "ours, ns per weight",
    "llama.cpp's",
    "time / llama.cpp's",
    "identical blocks",
)
NOTES = [
    f"One float32 tensor of {ROWS} x {COLUMNS} Gaussian numbers, quantized without and with "
    "importance, and dequantized, on one thread; processor time, in turns. llama.cpp's functions "
    "are those of `libggml-base` in llama-cpp-python; they are compiled C, ours are numpy.",
]


EXPLANATION = """\
Share of blocks whose bytes are those of llama.cpp's quantizers; two numbers where those without and
with importance differ. Weights that both refuse count as identical: *too large* are those whose
scales overflow in float16. *Overflowing* weights, above 2^40, are all refused here, except in
MXFP4, which reaches them; llama.cpp's own sums overflow there, and wherever the share is below
100 % it stores nothing but zeros, without a word."""


@dataclass
class Raced:
    """Processor seconds of both sides in every repetition, and the share of equal blocks."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    identical: float = 0.0

    def row(self, name: str, work: str) -> list[str]:
        """Its line of the table."""
        ours, theirs = (
            Sample(tuple(times)).times(1e9 / (ROWS * COLUMNS)) for times in (self.ours, self.theirs)
        )
        share = percent(self.identical)
        return [name, work, ours.show(""), theirs.show(""), ratio(ours.over(theirs)), share]


def benchmark_ggml(benchmark: Benchmark) -> Section:
    """Time every type on the same tensor, ours and theirs in turns."""
    require_library()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    importance = rng.random(COLUMNS, dtype=np.float32) + np.float32(0.1)
    section = Section("Quantizers of llama.cpp's types", HEADER, notes=NOTES)
    rows = []
    with one_thread():
        for name in GGML_TYPES:
            say(f"ggml: {name}")
            searches = {"quantize": None, "with importance": importance}
            if name in WITHOUT_SEARCH:
                del searches["with importance"]
            raced = {
                work: race_quantizers(name, x, weights, benchmark.repeat)
                for work, weights in searches.items()
            }
            raced["dequantize"] = race_dequantizers(name, x, benchmark.repeat)
            rows += [each.row(name, work) for work, each in raced.items()]
            section.raw[name] = {work: vars(each) for work, each in raced.items()}
    section.rows = rows
    return section


def race_quantizers(name: str, x: Floats, importance: Floats | None, repeat: int) -> Raced:
    """Quantize with both, in turns."""
    theirs = quantizer(name)
    weight = torch.from_numpy(x)
    weights = None if importance is None else torch.from_numpy(importance)
    found = Raced(identical=identical_share(name, x, importance))
    for _ in range(repeat):
        found.ours.append(timed(lambda: quantize_ggml(weight, name, weights)))
        found.theirs.append(timed(lambda: theirs(x, importance)))
    return found


def race_dequantizers(name: str, x: Floats, repeat: int) -> Raced:
    """Dequantize the same blocks with both, in turns."""
    theirs = dequantizer(name)
    blocks = quantize_ggml(torch.from_numpy(x), name)
    flat = blocks.view(-1, GGML_TYPES[name].block_bytes)
    same = dequantize_blocks(name, flat).view(-1, GGML_TYPES[name].block_size)
    expected = torch.from_numpy(theirs(blocks.numpy(), COLUMNS)).view_as(same)
    found = Raced(identical=float((same == expected).all(1).double().mean()))
    dequantize_blocks(name, flat)  # the first call pays for its memory
    for _ in range(repeat):
        found.ours.append(timed(lambda: dequantize_blocks(name, flat)))
        found.theirs.append(timed(lambda: theirs(blocks.numpy(), COLUMNS)))
    return found


def timed(work: Callable[[], object]) -> float:
    """Seconds of this thread's processor time: what else runs on the machine does not count."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def require_library() -> None:
    """Raise `PeerError` where there is nothing to compare with."""
    if library() is None:
        raise PeerError(f'{MISSING}. Install it with: pip install "pytest-qlab[llamacpp]"')


def identical_blocks() -> dict[str, dict[str, tuple[float, float]]]:
    """Shares of equal blocks by kind of weights and type, without and with importance."""
    require_library()
    tried = {
        **kinds(32, 1024),
        "too large": huge(32, 1024),
        "overflowing": huge(32, 1024, 40, 127),
        "embedded model": embedded_weights(8, 256),
    }
    return {
        kind: {
            name: (
                identical_share(name, x, None),
                identical_share(name, x, of_kinds(x.shape[1])),
            )
            for name in GGML_TYPES
        }
        for kind, x in tried.items()
    }


def identical_share(name: str, x: Floats, importance: Floats | None) -> float:
    """Share of blocks with the same bytes; those that both refuse count as the same."""
    size = GGML_TYPES[name].block_bytes
    expected = quantizer(name)(x, importance)
    weights = None if importance is None else torch.from_numpy(importance)
    try:
        found = quantize_ggml(torch.from_numpy(x), name, weights).numpy()
    except MethodError:
        if len(x) > 1:
            each = [identical_share(name, x[i : i + 1], importance) for i in range(len(x))]
            return sum(each) / len(each)
        return float(not storable(name, expected))
    return float((found == expected).reshape(-1, size).all(1).mean())


def storable(name: str, blocks: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bool:
    """Whether llama-quantize would write these blocks: it looks for scales that are no numbers."""
    fields = unpack_blocks(name, torch.from_numpy(blocks.reshape(-1, GGML_TYPES[name].block_bytes)))
    for key, values in fields.items():
        if key == "e" and bool((values == 255).any()):
            return False
        if values.is_floating_point() and not bool(values.isfinite().all()):
            return False
    return True


def identical_section(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    """The shares as Markdown: a line of the table for each kind, a column for each type."""
    rows = [
        [kind, *(" / ".join(dict.fromkeys(map(percent, shares[name]))) for name in GGML_TYPES)]
        for kind, shares in found.items()
    ]
    return "\n".join([EXPLANATION, "", *table(("weights", *GGML_TYPES), rows)]) + "\n"


def percent(share: float) -> str:
    """A share in percent; 100 only if nothing is missing."""
    if share == 1:
        return "100 %"
    return f"{number(min(100 * share, 99.9))} %"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of identical blocks; 1 if there is nothing to compare with."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ggml",
        description="Compare the GGML quantizers with llama.cpp's; speed: benchmarks.run.",
    )
    parser.add_argument(
        "--identical", action="store_true", required=True, help="print shares of identical blocks"
    )
    parser.parse_args(arguments)
    try:
        print(identical_section(identical_blocks()), end="")
    except PeerError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
