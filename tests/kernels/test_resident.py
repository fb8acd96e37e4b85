"""What kernels say that they keep: by hand from shapes, and as a process of their own finds it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pytest_qlab.formats import PerTokenSymmetric
from pytest_qlab.kernels import int4
from pytest_qlab.kernels.int4 import Int4CpuLinear, Int4CudaLinear
from pytest_qlab.kernels.int8 import Int8Linear
from pytest_qlab.kernels.linear import PackedLinear
from pytest_qlab.kernels.real import has_operator
from pytest_qlab.kernels.w8a8 import W8A8CpuLinear, W8A8CudaLinear
from pytest_qlab.metrics.memory import peak_temporary_bytes, resident_bytes
from tests.kernels.packing import random_case

needs_kernels = pytest.mark.skipif(
    not has_operator("aten", "_weight_int4pack_mm_for_cpu")
    or not has_operator("onednn", "qlinear_prepack"),
    reason="this build of torch has no int4 and int8 kernels for CPUs",
)


def int4_layer(
    rows: int, columns: int, group: int = 128, *, scattered: bool = False
) -> PackedLinear:
    return random_case(rows, columns, group, scattered=scattered).layer()


def int8_layer(rows: int, columns: int, *, inputs: bool = False) -> PackedLinear:
    activation = PerTokenSymmetric(8) if inputs else None
    return random_case(rows, columns, -1, bits=8, symmetric=True).layer(activation=activation)


@needs_kernels
def test_int4_keeps_half_a_byte_a_weight_and_four_bytes_a_group() -> None:
    module = Int4CpuLinear(int4_layer(128, 256, 64))
    assert resident_bytes(module) == 128 * 256 // 2 + 4 * 128 * (256 // 64)
    sorting = Int4CpuLinear(int4_layer(128, 256, 64, scattered=True))
    assert resident_bytes(sorting) == resident_bytes(module) + 8 * 256, "the order of the columns"


def test_int4_on_cuda_keeps_the_formats_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's result has the shape that it documents; only its bytes matter here."""

    def shaped(pairs: Tensor, inner: int) -> Tensor:
        rows, columns = pairs.shape[0], 2 * pairs.shape[1]
        return torch.zeros(rows // 8, columns // (inner * 16), 32, inner // 2, dtype=torch.int32)

    monkeypatch.setattr(int4, "pack_cuda", shaped)
    source = int4_layer(64, 256, 64)
    groups = 256 // 64
    formats = 64 * 256 // 2 + 64 * groups * source.packed.tensors()["scales"].element_size()
    zeros = 64 * groups // 2
    assert resident_bytes(source) == formats + zeros
    module = Int4CudaLinear(source)
    assert resident_bytes(module) == 64 * 256 // 2 + 4 * 64 * groups + formats + zeros


@needs_kernels
def test_int8_keeps_a_byte_a_weight_and_two_bytes_a_row() -> None:
    assert resident_bytes(Int8Linear(int8_layer(48, 96))) == 48 * 96 + 2 * 48


def test_int8_on_cuda_keeps_scales_and_sums_of_four_bytes_a_row() -> None:
    assert resident_bytes(W8A8CudaLinear(int8_layer(48, 96, inputs=True))) == 48 * 96 + 8 * 48


@needs_kernels
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (17, 33), (256, 512), (1024, 1024)])
def test_onednn_keeps_whole_blocks_and_sums_of_rows(rows: int, columns: int) -> None:
    """Blocks of at most 64 by 64; at most two sums of four bytes for each of their rows."""
    found = resident_bytes(W8A8CpuLinear(int8_layer(rows, columns, inputs=True))) - 4 * rows
    height, width = (64 * math.ceil(each / 64) for each in (rows, columns))
    assert rows * columns <= found <= height * width + 8 * height


PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
LAYERS = {
    "Int4CpuLinear": int4_layer,
    "Int8Linear": int8_layer,
    "W8A8CpuLinear": lambda rows, columns: int8_layer(rows, columns, inputs=True),
}
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from pytest_qlab.metrics.memory import resident_bytes
from tests.kernels import test_resident as here

def resident():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * here.PAGE

torch.set_num_threads(1)
name, rows, columns, count = sys.argv[1], *map(int, sys.argv[2:])
source, kind = here.LAYERS[name](rows, columns), getattr(here, name)
x = torch.ones(3, columns, dtype=torch.bfloat16)
kind(source)(x)
before = resident()
kept = [kind(source) for _ in range(count)]
for each in kept:
    each(x)
print(json.dumps([resident() - before, sum(map(resident_bytes, kept))]))
"""


def measured_and_said(kind: str, rows: int, columns: int, count: int) -> tuple[int, int]:
    """Bytes that a process has more with so many layers, each of which has multiplied."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, *map(str, (rows, columns, count))],
        capture_output=True,
        text=True,
        check=True,
        # Freed memory goes back to the system at once.
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    measured, said = json.loads(done.stdout)
    return measured, said


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_process_has_as_much_more_as_they_say(kind: str) -> None:
    measured, said = measured_and_said(kind, 2048, 1024, 24)
    assert abs(measured - said) < 0.1 * said + 4 * 2**20


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_padding_of_onednns_layout_is_said() -> None:
    """Of a narrow layer it is most; a module and its other tensors take up to two pages."""
    measured, said = measured_and_said("W8A8CpuLinear", 33, 130, 3000)
    assert abs(measured - said) < 3000 * 2 * PAGE
    assert said > 3000 * (33 * 130 + 4 * 33)


@needs_kernels
@pytest.mark.parametrize("scattered", [False, True])
def test_packing_int4_takes_little_memory(scattered: bool) -> None:
    """A piece's codes in four bytes, and some in one, beside what the module keeps."""
    source = int4_layer(4096, 2048, scattered=scattered)
    kept: list[nn.Module] = []
    peak = peak_temporary_bytes(lambda: kept.append(Int4CpuLinear(source)))
    assert peak < resident_bytes(kept[0]) + 16 * int4.PIECE_ELEMENTS < 4096 * 2048 * 2


@pytest.mark.parametrize("rows", [64, 512])
def test_tiles_of_int4_take_little_memory(rows: int) -> None:
    """A tile in bfloat16, its bytes, half of its codes, its product, and scales."""
    m, n = 4096, 4096
    layer, x = Int4CpuLinear(int4_layer(m, n)), torch.zeros(rows, n, dtype=torch.bfloat16)
    peak = peak_temporary_bytes(lambda: layer.dense_multiply(x))
    product = rows * m * 2
    tile = int4.TILE_ROWS * (n * (2 + 0.5 + 0.5) + rows * 2)
    assert product + int4.TILE_ROWS * n * 2 < peak < product + 1.5 * tile < product + m * n
