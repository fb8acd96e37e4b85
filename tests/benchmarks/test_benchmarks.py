"""The benchmarks' arithmetic, tables, and protocol with the other library. Nothing is timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.peers import (
    PeerError,
    PeerMissingError,
    fit_scales,
    original_weights,
    run_peer,
    unscaled,
)
from benchmarks.products import Products, products_of, run_products
from benchmarks.quantizers import benchmark_quantizer, layer_errors, weights_of
from benchmarks.run import main, parse
from benchmarks.runs import RunError, run_example, section
from benchmarks.settings import Benchmark
from benchmarks.suite import PHASES, bare, compare, rows
from benchmarks.tables import Sample, Section, number, ratio, seconds, table
from pytest_qlab.measuring.floor import WINDOWS as FLOOR_WINDOWS
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears
from tests.lab.tiny import saved_tiny_model, tiny_lab

# Rounds every linear to multiples of 1/16, after doubling the columns at even places.
FAKE_PEER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file

job = json.load(open(sys.argv[1]))
assert len(json.load(open(job["tokens"]))[0]) == 24, "not the tokens that were asked for"
made = {}
for key, weight in load_file(job["model"] + "/model.safetensors").items():
    if key.endswith("_proj.weight"):
        scale = torch.ones(weight.shape[1])
        scale[::2] = 2
        name = key.removesuffix(".weight")
        made[name + ".before"] = weight * scale
        made[name + ".weight"] = (weight * scale * 16).round() / 16
save_file(made, job["weights"])
answer = {"seconds": 1e9, "versions": {"fake": "1.0"}}
json.dump(answer, open(job["result"], "w"))
"""


def fake_python(directory: Path, program: str) -> str:
    """An executable that is called as `python SCRIPT JOB` and runs a program of ours on the job."""
    script, executable = directory / "fake.py", directory / "python"
    script.write_text(program)
    executable.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{script}' \"$2\"\n")
    executable.chmod(0o755)
    return str(executable)


def tiny_benchmark(model: Path, peers_python: str | None = None) -> Benchmark:
    return Benchmark(str(model), 2, 1, 2, 3, 24, ("none", "rtn"), peers_python)


def test_a_ratio_is_taken_within_each_repetition() -> None:
    slow_start = Sample((8.0, 2.0, 3.0)).over(Sample((4.0, 2.0, 2.0)))
    assert slow_start.values == (2.0, 1.0, 1.5)
    assert slow_start.median == 1.5
    assert ratio(slow_start) == "1.50x (1.00 to 2.00)"
    with pytest.raises(ValueError, match="3 and 1 repetitions"):
        slow_start.over(Sample((1.0,)))


def test_samples_add_and_scale_per_repetition() -> None:
    assert Sample((1.0, 2.0)).plus(Sample((10.0, 30.0))).times(2).values == (22.0, 64.0)
    assert seconds(Sample((0.25,))) == "0.250 s"
    with pytest.raises(ValueError, match="at least one"):
        Sample(())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.00012345, "1.23e-04"),
        (0.0567, "0.0567"),
        (0.7, "0.700"),
        (12.34, "12.3"),
        (99.96, "100"),
        (1234.5, "1234"),
        (2.5e7, "2.50e+07"),
    ],
)
def test_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_tables_are_markdown() -> None:
    assert table(("a", "long name"), [["x|y", "1"]]) == [
        "| a    | long name |",
        "|------|-----------|",
        "| x\\|y | 1         |",
    ]
    with pytest.raises(ValueError, match="1 cells does not fit 2 columns"):
        table(("a", "b"), [["x"]])
    text = Section("Title", ("a",), [["1"]], ["A note."]).markdown()
    assert text == "### Title\n\nA note.\n\n| a |\n|---|\n| 1 |\n"


def test_runs_are_compared_with_the_first() -> None:
    made = section("Runs", {"cold": [10.0, 20.0], "warm": [5.0, 5.0]})
    assert [row[2] for row in made.rows] == ["1", "0.375x (0.250 to 0.500)"]
    assert made.raw == {"cold": [10.0, 20.0], "warm": [5.0, 5.0]}


def test_scales_of_rows_and_columns_are_taken_back() -> None:
    torch.manual_seed(0)
    original = torch.randn(6, 9)
    original[0, 0] = original[3, 2] = 0
    rows, columns = torch.rand(6) + 0.5, torch.rand(9) + 0.5
    before = rows[:, None] * original * columns
    found_rows, found_columns = fit_scales(before, original)
    torch.testing.assert_close(
        (found_rows[:, None] * found_columns).float(), rows[:, None] * columns
    )
    rounded = (before * 8).round() / 8
    torch.testing.assert_close(
        unscaled(rounded, before, original, "layer"), rounded / (rows[:, None] * columns)
    )


def test_an_answer_that_makes_no_sense_is_refused() -> None:
    original = torch.randn(4, 4)
    with pytest.raises(PeerError, match="no rescaling"):
        unscaled(original, original + 1, original, "layer")
    with pytest.raises(PeerError, match=r"shape \(2, 4\)"):
        unscaled(original[:2], None, original, "layer")
    with pytest.raises(PeerError, match="first is b"):
        original_weights({"a.weight": original}, {"a": original, "b": original})


def test_without_the_library_the_table_says_how_to_install_it(tmp_path: Path) -> None:
    bare_python = tmp_path / "python"
    bare_python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S \"$@\"\n")
    bare_python.chmod(0o755)
    with pytest.raises(
        PeerMissingError, match=r"lacks llmcompressor\. Install the .* -r benchmarks.requirements"
    ):
        run_peer(str(bare_python), "gptq", tmp_path, [[1]], threads=1, work=tmp_path)
    with pytest.raises(PeerMissingError, match="cannot be run"):
        run_peer(str(tmp_path / "none"), "gptq", tmp_path, [[1]], threads=1, work=tmp_path)
    made = benchmark_quantizer("gptq", tiny_benchmark(saved_tiny_model(tmp_path / "model")))
    assert "no --peers-python is given. Install" in made.rows[-1][1]
    assert [row[2] for row in made.rows] == ["-"] * 3


def test_a_failing_peer_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    for program, words in (("raise SystemExit('out of luck')", "out of luck"), ("", "no answer")):
        python = fake_python(tmp_path, program)
        with pytest.raises(PeerError, match=words.replace("no answer", "without an answer")):
            run_peer(python, "gptq", tmp_path, [[1]], threads=1, work=tmp_path)


def test_a_peer_imports_libraries_and_not_our_files_of_the_same_name(tmp_path: Path) -> None:
    """`benchmarks/kernels.py` beside the script is not the library `kernels`."""
    program = "import sys\nraise SystemExit(f'safe path: {sys.flags.safe_path}')"
    with pytest.raises(PeerError, match="safe path: True"):
        run_peer(fake_python(tmp_path, program), "gptq", tmp_path, [[1]], threads=1, work=tmp_path)


def test_quantizers_are_judged_on_the_same_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_tiny_model(tmp_path / "model")
    python = fake_python(tmp_path, FAKE_PEER)
    out = tmp_path / "out.json"
    arguments = ["--only=awq", "--repeat=2", f"--model={model}", "--threads=1", "--windows=2"]
    arguments += ["--sequences=3", "--length=24", f"--peers-python={python}", f"--json={out}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "### AWQ, 4 bits" in printed
    assert "3 sequences, 72 tokens" in printed
    results = json.loads(out.read_text())["awq"]
    assert results["versions"] == {"fake": "1.0"}
    assert results["llmcompressor"]["times"] == [1e9, 1e9]
    assert len(results["ours"]["awq"]["times"]) == 2

    judge = tiny_benchmark(model).lab(tmp_path / "store")
    expected = {}
    for name, weight in weights_of(judge).items():
        scale = torch.ones(weight.shape[1])
        scale[::2] = 2
        expected[name] = (weight * scale * 16).round() / 16 / scale
    relative = [error.relative_output_error for error in layer_errors(judge, expected)]
    assert results["llmcompressor"]["summed"] == pytest.approx(
        sum(each or 0 for each in relative), rel=1e-4
    )


def test_a_comparison_is_accounted_for_by_its_phases(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    phases = compare(lab, ("none", "rtn", "gptq"))
    windows, sequences = len(lab.eval_data.windows), len(lab.calibration.sequences)
    floor = min(len(lab.looks[0]), FLOOR_WINDOWS)
    assert phases.forwards == {
        "load": 0,
        "reference": windows,
        "floor": floor,
        "statistics": sequences,
        "quantize": sequences,
        "evaluate": 3 * windows,
        "layers": 0,
    }
    assert sum(phases.forwards.values()) == lab.forwards
    assert bare(lab, lab.calibration.sequences) > 0


def test_phases_are_compared_with_the_passes_they_need(tmp_path: Path) -> None:
    lab = tiny_lab(tmp_path)
    phases = compare(lab, ("none", "gptq"))
    windows, sequences = len(lab.eval_data.windows), len(lab.calibration.sequences)
    floor = min(len(lab.looks[0]), FLOOR_WINDOWS)
    phases.seconds = {**dict.fromkeys(PHASES, 0.0), "evaluate": 6.0, "quantize": 8.0}
    made = rows([phases], Sample((1.5,)), Sample((4.0,)), (windows, sequences))
    by_phase = {row[0]: row[2:] for row in made}
    assert by_phase["evaluate"] == [str(2 * windows), "3.00 s", "2.00x"]
    assert by_phase["quantize"] == [str(sequences), "4.00 s", "2.00x"]
    assert by_phase["layers"] == ["0", "-", "-"]
    passes, needed = 3 * windows + floor + 2 * sequences, 12.5 + 1.5 * floor / windows
    assert by_phase["**all**"] == [str(passes), f"{needed:.1f} s", f"{14 / needed:.2f}x"]


def test_a_run_that_does_not_pass_is_not_timed(tmp_path: Path) -> None:
    wrong = Benchmark("embedded", 1, 1, 2, 2, 24, ("no-such-method",), None)
    with pytest.raises(RunError, match="exit status 4"):
        run_example(wrong, tmp_path / "store", workers=0)


@pytest.mark.parametrize("arguments", [["--only=gptq,suit"], ["--only="], ["--repeat=0"]])
def test_bad_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "expected" in capsys.readouterr().err


def test_the_products_of_a_block_are_those_that_its_parts_need(tmp_path: Path) -> None:
    """Against the shapes of a Llama block: seven linears, one attention, four shared inputs."""
    lab = tiny_lab(tmp_path)
    length = len(lab.calibration.sequences[0])
    for (name, block), made in zip(decoder_blocks(lab.base_model), products_of(lab), strict=True):
        sites = quantizable_linears(block, name)
        outputs = [task() for task in made.forward]
        linears = [tuple(each.shape) for each in outputs if isinstance(each, torch.Tensor)]
        for site in sites:
            assert (length, site.out_features) in [shape[-2:] for shape in linears]
        assert len(made.forward) == len(sites) + 1
        assert made.until_last == len(made.forward) - 1
        columns = sorted(
            site.in_features
            for site in sites
            if site.name.endswith(("q_proj", "o_proj", "up_proj", "down_proj"))
        )
        grams = [tuple(torch.as_tensor(task()).shape) for task in made.gram]
        assert sorted(grams) == [(each, each) for each in columns]
        assert len(made.factor) == 2 * len(made.gram)


@pytest.mark.parametrize(
    ("method", "forwards", "grams", "factors", "searches"),
    [
        ("calibration", 2 * 3 * 5, 2 * 3, 0, 0),
        # Two blocks to the last input, then the first of them again.
        ("gptq", 2 * 3 * 4 + 3 * 5, 2 * 3, 2, 0),
        ("awq", 2 * 3 * 5, 2 * 3, 0, 2),
    ],
)
def test_products_are_run_as_often_as_a_method_needs_them(
    method: str, forwards: int, grams: int, factors: int, searches: int
) -> None:
    counts = {"forward": 0, "gram": 0, "factor": 0, "search": 0}

    def task(kind: str) -> Callable[[], None]:
        def run() -> None:
            counts[kind] += 1

        return run

    block = Products([task("forward")] * 5, 4, [task("gram")], [task("factor")], [task("search")])
    run_products(method, [block, block], 3, 1)
    assert counts == {
        "forward": forwards,
        "gram": grams,
        "factor": factors,
        "search": searches,
    }


def test_the_table_of_products_has_a_row_for_each_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_tiny_model(tmp_path / "model")
    arguments = ["--only=products", "--repeat=2", f"--model={model}", "--threads=1"]
    assert main([*arguments, "--windows=2", "--sequences=3", "--length=24"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split("|") for line in printed.splitlines() if line.startswith("| ")]
    found = {line[1].strip(): line for line in lines}
    assert {"calibration", "gptq", "awq", "rtn"} <= set(found)
    assert "x (" in found["gptq"][4]
    assert found["rtn"][4].strip() == "-"


def test_kernels_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only models move: float32 costs 8, bfloat16 4, those with kernels 2."""
    base = kernels.slice_of_a_model(hidden=64, intermediate=96, heads=4)
    sides, uses = kernels.made(base)
    assert [side.model.dtype for side in sides[:2]] == [torch.float32, torch.bfloat16]
    assert sides[0].model.lm_head.weight is sides[0].model.model.embed_tokens.weight
    assert sum(uses["dynamic:bits=8"].counts.values()) == 14
    now, order = [0], list[str]()

    def run(side: kernels.Side, ids: torch.Tensor) -> None:
        order.append(side.name)
        now[0] += {"float32": 8, "bfloat16": 4}.get(side.name, 2) * ids.shape[1]

    monkeypatch.setattr(kernels.Side, "run", run)
    monkeypatch.setattr(kernels, "TOKENS", {1: 2, 3: 1})
    made = kernels.section(sides, uses, base.config, 2, lambda: now[0])
    shown = [row[4].split("x")[0] for row in made.rows]
    assert shown == ["1.00", "0.500", "0.250", "0.250", "0.250"] * 2
    assert len(order) == len(sides) * (1 + 4 + 1 + 2)
    assert {order[n] for n in range(0, len(order), len(sides))} == {side.name for side in sides}
