"""Methods beside other libraries: the models that are evaluated, and the table of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import libraries
from benchmarks.libraries import PAIRS, Pair, int8_inputs, kl_of, model_of
from benchmarks.peer_llmcompressor import SCHEMES
from benchmarks.peer_weights import QUANTIZERS
from benchmarks.run import main
from pytest_qlab.checkpoint import Checkpoint
from pytest_qlab.formats.activations import PerTokenSymmetric
from tests.benchmarks.test_benchmarks import FAKE_PEER, fake_python
from tests.lab.tiny import saved_tiny_model, tiny_lab


def answer_of(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a child that had made this checkpoint would have written."""
    tensors = {f"{k}.weight": v.weight.dequantize() for k, v in checkpoint.layers().items()}
    others = checkpoint.others().items()
    return tensors, {f"{name}.changed": value for name, value in others if "layernorm" in name}


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        ("rtn:bits=3", None),
        ("awq:bits=3:group_size=8", None),
        ("smoothquant:activation_bits=4", PerTokenSymmetric(4)),
    ],
)
def test_a_model_of_ours_has_the_same_divergence_either_way(
    spec: str, inputs: Callable[[Tensor], Tensor] | None, tmp_path: Path
) -> None:
    """Norms, weights and rounded inputs arrive: all that our own evaluation sees."""
    lab = tiny_lab(tmp_path)
    candidate = lab.candidate(spec)
    tensors, changed = answer_of(candidate.checkpoint)
    found = kl_of(lab, model_of(lab, tensors, changed, inputs))
    assert found == pytest.approx(float(candidate.kl.mean), rel=1e-5)
    assert found > 0
    before = lab.base_model.get_parameter("model.layers.0.input_layernorm.weight")
    assert before.equal(
        tiny_lab(tmp_path / "other").base_model.model.layers[0].input_layernorm.weight
    )


def test_int8_inputs_are_rounded_to_255_steps() -> None:
    x = torch.tensor([[-127.5, 0.4, 127.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
    # Half to even; the greatest number of its scale is 127.
    assert int8_inputs(x).tolist() == [[-128.0, 0.0, 127.0, 3.0], [0.0, 0.0, 0.0, 0.0]]


def test_every_pair_names_a_method_of_both_sides(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    for pair in PAIRS:
        assert all(lab.candidate(spec) for spec in pair.ours)
        if pair.library == libraries.OTHER:
            assert pair.method in {*SCHEMES, "gptq", "awq"}
        elif pair.library == "gptqmodel":
            assert pair.method == "gptq"
        else:
            assert QUANTIZERS[pair.method][0] == pair.library


def test_the_table_has_a_row_for_each_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a peer that rounds to sixteenths, and so is far from ours of 8 bits."""
    pairs = (
        Pair(("rtn:bits=8", "rtn"), "hqq", "16ths", "hqq"),
        Pair(("rtn",), "gptqmodel", "there, too", "gptq"),
    )
    monkeypatch.setattr(libraries, "PAIRS", pairs)
    model = saved_tiny_model(tmp_path / "model")
    out = tmp_path / "out.json"
    arguments = ["--only=libraries", f"--model={model}", "--threads=1", "--windows=2"]
    arguments += ["--sequences=3", "--length=24", f"--json={out}"]
    assert main(arguments) == 0
    assert "no --peers-python is given. Install" in capsys.readouterr().out
    python = fake_python(tmp_path, FAKE_PEER.replace("scale[::2] = 2", "pass"))
    assert main([*arguments, f"--peers-python={python}"]) == 0
    printed = capsys.readouterr().out
    assert "no --gptqmodel-python is given. Install" in printed
    assert "Comparison environment of `--peers-python`: fake 1.0." in printed
    assert "Comparison environment of `--gptqmodel-python`" not in printed
    lines = [line.split("|") for line in printed.splitlines() if "16ths" in line]
    assert [line[3].strip() for line in lines] == ["`rtn:bits=8`", "`rtn`"]
    first, second = json.loads(out.read_text())["libraries"].values()
    assert first["kl_theirs"] == second["kl_theirs"] > first["kl_ours"] > 0
    # Rounding to 8 bits is nearly none, so that the two are as far apart as theirs from the model.
    assert first["apart"] == pytest.approx(1, abs=0.02)
    assert second["apart"] > 1
