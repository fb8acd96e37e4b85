"""Measure the embedded model and write the numbers into its model card.

Perplexity per token, on held-out text of the training sources and on the project's own evaluation
text, beside two baselines: a unigram model of the same domain (how much is word frequency alone)
and the untrained network (how much is the architecture alone).  A damage curve shows what naive
rounding of the decoder's matrices costs; greedy and sampled continuations show what it writes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import BOS_ID, CONTEXT, VOCABULARY
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

Text = tuple[str, str, list[Tensor]]  # name, domain, rows of token ids
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
DOMAINS = ("prose", "code", "chat")
# What the sources of the manifest are called in the card's table.
GROUPS = {
    "stories": ("stories", "stories-cased", "stories-jsonl"),
    "books, authors of the training set": ("books",),
    "books, other authors": ("books-other-authors",),
    "encyclopedia and web": ("wiki", "wiki-lines", "web", "web-jsonl"),
    "Python standard library": ("python",),
    "instructions": ("instructions",),
}
PROMPTS = {
    "prose": ("Once upon a time, there was a little fox who", "The old house at the end of the"),
    "code": ('def read_lines(path):\n    """', "class Stack:\n    def __init__(self"),
    "chat": (
        "User: Tell me a story about a little girl named Anna.\n\nAssistant:",
        "User: What is the capital of a country?\n\nAssistant:",
    ),
}


def windows(ids: list[int], limit: int) -> list[Tensor]:
    """Rows of at most ``CONTEXT`` tokens that each start with bos and cover ``ids`` once."""
    ids = ids[:limit]
    size = CONTEXT - 1
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [torch.tensor([[BOS_ID, *piece]]) for piece in pieces if piece]


@torch.no_grad()
def negative_log_likelihood(model: LlamaForCausalLM, rows: list[Tensor]) -> float:
    """Mean over all tokens but bos, in nats."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    return total / count


def unigram_loss(log_probability: Tensor, rows: list[Tensor]) -> float:
    """The same for a model that knows only how frequent each token is."""
    targets = torch.cat([row[0, 1:] for row in rows])
    return -float(log_probability[targets].mean())


def unigrams(corpus: Path) -> dict[str, Tensor]:
    """Per domain, log-probabilities from the training tokens, with add-one smoothing."""
    facts = json.loads((corpus / "corpus.json").read_text("utf-8"))["sources"]
    out = {}
    for domain in DOMAINS:
        counts = np.ones(VOCABULARY)
        for name, row in facts.items():
            if row["domain"] == domain:
                stream = np.load(corpus / f"{name}.train.npy")
                counts += np.bincount(stream, minlength=VOCABULARY)
        out[domain] = torch.from_numpy(np.log(counts / counts.sum())).float()
    return out


def held_out(corpus: Path, limit: int) -> Iterator[Text]:
    """Name, domain and rows of each group of held-out text."""
    facts = json.loads((corpus / "corpus.json").read_text("utf-8"))["sources"]
    for group, names in GROUPS.items():
        present = [name for name in names if name in facts]
        ids = [int(i) for name in present for i in np.load(corpus / f"{name}.held.npy")]
        if ids:
            yield group, facts[present[0]]["domain"], windows(ids[1:], limit)


def project_text(directory: Path, tokenizer: Any, limit: int) -> Iterator[Text]:
    """The same for the project's evaluation text: every file is scored from its beginning."""
    for domain in DOMAINS:
        rows: list[Tensor] = []
        for file in sorted((directory / domain).glob("*.txt")):
            ids = tokenizer(file.read_text("utf-8"), add_special_tokens=False)["input_ids"]
            rows += windows(ids, limit)
        if rows:
            yield f"evaluation text of the project: {domain}", domain, rows


@contextmanager
def rounded(model: LlamaForCausalLM, bits: int) -> Iterator[None]:
    """The decoder's matrices rounded to nearest, symmetric, one scale per row."""
    top = 2 ** (bits - 1) - 1
    saved = {}
    for name, p in model.model.layers.named_parameters():
        if p.ndim == 2:
            saved[name] = p.data.clone()
            scale = p.data.abs().amax(dim=1, keepdim=True) / top
            p.data = (p.data / scale).round().clamp(-top, top) * scale
    yield
    for name, p in model.model.layers.named_parameters():
        if name in saved:
            p.data = saved[name]


def samples(model: LlamaForCausalLM, tokenizer: Any, length: int, seed: int) -> list[str]:
    """A greedy and a sampled continuation of each prompt, as Markdown."""
    out = []
    generate: Any = model.generate  # type: ignore[misc]
    for domain, prompts in PROMPTS.items():
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            for kind in ("greedy", "sampled"):
                torch.manual_seed(seed)
                options: dict[str, Any] = {"max_new_tokens": length}
                if kind == "sampled":
                    options |= {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
                ids = generate(**inputs, **options)
                text = tokenizer.decode(ids[0], skip_special_tokens=True)
                out += [f"{domain}, {kind}:", "", "```text", text.rstrip(), "```", ""]
    return out


def report(args: argparse.Namespace) -> str:
    """The Markdown between the card's markers."""
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(args.seed)
    untrained = LlamaForCausalLM(model.config)
    facts = json.loads((args.model / "training_facts.json").read_text("utf-8"))
    baselines = unigrams(args.corpus)
    seen = sum(row["train"]["tokens"] for row in facts["corpus"]["sources"].values())
    lines = [
        f"{facts['parameters']:,} parameters; trained for {facts['steps']:,} steps on "
        f"{facts['tokens']:,} tokens, sampled from a corpus of {seen:,}, in "
        f"{facts['hours']} hours on at most two CPU cores.",
        "",
        "Perplexity per token (weights as shipped, computed in float32, windows of "
        f"{CONTEXT} tokens; lower is better):",
        "",
        "| text | tokens | this model | unigram | untrained |",
        "|---|---:|---:|---:|---:|",
    ]
    texts = list(held_out(args.corpus, args.limit))
    if args.evaluation:
        texts += project_text(args.evaluation, tokenizer, args.limit)
    prose: list[Tensor] = []
    for name, domain, rows in texts:
        prose += rows if name.startswith("books") else []
        losses = (
            negative_log_likelihood(model, rows),
            unigram_loss(baselines[domain], rows),
            negative_log_likelihood(untrained, rows[:8]),
        )
        count = sum(row.shape[1] - 1 for row in rows)
        cells = " | ".join(f"{math.exp(loss):,.2f}" for loss in losses)
        lines.append(f"| {name} | {count:,} | {cells} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "Damage by rounding (all matrices of the decoder, to nearest, symmetric, one scale per "
        "row; held-out books):",
        "",
        "| bits | perplexity |",
        "|---:|---:|",
    ]
    lines.append(f"| bf16 | {math.exp(negative_log_likelihood(model, prose)):,.2f} |")
    for bits in (8, 4, 3, 2):
        with rounded(model, bits):
            lines.append(f"| {bits} | {math.exp(negative_log_likelihood(model, prose)):,.2f} |")
        print(lines[-1], flush=True)
    if args.generate:
        title = f"Continuations of {args.generate} tokens (sampled: temperature 0.8, top-p 0.95):"
        lines += ["", title, "", *samples(model, tokenizer, args.generate, args.seed)]
    return "\n".join(lines).rstrip()


def write_card(card: Path, numbers: str) -> None:
    """Replace what is between the markers of the card."""
    text = card.read_text("utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    card.write_text(f"{head}{BEGIN}\n\n{numbers}\n\n{END}{tail}", "utf-8")


def main() -> None:
    """Print the report; with ``--card``, also write it."""
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="token files of the training")
    parser.add_argument("--evaluation", type=Path, help="directory with prose/, code/ and chat/")
    parser.add_argument("--card", type=Path, help="model card to write the numbers into")
    parser.add_argument("--limit", type=int, default=50_000, help="tokens per text or file")
    parser.add_argument("--generate", type=int, default=80, help="tokens per continuation, or 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    numbers = report(args)
    print(numbers)
    if args.card:
        write_card(args.card, numbers)


if __name__ == "__main__":
    main()
