"""QuIP and SpQR over whole models: the same bits however they are made, and read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.test_streaming import contents, lab
from tests.lab.tiny import saved_tiny_model, tiny_lab

SPECS = ("quip:bits=3", "quip:transform=hadamard:greedy_passes=1", "spqr")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_the_bits_are_the_same_read_part_by_part(
    tmp_path: Path, architecture: str, spec: str
) -> None:
    model = saved_tiny_model(tmp_path / "model", architecture)
    whole = lab(model, tmp_path / "whole", stream="never")
    streamed = lab(model, tmp_path / "streamed", stream="always")
    method = whole.candidate(spec).method
    assert contents(streamed.checkpoint(method)) == contents(whole.checkpoint(method))


@pytest.mark.parametrize("spec", SPECS)
def test_results_do_not_depend_on_threads_and_are_read_back(tmp_path: Path, spec: str) -> None:
    found = []
    for store, threads in (("one", 1), ("two", 2), ("one", 1)):
        candidate = tiny_lab(tmp_path / store, threads=threads).candidate(spec)
        found.append((candidate.kl.mean, candidate.bits_per_weight, candidate.layer_error))
    assert found[0] == found[1] == found[2]
    assert 0 < found[0][0] < 0.2
