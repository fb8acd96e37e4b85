"""The benchmarks beside gptqmodel: the child program with a stand-in for the library."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peer_gptqmodel import dequantized, keep_to_cores
from benchmarks.peers import GPTQMODEL, PLACES, PeerMissingError, ask
from benchmarks.quantizers import benchmark_quantizer
from benchmarks.run import main
from tests.benchmarks.test_benchmarks import FAKE_PEER, fake_python, tiny_benchmark
from tests.lab.tiny import saved_tiny_model

# One packed layer, all of whose codes are 9 and zero points 8, with the scale 1/2 in each row.
STAND_IN = """
import json
import torch

def QuantizeConfig(**options):
    return options

class Model:
    def __init__(self, path, options, dtype):
        self.made = {"path": path, "options": options, "dtype": str(dtype)}
        self.model = torch.nn.ModuleDict({"layer": torch.nn.Identity()})

    def quantize(self, rows, **options):
        self.made |= {"rows": rows, "threads": torch.get_num_threads()}
        layer = self.model["layer"]
        layer.qweight = torch.full((2, 8), 0x99999999 - 2**32, dtype=torch.int32)
        layer.qzeros = torch.full((1, 1), 0x88888888 - 2**32, dtype=torch.int32)
        layer.scales = torch.full((1, 8), 0.5, dtype=torch.float16)
        layer.g_idx = torch.zeros(16, dtype=torch.int32)
        json.dump(self.made, open("made.json", "w"))

class GPTQModel:
    load = Model
"""


def pack(numbers: list[int]) -> int:
    """Eight numbers of 4 bits as a signed 32-bit word, the first in the lowest bits."""
    word = sum(number << 4 * place for place, number in enumerate(numbers))
    return word - 2**32 if word >= 2**31 else word


def test_packed_layers_are_taken_apart() -> None:
    """16 inputs, 8 outputs, two groups that take turns, as act-order leaves them."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 8), generator=generator)
    zeros = torch.randint(0, 16, (2, 8), generator=generator)
    scales = (torch.rand(2, 8, generator=generator) + 0.1).half()
    words = [[pack(codes[i : i + 8, j].tolist()) for j in range(8)] for i in (0, 8)]
    layer = SimpleNamespace(
        qweight=torch.tensor(words, dtype=torch.int32),
        qzeros=torch.tensor([[pack(row)] for row in zeros.tolist()], dtype=torch.int32),
        scales=scales,
        g_idx=torch.tensor([0, 1] * 8, dtype=torch.int32),
    )
    found = dequantized(layer, 4)
    assert found.shape == (8, 16)
    assert found.dtype == torch.float32
    for out in range(8):
        for column in range(16):
            group = column % 2
            step = int(codes[column, out]) - int(zeros[group, out])
            assert float(found[out, column]) == step * float(scales[group, out])


@pytest.mark.parametrize(("threads", "workers", "cores"), [(1, "2", [3]), (3, "3", [3, 5, 7])])
def test_its_workers_share_the_cores_that_ours_would_have(
    threads: int, workers: str, cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = dict[int, list[int]]()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {7, 3, 5, 9}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", kept.__setitem__, raising=False)
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "99")
    keep_to_cores(threads)
    assert os.environ["GPTQMODEL_CPU_WORKERS"] == workers
    assert kept == {0: cores}


def test_the_child_asks_for_our_options_and_writes_what_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    info = place / "gptqmodel-7.7.dist-info"
    for folder in (place / "gptqmodel", info):
        folder.mkdir(parents=True)
    (place / "gptqmodel" / "__init__.py").write_text(STAND_IN)
    (place / "gptqmodel" / "extension.py").write_text("def is_available(name): return False\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gptqmodel\nVersion: 7.7\n")
    monkeypatch.setenv("PYTHONPATH", str(place))
    pythons = {GPTQMODEL.option: sys.executable}
    answer = ask("gptqmodel", pythons, "gptq", tmp_path, [[5, 6]], threads=1, work=tmp_path)
    assert answer.versions["gptqmodel"] == "7.7"
    assert answer.tensors["layer.weight"].equal(torch.full((8, 16), 0.5))
    assert load_file(tmp_path / "weights.safetensors").keys() == {"layer.weight"}
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["path"] == str(tmp_path)
    assert made["dtype"] == "torch.float32"
    assert made["rows"] == [{"input_ids": [5, 6], "attention_mask": [1, 1]}]
    assert made["threads"] == 1
    asked = made["options"]
    assert (asked["bits"], asked["group_size"], asked["damp_percent"]) == (4, 128, 0.01)
    assert asked["desc_act"]
    assert asked["static_groups"]
    assert not asked["sym"]
    assert asked["format"] == "gptq_v2", "zero points are not less one"
    assert not asked["true_sequential"]


def test_without_the_library_the_table_says_how_to_install_it(tmp_path: Path) -> None:
    bare_python = tmp_path / "python"
    bare_python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S \"$@\"\n")
    bare_python.chmod(0o755)
    pythons = {GPTQMODEL.option: str(bare_python)}
    words = (
        r"of --gptqmodel-python lacks gptqmodel\. Install .* `python3 -m venv \.gptqmodel` .*"
        r"--no-deps -r benchmarks/requirements-gptqmodel\.txt"
    )
    with pytest.raises(PeerMissingError, match=words):
        ask("gptqmodel", pythons, "gptq", tmp_path, [[1]], threads=1, work=tmp_path)
    assert PLACES["gptqmodel"][1] is GPTQMODEL
    assert (Path(__file__).parents[2] / GPTQMODEL.arguments.split()[-1]).is_file()
    benchmark = tiny_benchmark(saved_tiny_model(tmp_path / "model"), peers_python="not this one")
    made = benchmark_quantizer("gptq", benchmark, library="gptqmodel")
    assert made.rows[-1][0] == "gptqmodel"
    assert "no --gptqmodel-python is given. Install" in made.rows[-1][1]
    assert [row[2] for row in made.rows] == ["-"] * 3


def test_gptq_is_judged_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_tiny_model(tmp_path / "model")
    python = fake_python(tmp_path, FAKE_PEER)
    out = tmp_path / "out.json"
    arguments = ["--only=gptqmodel", "--repeat=1", f"--model={model}", "--threads=1"]
    arguments += ["--windows=2", "--sequences=3", "--length=24", f"--json={out}"]
    assert main([*arguments, f"--gptqmodel-python={python}"]) == 0
    printed = capsys.readouterr().out
    assert "### GPTQ, 4 bits, groups of 128, with zero points, beside gptqmodel" in printed
    assert "Comparison environment: fake 1.0; act-order with static groups" in printed
    assert "llmcompressor" not in printed
    results = json.loads(out.read_text())["gptqmodel"]
    assert results["gptqmodel"]["times"] == [1e9]
    assert set(results["ours"]) == {"gptq", "rtn"}
    # Its weights are the original ones rounded to sixteenths, coarser than 4 bits with scales.
    assert results["gptqmodel"]["whole"] > results["ours"]["rtn"]["whole"] > 0
