"""Ask llama.cpp which types and bits it gives to every tensor of a model, in a child process.

`python -m tests.methods.llamacpp_oracle` writes the types down as facts, in `llamacpp_types.json`;
it needs llama-cpp-python and gguf. The models of the facts have the real numbers of layers, heads
and columns, but two rows to a matrix: the choice of a type depends on names and columns alone, so
that hundreds of mixes take seconds. Types of one role over the blocks are written as
`Q6_K Q4_K*2 Q6_K`, one type for all blocks as `Q4_K`; `*` stands for all roles that are not named.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

INSTALLED = all(find_spec(name) for name in ("llama_cpp", "gguf"))
MISSING = "llama-cpp-python is not installed"

FACTS = Path(__file__).with_name("llamacpp_types.json")
FTYPES = {
    "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8,
    "Q5_1": 9, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q8_0": 7,
    "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38, "F16": 1, "BF16": 32, "F32": 0,
}  # fmt: skip
PURE = ("MXFP4",)
BLOCK_ROLES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "gpt2": ("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    "falcon": ("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
}


@dataclass(frozen=True)
class Case:
    """What the choice of types depends on."""

    architecture: str = "llama"
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    hidden: int = 256
    inner: int = 512
    experts: int = 0
    tied: bool = False

    def columns(self, role: str) -> int:
        """Row length of a role's matrices."""
        return self.inner if role == "ffn_down" else self.hidden

    def tensors(self) -> list[tuple[str, int | None, int]]:
        """Role, block and row length of every matrix."""
        roles = BLOCK_ROLES[self.architecture]
        inside = [(r, b, self.columns(r)) for b in range(self.layers) for r in roles]
        ends = ("token_embd",) if self.tied else ("token_embd", "output")
        return inside + [(role, None, self.hidden) for role in ends]


def cases() -> list[Case]:
    """Layer counts, ratios of heads, widths that do not fit, experts, other architectures."""
    return [
        *(Case(layers=layers) for layers in (2, 6, 8, 16, 24, 32)),
        *(Case(kv_heads=kv_heads) for kv_heads in (4, 2, 1)),
        *(Case(layers=layers, kv_heads=2, tied=True) for layers in (6, 32)),
        Case(layers=80, kv_heads=1),
        Case(layers=80),
        Case(hidden=896, inner=4864, heads=14, kv_heads=2, tied=True),
        Case(hidden=896, inner=4864, heads=14, kv_heads=2),
        Case(hidden=256, inner=688),
        Case(hidden=288, inner=768, heads=6, kv_heads=6),
        Case(hidden=48, inner=80, heads=4, kv_heads=2, tied=True),
        Case(hidden=48, inner=80, heads=4, kv_heads=4),
        Case(layers=16, experts=4, kv_heads=4),
        Case(layers=16, experts=8, kv_heads=2),
        Case(layers=16, experts=8),
        Case("gpt2", layers=12, hidden=768, inner=3072, heads=12, kv_heads=12, tied=True),
        Case("gpt2", layers=24, tied=True),
        Case("gpt2", layers=6),
        Case("falcon", layers=32, heads=8, kv_heads=1),
        Case("falcon", layers=16, heads=8, kv_heads=1, tied=True),
        Case("falcon", layers=16, heads=8, kv_heads=2, hidden=96, inner=384),
    ]


def observe(asked: Sequence[tuple[Case, str, bool]]) -> list[dict[str, list[str]]]:
    """The types that llama.cpp gives, by role in the order of blocks.

    Args:
        asked: the model, the name of the mix, and whether an importance matrix is given.
    """
    question = [[asdict(case), mix, imatrix] for case, mix, imatrix in asked]
    return [
        {role: [by[block] for block in sorted(by)] for role, by in roles.items()}
        for roles in (_by_role(types) for types in _ask("types", question))
    ]


def quantize(
    folder: Path,
    case: Case,
    weights: Mapping[str, NDArray[np.float32]],
    mixes: Sequence[str],
    imatrix: Mapping[str, NDArray[np.float32]] | None,
) -> Iterator[dict[str, tuple[str, NDArray[np.uint8]]]]:
    """The type and the bytes (m, bytes of a row) of every matrix, one mix after the other.

    Args:
        folder: an empty one.
        weights: float32 (m, n), by GGUF's name, of all matrices of the case.
        imatrix: the mean squares (n,) of their inputs, by the same names, or None.
    """
    import gguf

    np.savez(folder / "weights.npz", **cast(Any, weights))
    if imatrix is not None:
        np.savez(folder / "imatrix.npz", **cast(Any, imatrix))
    _ask("bits", [str(folder), asdict(case), list(mixes)])
    for mix in mixes:
        yield {
            tensor.name: (
                tensor.tensor_type.name,
                np.ascontiguousarray(tensor.data).view(np.uint8).reshape(tensor.shape[1], -1),
            )
            for tensor in gguf.GGUFReader(folder / f"{mix}.gguf").tensors
        }


def _ask(what: str, question: Any) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.methods.llamacpp_oracle", what],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _by_role(types: dict[str, str]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for name, type in types.items():
        parts = name.removesuffix(".weight").split(".")
        block = int(parts[1]) if len(parts) > 1 else 0
        found.setdefault(parts[-1].removesuffix("_exps"), {})[block] = type
    return found


def expand(written: dict[str, str], case: Case) -> dict[str, list[str]]:
    """The types by role in the order of blocks, from what the facts say."""
    found: dict[str, list[str]] = {}
    for role, block, _ in case.tensors():
        if block in (None, 0):
            types: list[str] = []
            for part in written.get(role, written["*"]).split():
                name, _, times = part.partition("*")
                types += [name] * int(times or 1)
            one = len(types) == 1 and block is not None
            found[role] = types * case.layers if one else types
    return found


def _compress(types: dict[str, list[str]]) -> dict[str, str]:
    lines = {}
    for role, names in types.items():
        runs = [(name, len(list(run))) for name, run in itertools.groupby(names)]
        parts = [name if times == 1 else f"{name}*{times}" for name, times in runs]
        lines[role] = runs[0][0] if len(runs) == 1 else " ".join(parts)
    common = Counter(lines.values()).most_common(1)[0][0]
    return {"*": common, **{role: line for role, line in lines.items() if line != common}}


def _write_source(
    path: Path, case: Case, weights: Mapping[str, NDArray[np.float32]] | None = None
) -> None:
    """A GGUF file in float32 of the case, with two made-up rows to a matrix if none are given."""
    import gguf

    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_block_count(case.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(case.hidden)
    writer.add_feed_forward_length(case.inner)
    writer.add_head_count(case.heads)
    writer.add_head_count_kv(case.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(2)
    if case.experts:
        writer.add_expert_count(case.experts)
        writer.add_expert_used_count(2)
    for role, block, columns in case.tensors():
        of_experts = case.experts > 0 and role.startswith("ffn_")
        place = "" if block is None else f"blk.{block}."
        name = f"{place}{role}{'_exps' if of_experts else ''}.weight"
        shape = (case.experts, 2, columns) if of_experts else (2, columns)
        values = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        writer.add_tensor(name, values if weights is None else weights[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _child() -> None:
    question = json.load(sys.stdin)
    answer: list[dict[str, str]] = []
    if sys.argv[1] == "types":
        answer += _answer_types(question)
    else:
        _write_bits(*question)
    sys.stdout.write(json.dumps(answer) + "\n")


def _answer_types(question: list[Any]) -> Iterator[dict[str, str]]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.gguf"), Path(folder, "target.gguf")
        written = None
        for given, mix, imatrix in question:
            if given != written:
                _write_source(source, Case(**given))
                written = given
            # What an importance matrix covers does not matter, only that there is one.
            _run(source, target, mix, {"any": np.ones(1, np.float32)} if imatrix else None)
            yield {each.name: each.tensor_type.name for each in gguf.GGUFReader(target).tensors}


def _write_bits(folder: str, case: dict[str, Any], mixes: list[str]) -> None:
    source, importance = Path(folder, "source.gguf"), Path(folder, "imatrix.npz")
    _write_source(source, Case(**case), np.load(Path(folder, "weights.npz")))
    imatrix = dict(np.load(importance)) if importance.exists() else None
    for mix in mixes:
        _run(source, Path(folder, f"{mix}.gguf"), mix, imatrix)


def _run(
    source: Path, target: Path, mix: str, imatrix: Mapping[str, NDArray[np.float32]] | None
) -> None:
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def quiet(level: int, text: bytes, user_data: Any) -> None:
        if level >= 4:
            sys.stderr.write(text.decode(errors="replace"))

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = FTYPES[mix]
    parameters.pure = mix in PURE
    if imatrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        parameters.imatrix = entries
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if failed:
        raise RuntimeError(f"llama_model_quantize refused {mix}")


def main() -> None:
    """Ask for every case and mix and write the facts."""
    asked = [(c, mix, i) for c in cases() for mix in FTYPES for i in (False, True)]
    facts: list[dict[str, Any]] = []
    for (case, mix, imatrix), types in zip(asked, observe(asked), strict=True):
        if not facts or facts[-1]["case"] != asdict(case):
            facts.append({"case": asdict(case), "types": {}, "with_imatrix": {}})
        line = _compress(types)
        if not imatrix:
            facts[-1]["types"][mix] = line
        elif facts[-1]["types"][mix] != line:
            facts[-1]["with_imatrix"][mix] = line
    import llama_cpp

    lines = ",\n".join(_pretty(fact) for fact in facts)
    tool = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"
    FACTS.write_text(f'{{"observed_with": "{tool}", "facts": [\n{lines}\n]}}\n')


def _pretty(fact: dict[str, Any]) -> str:
    lines = [f'{{"case": {json.dumps(fact["case"])}']
    for key in ("types", "with_imatrix"):
        inside = ",\n  ".join(f"{json.dumps(m)}: {json.dumps(t)}" for m, t in fact[key].items())
        lines.append(f'"{key}": {{\n  {inside}}}' if inside else f'"{key}": {{}}')
    return ",\n ".join(lines) + "}"


if __name__ == "__main__":
    _child() if len(sys.argv) > 1 else main()
