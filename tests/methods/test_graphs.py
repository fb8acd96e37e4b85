"""Walks over columns as graphs, held by a recorder that replays operations on fixed memory.

A CUDA graph is a list of operations with the addresses they read and write: nothing of Python runs
again, and what Python decided from a tensor's value stays as it was. `CpuRecording` is that on a
CPU: it notes the operations of the dispatcher with their tensors, refuses those that make a GPU
wait, and runs them again into the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pytest_qlab.solvers import graphs
from pytest_qlab.solvers.codebook import Codebook
from pytest_qlab.solvers.codebooks import (
    Float4,
    Float8,
    Mxfp4,
    NormalFloat4,
    Nvfp4,
    UniformGroups,
)
from pytest_qlab.solvers.gptq import gptq_solve
from pytest_qlab.solvers.graphs import FEWEST_CALLS, Graphed
from pytest_qlab.solvers.grid import GridRule
from pytest_qlab.solvers.ldlq import ldlq
from pytest_qlab.solvers.spqr import SpqrRule, spqr_solve
from pytest_qlab.solvers.tables import RowTables

WAITING = (
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"),
    "lift_fresh",  # numbers of Python become a tensor: a copy from the host
)


class CpuRecording(TorchDispatchMode):
    """What a graph is, on a CPU.

    Attributes:
        launches: operations that would be kernels.
        replays: how often they were run again.
    """

    made: list[CpuRecording] = []  # noqa: RUF012

    def __init__(self, function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._results: list[Any] = []
        self.replays = 0
        with self:
            self.outputs = function()
        self.made.append(self)

    @property
    def launches(self) -> int:
        return len(self._operations)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING or (name == "index" and _selects(args)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **(kwargs or {}))
        if not func.is_view and name != "squeeze_":
            self._operations.append((func, *tree_map_only(Tensor, _same, (args, kwargs or {}))))
            self._results.append(tree_map_only(Tensor, _same, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for (func, args, kwargs), result in zip(self._operations, self._results, strict=True):
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def _same(tensor: Tensor) -> Tensor:
    """The same memory in a tensor of its own, whose shape nobody changes."""
    return torch.ops.aten.alias(tensor)  # type: ignore[no-any-return]


def _selects(args: tuple[Any, ...]) -> bool:
    return any(each is not None and each.dtype == torch.bool for each in args[1])


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CpuRecording]]:
    """Everything is recorded, as on CUDA; a warning that it could not be is an error."""
    monkeypatch.setattr(graphs, "recorder", lambda device: CpuRecording)
    monkeypatch.setattr(CpuRecording, "made", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield CpuRecording.made


def layer(rows: int = 12, columns: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, one of them always 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(3 * columns, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator)
    inputs[:, 7] = 0
    return weight, inputs.T @ inputs


CODEBOOKS: dict[str, Codebook] = {
    "float4": Float4(64),
    "float8": Float8(),
    "mxfp4": Mxfp4(),
    "normal-float4": NormalFloat4(64),
    "nvfp4": Nvfp4(),
    "tables": RowTables(3),
    "uniform": UniformGroups(GridRule(bits=4), 32),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 32},
        {"group_size": 32, "static_groups": True, "desc_act": True},
        {"group_size": 16, "desc_act": True},
    ],
    ids=str,
)
def test_gptq_replayed_is_gptq(
    options: dict[str, Any],
    recordings: list[CpuRecording],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, gram = layer()
    recorded = gptq_solve(weight, gram, GridRule(bits=3), block_size=32, **options)
    (recording,) = recordings
    assert recording.replays == 160 // 32  # once to be checked, then for all blocks but the first
    monkeypatch.undo()
    plain = gptq_solve(weight, gram, GridRule(bits=3), block_size=32, **options)
    assert torch.equal(recorded.quantized.codes, plain.quantized.codes)
    assert recorded.loss == pytest.approx(plain.loss)


@pytest.mark.parametrize("greedy_passes", [0, 2])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_ldlq_replayed_is_ldlq(
    codebook: str,
    greedy_passes: int,
    recordings: list[CpuRecording],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, gram = layer()
    points = CODEBOOKS[codebook].fit(weight)
    options: dict[str, Any] = {"block_size": 32, "greedy_passes": greedy_passes}
    recorded = ldlq(weight, gram, points, order="active", **options)
    assert len(recordings) == 1 + bool(greedy_passes)
    monkeypatch.undo()
    plain = ldlq(weight, gram, points, order="active", **options)
    assert torch.equal(recorded.codes, plain.codes)
    assert recorded.loss == pytest.approx(plain.loss)


@pytest.mark.parametrize("outlier_threshold", [0.2, float("inf")])
def test_spqr_replayed_is_spqr(
    outlier_threshold: float, recordings: list[CpuRecording], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = layer()
    rule = SpqrRule(bits=3, outlier_threshold=outlier_threshold)
    recorded = spqr_solve(weight, gram, rule)
    (recording,) = recordings
    assert recording.replays == 160 // rule.group_size
    monkeypatch.undo()
    plain = spqr_solve(weight, gram, rule)
    assert torch.equal(recorded.codes, plain.codes)
    assert torch.equal(recorded.outliers, plain.outliers)
    assert bool(plain.outliers.any()) == (outlier_threshold < 1)


def test_a_column_of_gptq_is_five_launches(recordings: list[CpuRecording]) -> None:
    """The count that makes it launch-bound where each is launched by itself."""
    weight, gram = layer(columns=512)
    gptq_solve(weight, gram, GridRule(bits=4), group_size=128, static_groups=True)
    (recording,) = recordings
    products_and_buffers = 128 // 32 + 2
    # `addmv_` and `div`, `round_`, `clamp`, `addcmul`, for each of a block's 128 columns.
    assert recording.launches == 5 * 128 + products_and_buffers


def scaled(values: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    values.mul_(factor)
    return values + 1, values


def test_the_calls_after_the_first_are_replays(recordings: list[CpuRecording]) -> None:
    graphed = Graphed(scaled, torch.device("cpu"), FEWEST_CALLS)
    kept = []
    for n in range(FEWEST_CALLS):
        more, same = graphed(torch.full((3,), float(n)), torch.tensor(2.0))
        assert same.tolist() == [2 * n] * 3
        kept.append(more)
    assert recordings[0].replays == FEWEST_CALLS
    # Results are the caller's: no later replay writes into them.
    assert [each[0].item() for each in kept] == [2 * n + 1 for n in range(FEWEST_CALLS)]


def test_another_shape_is_walked(recordings: list[CpuRecording]) -> None:
    graphed = Graphed(scaled, torch.device("cpu"), FEWEST_CALLS)
    graphed(torch.ones(3), torch.tensor(2.0))
    more, _ = graphed(torch.ones(2), torch.tensor(2.0))
    assert more.tolist() == [3, 3]
    assert recordings[0].replays == 1


def test_few_calls_are_not_recorded(recordings: list[CpuRecording]) -> None:
    graphed = Graphed(scaled, torch.device("cpu"), FEWEST_CALLS - 1)
    more, _ = graphed(torch.ones(3), torch.tensor(2.0))
    assert more.tolist() == [3, 3, 3]
    assert recordings == []


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert graphs.recorder(torch.device("cpu")) is None
    assert graphs.recorder(torch.device("cuda", 0)) is graphs.CudaRecording


def waits(values: Tensor) -> tuple[Tensor, ...]:
    return (values + values.sum().item(),)


def decides(values: Tensor) -> tuple[Tensor, ...]:
    """Adds what Python counted: a graph would add the first call's number for ever."""
    decides.calls += 1  # type: ignore[attr-defined]
    return (values + decides.calls,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("walk", "reason"),
    [(waits, "not permitted when stream is capturing"), (decides, "it gives other numbers")],
)
def test_what_cannot_be_replayed_is_walked_and_said(
    walk: Callable[..., tuple[Tensor, ...]],
    reason: str,
    recordings: list[CpuRecording],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decides, "calls", 0, raising=False)
    graphed = Graphed(walk, torch.device("cpu"), FEWEST_CALLS)
    with pytest.warns(RuntimeWarning, match=reason):
        graphed(torch.ones(2))
    found = [graphed(torch.full((2,), float(n)))[0] for n in range(2)]
    expected = [[0, 0], [3, 3]] if walk is waits else [[3, 3], [5, 5]]
    assert [each.tolist() for each in found] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_gptq_on_cuda_is_gptq() -> None:
    weight, gram = layer(rows=64, columns=1024)
    rule = GridRule(bits=4)
    options: dict[str, Any] = {"group_size": 128, "static_groups": True}
    plain = gptq_solve(weight.double(), gram.double(), rule, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gptq_solve(weight.double().cuda(), gram.double().cuda(), rule, **options)
    same = found.quantized.codes.cpu() == plain.quantized.codes
    assert float(same.to(torch.float32).mean()) > 0.999
    assert found.loss == pytest.approx(plain.loss, rel=1e-3)
