"""Train the small Llama model that the plugin ships.

Three commands, in this order::

    python training/train_embedded.py prepare --manifest ... --data-root ... --out RUN
    python training/train_embedded.py train --out RUN [--resume] [--max-minutes 60] ...
    python training/train_embedded.py export --out RUN --to MODEL_DIRECTORY

``RUN`` holds the token files, the checkpoint and the log; it may be stopped and resumed at any
time, also with another number of threads, sequence length or batch size.  Sampling is a pure
function of the seed, the step and how many windows were drawn from each source so far, and all are
in the checkpoint.  The learning rate is a trapezoid (warm-up, plateau, linear cool-down); the
cool-down may be tied to a step (reproducible) or to the clock (``--max-minutes`` with
``--cooldown-minutes``), because a shared machine gives no promise of a speed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import BOS_ID, CONTEXT, EOS_ID, VOCABULARY, prepare, read_manifest
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

GOLDEN = (math.sqrt(5) - 1) / 2
EMA_DECAY = 0.995
State = dict[str, Any]
LossFunction = Callable[[Tensor], Tensor]


def build_model(layers: int) -> LlamaForCausalLM:
    """A freshly initialised model in float32 (about 5.8 million parameters with 6 layers)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def loss_function(model: LlamaForCausalLM, reduction: str = "mean") -> LossFunction:
    """Next-token cross entropy of rows of token ids, computed under bf16 autocast."""

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            logits = F.linear(hidden, model.lm_head.weight)
        targets = rows[:, 1:].reshape(-1)
        return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets, reduction=reduction)

    return loss


class Sampler:
    """Draws training windows: the source at random by weight, the place by a golden-ratio walk.

    The walk ``(shift + k * golden) mod 1`` covers a source evenly, whatever the window length, so
    that text is hardly repeated before the source has been used up.  Each window starts with bos,
    because that is how the model is used and evaluated.
    """

    def __init__(self, corpus: Path, seed: int) -> None:
        facts: State = json.loads((corpus / "corpus.json").read_text("utf-8"))["sources"]
        self.names = [name for name, row in facts.items() if row["weight"] > 0]
        weights = np.array([facts[name]["weight"] for name in self.names], dtype=np.float64)
        self.weights = weights / weights.sum()
        self.streams = [np.load(corpus / f"{name}.train.npy", mmap_mode="r") for name in self.names]
        self.drawn = [0] * len(self.names)
        self.seed = seed

    def batch(self, step: int, rows: int, length: int) -> Tensor:
        """``rows`` windows of ``length`` + 1 tokens for this step."""
        generator = np.random.default_rng([self.seed, step])
        shifts = np.random.default_rng(self.seed).random(len(self.names))
        out = np.empty((rows, length + 1), dtype=np.int64)
        for row, source in enumerate(generator.choice(len(self.names), size=rows, p=self.weights)):
            stream = self.streams[source]
            place = (shifts[source] + self.drawn[source] * GOLDEN) % 1.0
            start = int(place * (len(stream) - length - 1))
            out[row] = stream[start : start + length + 1]
            out[row, 0] = BOS_ID
            self.drawn[source] += 1
        return torch.from_numpy(out)


def held_out_rows(corpus: Path, domain: str, limit: int, length: int = CONTEXT) -> Tensor:
    """Held-out windows of a domain, up to ``limit`` tokens, evenly from all its sources."""
    facts: State = json.loads((corpus / "corpus.json").read_text("utf-8"))["sources"]
    names = [name for name, row in facts.items() if row["domain"] == domain]
    streams = [np.load(corpus / f"{name}.held.npy") for name in names]
    streams = [stream for stream in streams if len(stream)]
    rows = []
    for stream in streams:
        count = max(1, min(len(stream), limit // len(streams)) // length)
        for i in range(count):
            window = np.full(length + 1, BOS_ID, dtype=np.int64)
            piece = stream[i * length : (i + 1) * length + 1]
            window[: len(piece)] = piece
            if len(piece) == length + 1:
                window[0] = BOS_ID
                rows.append(window)
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def mean_loss(loss: LossFunction, rows: Tensor, at_once: int = 4) -> float:
    """Mean loss over rows of equal length; the last incomplete group of rows is left out."""
    at_once = min(at_once, len(rows))
    starts = range(0, len(rows) - at_once + 1, at_once)
    return sum(float(loss(rows[i : i + at_once])) for i in starts) / len(starts)


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices and AdamW for the rest, or AdamW for everything."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in known]
    matrices = [p for p in rest if p.ndim == 2]
    norms = [p for p in rest if p.ndim != 2]
    betas = (0.9, 0.95)
    decay = args.weight_decay
    groups = [
        {"params": matrices, "lr": args.embedding_lr, "weight_decay": decay / 10},
        {"params": norms, "lr": args.embedding_lr, "weight_decay": 0.0},
    ]
    if args.optimizer == "muon":
        muon = torch.optim.Muon(
            hidden, lr=args.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(groups, betas=betas)]
    groups.append({"params": hidden, "lr": args.lr, "weight_decay": decay})
    return [torch.optim.AdamW(groups, betas=betas)]


def rate(args: argparse.Namespace, step: int, minutes: float) -> float:
    """The learning rate's factor: warm-up, plateau, and the earlier of the two cool-downs."""
    factors: list[float] = [1.0, (step + 1) / args.warmup_steps]
    if args.max_minutes and args.cooldown_minutes:
        factors.append((args.max_minutes - minutes) / args.cooldown_minutes)
    if args.max_steps and args.cooldown_steps:
        factors.append((args.max_steps - step) / args.cooldown_steps)
    return max(0.0, min(factors))


def save_checkpoint(path: Path, state: State) -> None:
    """Write next to ``path`` and rename, so that a kill leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


@contextmanager
def weights(model: LlamaForCausalLM, other: dict[str, Tensor]) -> Iterator[None]:
    """Put the averaged weights into the model for a while."""
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(other[name])
        yield
        for name, p in model.named_parameters():
            p.copy_(own[name])


def train(args: argparse.Namespace) -> None:
    """Train until the step or time limit; evaluate, log and save a checkpoint on the way."""
    started = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    corpus = args.corpus or args.out / "corpus"
    checkpoint = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    model = build_model(args.layers)
    sampler = Sampler(corpus, args.seed)
    optims = optimizers(model, args)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, tokens, seconds = 0, 0, 0.0
    if args.resume:
        state: State = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average = state["average"]
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            base = [group["lr"] for group in optim.param_groups]
            optim.load_state_dict(saved)
            for group, lr in zip(optim.param_groups, base, strict=True):
                group["lr"] = lr
        sampler.drawn = state["drawn"]
        step, tokens, seconds = state["step"], state["tokens"], state["seconds"]
        torch.set_rng_state(state["rng"])
    for optim in optims:
        for group in optim.param_groups:
            group["base"] = group["lr"]
    loss = loss_function(model)
    fast: LossFunction = loss if args.no_compile else torch.compile(loss, dynamic=False)
    held = {d: held_out_rows(corpus, d, args.eval_tokens) for d in ("prose", "code", "chat")}
    log = (args.out / "log.jsonl").open("a", encoding="utf-8")
    micro = max(1, args.micro_tokens // args.seq_len)
    parts = max(1, args.batch_tokens // (micro * args.seq_len))
    parameters = list(model.parameters())
    last, since, running = time.monotonic(), 0, 0.0

    def minutes() -> float:
        return (time.monotonic() - started) / 60

    def evaluate() -> dict[str, float]:
        values = {name: mean_loss(loss, rows) for name, rows in held.items()}
        return {**values, "mean": sum(values.values()) / len(values)}

    def save(values: dict[str, float], averaged: bool) -> None:
        state = {
            "model": model.state_dict(),
            "average": average,
            "optimizers": [optim.state_dict() for optim in optims],
            "drawn": sampler.drawn,
            "rng": torch.get_rng_state(),
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
            "layers": args.layers,
            "optimizer": args.optimizer,
            "seed": args.seed,
            "held_out": values,
            "averaged": averaged,
        }
        save_checkpoint(checkpoint, state)

    def finished() -> bool:
        by_time = bool(args.max_minutes) and minutes() >= args.max_minutes
        return by_time or bool(args.max_steps and step >= args.max_steps)

    while not finished():
        factor = rate(args, step, minutes())
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = group["base"] * factor
        batch = sampler.batch(step, micro * parts, args.seq_len)
        for part in range(parts):
            value = fast(batch[part * micro : (part + 1) * micro]) / parts
            value.backward()
            running += float(value.detach())
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        since += 1
        tokens += micro * parts * args.seq_len
        mix = min(EMA_DECAY, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - mix)
        if step % args.log_steps == 0 or finished():
            now = time.monotonic()
            row: State = {
                "step": step,
                "tokens": tokens,
                "loss": round(running / since, 4),
                "rate": round(factor, 4),
                "tokens_per_second": round(since * micro * parts * args.seq_len / (now - last)),
                "minutes": round(minutes(), 2),
            }
            seconds += now - last
            if step % args.eval_steps == 0 or finished():
                plain = evaluate()
                with weights(model, average):
                    values = evaluate()
                row["held_out_plain"] = {name: round(v, 4) for name, v in plain.items()}
                row["held_out"] = {name: round(v, 4) for name, v in values.items()}
                averaged = values["mean"] <= plain["mean"]
                save(values if averaged else plain, averaged)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)
            last, since, running = time.monotonic(), 0, 0.0


def export(args: argparse.Namespace) -> None:
    """Write a bf16 model directory (averaged weights, if better), if better than what is there."""
    state: State = torch.load(args.out / "checkpoint.pt", weights_only=True)
    facts_path = args.to / "training_facts.json"
    mean = state["held_out"]["mean"]
    if facts_path.exists() and not args.force:
        there = json.loads(facts_path.read_text("utf-8"))["held_out_loss"]["mean"]
        if there <= mean:
            print(f"not exported: held-out loss {there:.4f} there, {mean:.4f} in the checkpoint")
            return
    model = build_model(state["layers"])
    model.load_state_dict(state["model"])
    if state.get("averaged", True):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(state["average"][name])
    corpus = args.corpus or args.out / "corpus"
    facts = {
        "steps": state["step"],
        "tokens": state["tokens"],
        "hours": round(state["seconds"] / 3600, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": state["optimizer"],
        "seed": state["seed"],
        "averaged": state.get("averaged", True),
        "held_out_loss": {name: round(v, 4) for name, v in state["held_out"].items()},
        "corpus": json.loads((corpus / "corpus.json").read_text("utf-8")),
        "torch": torch.__version__,
    }
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID, do_sample=False
    )
    args.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.to.parent) as name:
        temporary = Path(name)
        model.bfloat16().save_pretrained(temporary)
        AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(temporary)
        settings_path = temporary / "tokenizer_config.json"
        settings = json.loads(settings_path.read_text("utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows it too
        for key in ("is_local", "local_files_only"):  # about this machine, not the tokenizer
            settings.pop(key, None)
        settings_path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        (temporary / "training_facts.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        for file in sorted(temporary.iterdir()):
            file.chmod(0o644)
            os.replace(file, args.to / file.name)
    print(f"exported step {state['step']}, held-out loss {mean:.4f}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = top.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=(run.__doc__ or "").split("\n")[0])
        sub.set_defaults(run=run)
        sub.add_argument("--out", type=Path, required=True, help="the run's working directory")
        sub.add_argument("--corpus", type=Path, help="token files, if not OUT/corpus")
        return sub

    sub = command("prepare", run_prepare)
    sub.add_argument("--manifest", type=Path, required=True)
    sub.add_argument("--data-root", type=Path, required=True)
    sub.add_argument("--python-root", type=Path, default=Path(os.__file__).parent)
    sub.add_argument("--seed", type=int, default=1)

    sub = command("train", train)
    sub.add_argument("--resume", action="store_true")
    sub.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    sub.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    for flag, number in (
        ("threads", 2), ("seed", 1), ("layers", 6), ("seq-len", 256), ("batch-tokens", 8192),
        ("micro-tokens", 4096), ("max-steps", 0), ("warmup-steps", 100), ("cooldown-steps", 0),
        ("log-steps", 20), ("eval-steps", 200), ("eval-tokens", 20480),
    ):  # fmt: skip
        sub.add_argument(f"--{flag}", type=int, default=number)
    for flag, value in (
        ("lr", 4e-3), ("embedding-lr", 4e-3), ("weight-decay", 0.1), ("clip", 1.0),
        ("max-minutes", 0.0), ("cooldown-minutes", 0.0),
    ):  # fmt: skip
        sub.add_argument(f"--{flag}", type=float, default=value)

    sub = command("export", export)
    sub.add_argument("--to", type=Path, required=True)
    sub.add_argument("--force", action="store_true", help="also when it is not better")
    return top


def run_prepare(args: argparse.Namespace) -> None:
    """Read the sources, train the tokenizer and write the token files."""
    sources = read_manifest(args.manifest, {"data": args.data_root, "python": args.python_root})
    prepare(sources, args.corpus or args.out / "corpus", args.seed)


if __name__ == "__main__":
    arguments = parser().parse_args()
    arguments.run(arguments)
