"""Quantization beside the matrix products that it cannot do without, run alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.settings import Benchmark, load, say
from benchmarks.tables import Sample, Section, ratio, seconds
from pytest_qlab import Lab
from pytest_qlab.calibration.stream import BlockCall, capture_calls
from pytest_qlab.methods.awq import Awq, is_clipped
from pytest_qlab.models.folds import discover_folds
from pytest_qlab.models.structure import LinearSite, decoder_blocks, quantizable_linears
from pytest_qlab.parallel import ordered_map

HEADER = (
    "work",
    "time",
    "products alone",
    "time / products'",
    "processor time",
    "products alone",
    "processor time / products'",
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "scaled_dot_product")
NOTES = [
    "Each row starts with a loaded model and an empty store and ends with what it leaves on disk. "
    "The products run alone, on as many threads, on tensors of the same shapes. They are:",
    "- a forward pass: every matrix product and every attention that the blocks run for one "
    "sequence, recorded from the model, times the sequences;\n"
    "- calibration: one forward pass; the Gram matrix of every input of linears: half of a full "
    "product, since it is symmetric;\n"
    "- gptq: two forward passes, the first without what comes after the last input of each block, "
    "the second without the last block; Gram matrices; one Cholesky factorization for each; the "
    "updates of all later columns: half of a product of the Gram matrix with the weight;\n"
    "- awq: calibration; for each of the 20 scales of inputs that can be scaled, the error through "
    "the Gram matrix: half of a product with the weight; for each of the 10 clipping limits, the "
    "product of the groups' errors with their blocks of the Gram matrix;\n"
    "- rtn: none.",
]

Task = Callable[[], object]


@dataclass
class Products:
    """The products of one block of a model: of a sequence's forward, and of each shared input.

    Attributes:
        forward: of a whole forward.
        until_last: of them, those before the last linear's input is known.
        gram: of one sequence.
        factor: for each shared input: a Cholesky factorization, and GPTQ's updates.
        search: for each shared input: the errors of AWQ's candidates.
    """

    forward: list[Task] = field(default_factory=list)
    until_last: int = 0
    gram: list[Task] = field(default_factory=list)
    factor: list[Task] = field(default_factory=list)
    search: list[Task] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every matrix product with its tensors, to be run again."""

    def __init__(self, found: list[Task]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.lstrip("_")
        if name.startswith("scaled_dot_product") or name in PRODUCTS:
            self._found.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def products_of(lab: Lab) -> list[Products]:
    """Record every block's products on the first calibration sequence."""
    blocks = decoder_blocks(lab.base_model)
    with torch.no_grad():
        calls = capture_calls(lab.base_model, blocks, lab.calibration.sequences[0])
        return [
            _of_block(name, block, call) for (name, block), call in zip(blocks, calls, strict=True)
        ]


def _of_block(name: str, block: nn.Module, call: BlockCall) -> Products:
    made = Products()
    sites = quantizable_linears(block, name)
    inputs: dict[str, Tensor] = {}

    def see(site: LinearSite, tokens: Tensor) -> None:
        inputs[site.name] = tokens.reshape(-1, tokens.shape[-1])
        made.until_last = len(made.forward)

    handles = [
        site.module.register_forward_pre_hook(lambda _module, args, site=site: see(site, args[0]))
        for site in sites
    ]
    with _Recorder(made.forward):
        call(block, call.hidden)
    for handle in handles:
        handle.remove()
    groups = call.groups
    folds = discover_folds(block, lambda: call(block, call.hidden), sites, name)
    scaled = {layer for fold in folds for layer in fold.layers}
    for number in sorted(set(groups.values())):
        shared = [site for site in sites if groups[site.name] == number and site.name in inputs]
        if shared:
            _of_input(made, shared, inputs[shared[0].name], scaled)
    return made


def _of_input(
    made: Products, shared: Sequence[LinearSite], tokens: Tensor, scaled: Collection[str]
) -> None:
    columns = tokens.shape[1]
    half = tokens[: -(-len(tokens) // 2)]
    gram = tokens.T @ tokens + torch.eye(columns)
    weight = torch.cat([site.weight() for site in shared])
    made.gram.append(lambda: half.T @ half)
    made.factor += [lambda: torch.linalg.cholesky(gram)]
    made.factor += [lambda: gram[: -(-columns // 2)] @ weight.T]
    awq = Awq()
    if shared[0].name in scaled:
        rows = weight[: -(-len(weight) // 2)]
        made.search += [lambda: rows @ gram] * awq.n_grid
    clipped = [site.weight() for site in shared if is_clipped(site.name)]
    if clipped:
        length = min(awq.group_size, columns)
        some = torch.cat(clipped)[:, : columns // length * length]
        groups = some.view(len(some), -1, length).transpose(0, 1).contiguous()
        diagonal = gram[:length, :length].expand(len(groups), length, length).contiguous()
        made.search += [lambda: torch.bmm(groups, diagonal)] * int(awq.max_shrink * awq.n_grid)


def run_products(method: str, blocks: Sequence[Products], sequences: int, threads: int) -> None:
    """Run what a method needs, nothing else: see NOTES."""
    for index, block in enumerate(blocks):
        gptq, last = method == "gptq", index + 1 == len(blocks)
        first = block.forward[: block.until_last] if gptq else block.forward
        again = block.forward if gptq and not last else []
        _spread([[*first, *block.gram, *again]] * sequences, threads)
        if method != "calibration":
            _spread([[task] for task in (block.factor if gptq else block.search)], threads)


def _spread(batches: Sequence[Sequence[Task]], threads: int) -> None:
    def run(batch: Sequence[Task]) -> None:
        for task in batch:
            task()

    for _ in ordered_map(run, batches, threads):
        pass


@dataclass
class Times:
    """Wall and processor seconds in every repetition."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add what happens inside."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def benchmark_products(benchmark: Benchmark) -> Section:
    """Repeat each piece of work and its products in turns."""
    work: dict[str, Callable[[Lab], object]] = {
        "calibration": lambda lab: lab.statistics(gram=True),
        **{
            method: lambda lab, method=method: lab.candidate(method).checkpoint  # type: ignore[misc]
            for method in ("gptq", "awq", "rtn")
        },
    }
    ours = {name: Times() for name in work}
    alone = {name: Times() for name in work if name != "rtn"}
    with TemporaryDirectory(prefix="qlab-bench-") as directory:
        judge = benchmark.lab(Path(directory))
        load(judge)
        blocks = products_of(judge)
        sequences = len(judge.calibration.sequences)
        for repetition in range(benchmark.repeat):
            for name, run in work.items():
                say(f"products: {name}, repetition {repetition + 1}/{benchmark.repeat}")
                with TemporaryDirectory(prefix="qlab-bench-") as store:
                    lab = benchmark.lab(Path(store))
                    load(lab)
                    with ours[name].timed():
                        run(lab)
                if name in alone:
                    with alone[name].timed():
                        run_products(name, blocks, sequences, benchmark.threads)
    section = Section("Quantization and its matrix products", HEADER, notes=NOTES)
    section.rows = [_row(name, ours[name], alone.get(name)) for name in work]
    section.raw = {
        "ours": {name: vars(times) for name, times in ours.items()},
        "products": {name: vars(times) for name, times in alone.items()},
    }
    return section


def _row(name: str, ours: Times, alone: Times | None) -> list[str]:
    cells = [name]
    for clock in ("wall", "processor"):
        spent = Sample(tuple(getattr(ours, clock)))
        cells.append(seconds(spent))
        if alone is None:
            cells += ["0", "-"]
        else:
            needed = Sample(tuple(getattr(alone, clock)))
            cells += [seconds(needed), ratio(spent.over(needed))]
    return cells
