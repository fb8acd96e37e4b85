"""Runs the same quantization in another library, in an environment and a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).resolve().with_name("peer_llmcompressor.py")
WEIGHTS_SCRIPT = SCRIPT.with_name("peer_weights.py")
GPTQMODEL_SCRIPT = SCRIPT.with_name("peer_gptqmodel.py")
INSTALL = (
    "not measured: {why}. Install the comparison environment with `python3 -m venv {folder}` and "
    "`{folder}/bin/pip install {arguments}`, then give `{option} {folder}/bin/python`."
)


@dataclass(frozen=True)
class Environment:
    """Where other libraries are installed: how a user makes it, and names it.

    Attributes:
        option: of `run.py`, which gives its interpreter.
        folder: of the virtual environment, in the root of the clone.
        arguments: of `pip install`.
    """

    option: str
    folder: str
    arguments: str


PEERS = Environment("--peers-python", ".peers", "-r benchmarks/requirements-peers.txt")
GPTQMODEL = Environment(
    "--gptqmodel-python", ".gptqmodel", "--no-deps -r benchmarks/requirements-gptqmodel.txt"
)


# The script that drives a library, and where the library is.
PLACES = {
    "llmcompressor": (SCRIPT, PEERS),
    "gptqmodel": (GPTQMODEL_SCRIPT, GPTQMODEL),
    **dict.fromkeys(("hqq", "bitsandbytes", "torchao"), (WEIGHTS_SCRIPT, PEERS)),
}


class PeerMissingError(Exception):
    """There is nothing to compare with; says how to install it."""

    def __init__(self, why: str, environment: Environment = PEERS) -> None:
        super().__init__(INSTALL.format(why=why, **asdict(environment)))


class PeerError(Exception):
    """The other library is there and failed, or its answer makes no sense."""


@dataclass(frozen=True)
class Job:
    """What the child process is to do, as it reads it from a JSON file.

    Attributes:
        method: one that the child's script knows.
        model: directory of the model.
        tokens: JSON file with the calibration sequences.
        weights: safetensors file to write: NAME.weight for every quantized layer, dequantized, and
            where the method has rescaled them, NAME.before: the rescaled weights unrounded; and
            PARAMETER.changed for all other parameters that it has changed.
        result: JSON file to write: seconds and versions, or `missing`.
        threads: of torch.
    """

    method: str
    model: str
    tokens: str
    weights: str
    result: str
    threads: int
    bits: int = 4
    group_size: int = 128


@dataclass(frozen=True)
class Answer:
    """What the other library has made, and in which time."""

    seconds: float
    versions: dict[str, str]
    tensors: dict[str, Tensor]


def ask(
    library: str,
    pythons: Mapping[str, str | None],
    method: str,
    model: Path,
    sequences: Sequence[Sequence[int]],
    *,
    threads: int,
    work: Path,
    bits: int = 4,
    group_size: int = 128,
) -> Answer:
    """`run_peer` with the script and the environment of a library.

    Args:
        library: one of `PLACES`.
        pythons: interpreters, by the option that gives them.
    """
    script, environment = PLACES[library]
    return run_peer(
        pythons[environment.option],
        method,
        model,
        sequences,
        threads=threads,
        work=work,
        script=script,
        environment=environment,
        bits=bits,
        group_size=group_size,
    )


def run_peer(
    python: str | None,
    method: str,
    model: Path,
    sequences: Sequence[Sequence[int]],
    *,
    threads: int,
    work: Path,
    script: Path = SCRIPT,
    environment: Environment = PEERS,
    bits: int = 4,
    group_size: int = 128,
) -> Answer:
    """Quantize `model` in `environment`, with its interpreter `python`; `work` takes the files.

    Raises:
        PeerMissingError: no interpreter is given, or it lacks the library.
        PeerError: the child process has failed.
    """
    if python is None:
        raise PeerMissingError(f"no {environment.option} is given", environment)
    tokens = work / "tokens.json"
    tokens.write_text(json.dumps([list(ids) for ids in sequences]), encoding="utf-8")
    weights, result = work / "weights.safetensors", work / "result.json"
    files = (str(model), str(tokens), str(weights), str(result))
    job = Job(method, *files, threads, bits, group_size)
    job_file = work / "job.json"
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    result.unlink(missing_ok=True)
    try:
        _call([python, str(script), str(job_file)], threads, work)
    except OSError as error:
        why = f"{python} cannot be run ({error.strerror})"
        raise PeerMissingError(why, environment) from error
    if not result.exists():
        raise PeerError(f"{script.name} ended without an answer.")
    answer = json.loads(result.read_text(encoding="utf-8"))
    if "missing" in answer:
        why = f"the environment of {environment.option} lacks {answer['missing']}"
        raise PeerMissingError(why, environment)
    return Answer(answer["seconds"], answer["versions"], load_file(weights))


def _call(command: list[str], threads: int, work: Path) -> None:
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Else our files beside the script would stand for libraries that are named like them.
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        command, cwd=work, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise PeerError(f"The other library failed with exit status {done.returncode}:\n{tail}")


def original_weights(
    tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """An answer's dequantized weights as they act on the original model's inputs and outputs.

    Args:
        tensors: of an `Answer`.
        originals: the model's weights (out, in), by layer name.

    Raises:
        PeerError: other layers or shapes, or the weights are no rescaling of the original ones.
    """
    names = {key.removesuffix(".weight") for key in tensors if key.endswith(".weight")}
    if names != set(originals):
        odd = sorted(names ^ set(originals))
        raise PeerError(f"The other library quantized other layers; the first is {odd[0]}.")
    return {
        name: unscaled(tensors[f"{name}.weight"], tensors.get(f"{name}.before"), original, name)
        for name, original in originals.items()
    }


def unscaled(weight: Tensor, before: Tensor | None, original: Tensor, name: str) -> Tensor:
    """Undo the scaling of rows and columns that made `before` of `original`, on `weight`."""
    if weight.shape != original.shape:
        raise PeerError(f"{name} has shape {tuple(weight.shape)}, not {tuple(original.shape)}.")
    if before is None:
        return weight
    rows, columns = fit_scales(before, original)
    scale = rows[:, None] * columns
    if not torch.allclose(original.double() * scale, before.double(), rtol=1e-3, atol=1e-12):
        raise PeerError(f"The weights of {name} before rounding are no rescaling of the original.")
    return (weight.double() / scale).float()


def fit_scales(before: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Positive (rows, columns) with before = rows * original * columns; float64.

    In logarithms that is a sum of two vectors, whose means are fitted in turns; weights that are
    zero say nothing.
    """
    known = (original != 0) & (before != 0)
    logs = torch.where(known, (before.double() / original.double()).abs().log(), 0.0)
    per_row, per_column = known.sum(1).clamp(min=1), known.sum(0).clamp(min=1)
    rows = torch.zeros(len(original), dtype=torch.float64)
    for _ in range(20):
        columns = torch.where(known, logs - rows[:, None], 0.0).sum(0) / per_column
        rows = torch.where(known, logs - columns, 0.0).sum(1) / per_row
    return rows.exp(), columns.exp()
