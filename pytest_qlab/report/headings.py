"""The measures that are known: headings, meanings, units and formats of their columns."""

from __future__ import annotations

from dataclasses import replace

from pytest_qlab.report.column import TIMES, Column


def _quality(name: str, heading: str, short: str, rank: int, **more: object) -> Column:
    column = Column(name, heading, short, rank=rank, group="Quality")
    return replace(column, **more)  # type: ignore[arg-type]


def _latency(phase: str, heading: str, short: str, what: str, rank: int) -> list[Column]:
    """Columns of one phase; the median and the ratio are in the main table unless they rank low."""
    main, low = rank < 20, max(23, rank)
    column = Column("", "", "", kind="seconds", group="Memory and speed", most=2)
    times = [
        replace(
            column,
            name=f"latency.{phase}{name}",
            heading=f"{heading} {name}",
            short=f"{short}{name}",
            meaning=f"{words} time of {what}",
            primary=main and name == "p50",
            rank=rank if name == "p50" else low,
        )
        for name, words in (
            ("p50", "median"),
            ("p90", "90th percentile of the"),
            ("p99", "99th percentile of the"),
        )
    ]
    ratio = replace(
        column,
        name=f"latency.{phase}ratio",
        heading=f"{heading} ratio",
        short=f"{short}x time",
        meaning="time over the baseline's, measured interleaved in one process",
        unit=TIMES,
        kind="times",
        primary=main,
        rank=rank + 4,
    )
    return [*times, ratio]


def _speed(
    name: str, heading: str, short: str, rank: int, meaning: str, *, primary: bool = False
) -> Column:
    unit, kind = TIMES if name.endswith("ratio") else "", "number"
    if name.endswith("ratio"):
        kind = "times"
    elif name.startswith("throughput.") or name.endswith("per_second"):
        unit = "tokens/s"
    else:
        kind = "seconds"
    return Column(
        name,
        heading,
        short,
        meaning,
        unit=unit,
        kind=kind,  # type: ignore[arg-type]
        group="Memory and speed",
        most=2,
        primary=primary,
        rank=rank,
    )


KNOWN: tuple[Column, ...] = (
    _quality(
        "perplexity", "Perplexity", "ppl", 3, digits=4, most=2, meaning="exp of the mean loss"
    ),
    _quality(
        "perplexity_delta",
        "Δ perplexity",
        "dppl",
        1,
        kind="signed",
        most=3,
        meaning="perplexity minus the baseline's on the same tokens",
    ),
    _quality(
        "perplexity_ratio",
        "Perplexity ratio",
        "ppl ratio",
        24,
        digits=5,
        primary=False,
        meaning="perplexity over the baseline's",
    ),
    _quality(
        "log_perplexity_delta",
        "Δ log perplexity",
        "dlogppl",
        25,
        kind="signed",
        unit="nats",
        primary=False,
        meaning="mean loss minus the baseline's",
    ),
    _quality(
        "kl.mean",
        "KL mean",
        "KL",
        2,
        unit="nats",
        meaning="divergence of the next-token distribution from the baseline's, mean over tokens",
    ),
    _quality("kl.median", "KL median", "KL med", 26, unit="nats", primary=False),
    _quality(
        "kl.p99", "KL p99", "KL p99", 8, unit="nats", most=3, meaning="99th percentile over tokens"
    ),
    _quality("kl.max", "KL max", "KL max", 27, unit="nats", most=3, primary=False),
    _quality(
        "kl.tail",
        "KL tail",
        "KL tail",
        27,
        kind="percent",
        primary=False,
        meaning="tokens whose divergence is above 1 nat",
    ),
    _quality(
        "top1_agreement",
        "Top-1 agreement",
        "top-1",
        5,
        kind="percent",
        meaning="tokens for which the most likely next token is the baseline's",
    ),
    _quality(
        "snr_db",
        "Hidden SNR",
        "SNR",
        9,
        unit="dB",
        most=1,
        meaning="signal-to-noise ratio of the final hidden states",
    ),
    _quality(
        "cosine",
        "Hidden cosine",
        "cosine",
        28,
        digits=6,
        most=5,
        primary=False,
        meaning="cosine similarity of the final hidden states, mean over tokens",
    ),
    _quality(
        "weights.snr_db",
        "Weight SNR",
        "w SNR",
        20,
        unit="dB",
        most=1,
        primary=False,
        meaning="signal-to-noise ratio of the quantized weights",
    ),
    _quality(
        "weights.cosine",
        "Weight cosine",
        "w cos",
        29,
        digits=6,
        most=5,
        primary=False,
        meaning="cosine similarity of the quantized weights",
    ),
    _quality(
        "layer_error",
        "Layer error",
        "layer err",
        12,
        meaning="squared error of all layers' outputs on calibration inputs, relative",
    ),
    Column(
        "bits_per_weight",
        "Bits per weight",
        "bits",
        "stored bits per weight of the quantized linear layers, scales and zeros included",
        group="Size",
        digits=4,
        most=2,
        rank=4,
    ),
    Column(
        "model_bits_per_weight",
        "Bits per weight, model",
        "bits all",
        "stored bits per weight of the whole model, embeddings and head included",
        group="Size",
        digits=4,
        most=2,
        primary=False,
        rank=21,
    ),
    Column(
        "compression_ratio",
        "Compression",
        "ratio",
        "bytes of the base model over bytes of the candidate",
        unit=TIMES,
        kind="times",
        group="Size",
        most=2,
        rank=6,
    ),
    Column(
        "size",
        "Size",
        "size",
        "stored bytes of the whole model",
        kind="bytes",
        group="Size",
        most=1,
        rank=10,
    ),
    Column(
        "memory.resident",
        "Resident",
        "resident",
        "bytes of parameters and buffers in memory, as kernels keep them",
        kind="bytes",
        group="Memory and speed",
        most=1,
        primary=False,
        rank=22,
    ),
    Column(
        "memory.kv_per_token",
        "KV per token",
        "KV/tok",
        "bytes that one token adds to the key-value cache",
        kind="bytes",
        group="Memory and speed",
        most=1,
        primary=False,
        rank=23,
    ),
    Column(
        "memory.peak",
        "Peak memory",
        "peak",
        "highest live bytes during a forward pass",
        kind="bytes",
        group="Memory and speed",
        most=1,
        rank=13,
    ),
    Column(
        "memory.decode_peak",
        "Peak memory, decode",
        "peak dec",
        "highest live bytes while one token runs, the cache of the others included",
        kind="bytes",
        group="Memory and speed",
        most=1,
        primary=False,
        rank=24,
    ),
    Column(
        "memory.rss_peak",
        "Process peak",
        "rss",
        "most that a process has resident that loads the packed model and generates",
        kind="bytes",
        group="Memory and speed",
        most=1,
        primary=False,
        rank=24,
    ),
    *_latency("", "Latency", "", "a forward pass", 7),
    *_latency("prefill512.", "Prefill of 512", "pre512 ", "a forward pass over 512 tokens", 27),
    *_latency("decode.", "Decode", "dec ", "running one token after 128", 8),
    *_latency("decode512.", "Decode after 512", "dec512 ", "running one token after 512", 28),
    _speed("throughput.prefill", "Prefill", "prefill", 16, "tokens of a prompt per second"),
    _speed(
        "throughput.decode",
        "Decode",
        "decode",
        14,
        "tokens per second after the first",
        primary=True,
    ),
    _speed("throughput.prefill_ratio", "Prefill ratio", "x prefill", 32, "over the baseline's"),
    _speed(
        "throughput.decode_ratio",
        "Decode ratio",
        "x decode",
        15,
        "over the baseline's, in rounds that ran both",
        primary=True,
    ),
    _speed("load.cold", "Cold load", "cold", 33, "from disk to a model that can generate"),
    _speed("load.warm", "Warm load", "warm", 34, "the same with the files in the page cache"),
    _speed("first_generation", "First token", "first", 35, "of the first call of a fresh process"),
    _speed("serving.ttft.p50", "TTFT p50", "ttft", 36, "time to the first token, under load"),
    _speed("serving.ttft.p90", "TTFT p90", "ttft p90", 37, "time to the first token, under load"),
    _speed("serving.ttft.p99", "TTFT p99", "ttft p99", 38, "time to the first token, under load"),
    _speed("serving.tpot.p50", "TPOT p50", "tpot", 39, "time per token after the first"),
    _speed("serving.tpot.p90", "TPOT p90", "tpot p90", 40, "time per token after the first"),
    _speed("serving.tpot.p99", "TPOT p99", "tpot p99", 41, "time per token after the first"),
    _speed("serving.tokens_per_second", "Served", "tok/s", 42, "tokens per second, all requests"),
)
