"""What one run of the benchmarks is about, and the labs that it is made with."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers import GPTQMODEL, PEERS
from pytest_qlab import Lab, __version__
from pytest_qlab.machine import processor_name

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Benchmark:
    """Sizes and places, shared by all parts.

    Attributes:
        model: as `--qlab-model` takes it.
        repeat: repetitions of everything that is timed.
        threads: of every side of every comparison.
        windows, sequences: most evaluation windows and calibration sequences.
        length: tokens in each of them.
        methods: specifications for the whole comparisons.
        peers_python, gptqmodel_python: interpreters of the comparison environments.
    """

    model: str
    repeat: int
    threads: int
    windows: int
    sequences: int
    length: int
    methods: tuple[str, ...]
    peers_python: str | None
    gptqmodel_python: str | None = None

    @property
    def pythons(self) -> dict[str, str | None]:
        """The interpreters of the comparison environments, by the option that gives them."""
        return {
            PEERS.option: self.peers_python,
            GPTQMODEL.option: self.gptqmodel_python,
        }

    def lab(self, store: Path) -> Lab:
        """A lab over an own store, without anything loaded yet."""
        return Lab(
            self.model,
            store=store,
            threads=self.threads,
            window_length=self.length,
            max_windows=self.windows,
            calibration_length=self.length,
            calibration_sequences=self.sequences,
        )

    def pytest_arguments(self, store: Path) -> list[str]:
        """The same, for a command line."""
        return [
            f"--qlab-model={self.model}",
            f"--qlab-store={store}",
            f"--qlab-methods={','.join(self.methods)}",
            f"--qlab-window-length={self.length}",
            f"--qlab-max-windows={self.windows}",
            f"--qlab-calibration-length={self.length}",
            f"--qlab-calibration-sequences={self.sequences}",
        ]

    def describe(self, lab: Lab) -> dict[str, Any]:
        """Machine, versions and sizes, in the order in which they are printed."""
        parameters, windows, sequences = load(lab)
        return {
            "processor": f"{processor_name()}, {available_cores()} cores",
            "threads": self.threads,
            "versions": f"pytest-qlab {__version__}, torch {version('torch')}, transformers "
            f"{version('transformers')}, Python {platform.python_version()}",
            "model": f"{self.model}, {parameters:,} parameters, {lab.model.dtype}",
            "evaluation": f"{windows} windows, {lab.evaluation.convention}",
            "calibration": f"{sequences} sequences, {lab.calibration.tokens:,} tokens",
            "repetitions": f"{self.repeat}; medians, min to max in brackets",
        }


def load(lab: Lab) -> tuple[int, int, int]:
    """Load the model and cut the text; counts parameters, windows and sequences."""
    parameters = sum(each.numel() for each in lab.base_model.parameters())
    return parameters, len(lab.eval_data.windows), len(lab.calibration.sequences)


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def say(line: str) -> None:
    """Progress, apart from the tables."""
    print(line, file=sys.stderr, flush=True)
