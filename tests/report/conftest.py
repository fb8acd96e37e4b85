"""A results document such as a real run leaves: nine candidates, one over budget, one broken."""

from __future__ import annotations

import math
import random

import pytest

from pytest_qlab.results import Budget, CandidateResult, LayerRow, Measure, Results

KERNEL = "dequantize-matmul"
SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
# id, method, bits, KL, weight SNR in dB
ROWS = (
    ("none", "none", 16.0, 0.0, math.nan),
    ("dynamic-w8a8", "dynamic", 8.06, 0.00061, 38.0),
    ("dynamic-w4a8", "dynamic", 4.06, 0.0912, 17.5),
    ("static-w8a8", "static", 8.06, 0.0034, 38.0),
    ("static-w4a8", "static", 4.06, 0.1041, 17.5),
    ("rtn-w4g128", "rtn", 4.16, 0.0437, 19.8),
    ("gptq-w4g128", "gptq", 4.16, 0.0196, 18.9),
    ("awq-w4g128", "awq", 4.16, 0.0221, 19.1),
    ("gptq-w3g128", "gptq", 3.16, 0.1187, 12.6),
)
TEST = "tests/test_quality.py::test_quality"


def _measures(row: tuple[str, str, float, float, float], draw: random.Random) -> dict[str, Measure]:
    identifier, method, bits, kl, snr = row
    base, simulated = 21.374, method != "none"
    delta = base * (math.exp(kl * 0.55) - 1) if simulated else 0.0
    half = 0.08 * kl + 1e-5 if simulated else 0.0
    latency = 0.0412 * (1.0 if not simulated else draw.uniform(1.3, 1.7))
    total = 5_767_168 * 2 + 4_718_592 * bits / 8

    def quality(value: float, arm: float = 0.0, unit: str = "") -> Measure:
        return Measure(
            value=value,
            lower=value - arm,
            upper=value + arm,
            n=18_432,
            clusters=31,
            unit=unit,
            convention="spread512",
            candidate=identifier,
            detail=f"perplexity {base:.2f} -> {base + delta:.2f}",
        )

    def plain(value: float, unit: str = "", timed: bool = False) -> Measure:
        return Measure(
            value=value, unit=unit, simulated=timed and simulated, n=40 if timed else None
        )

    measures = {
        "perplexity": quality(base + delta, 1.31),
        "perplexity_delta": quality(delta, delta * 0.11),
        "perplexity_ratio": quality(1 + delta / base, delta / base * 0.11),
        "log_perplexity_delta": quality(math.log1p(delta / base), kl * 0.06, "nats"),
        "kl.mean": quality(kl, half, "nats"),
        "kl.median": quality(kl * 0.41, half * 0.4, "nats"),
        "kl.p99": quality(kl * 9.3, half * 14, "nats"),
        "kl.max": quality(kl * 41, unit="nats"),
        "top1_agreement": quality(1 - 0.42 * math.sqrt(kl), 0.0021 if simulated else 0.0),
        "bits_per_weight": plain(bits),
        "model_bits_per_weight": plain(total * 8 / 10_485_760),
        "compression_ratio": plain(10_485_760 * 2 / total),
        "size": plain(total, "bytes"),
        "memory.resident": plain(total * 1.02, "bytes"),
        "memory.peak": plain(total * 1.02 + 46_137_344, "bytes"),
        "latency.p50": plain(latency, "s", timed=True),
        "latency.p99": plain(latency * 1.18, "s", timed=True),
        "perplexity_delta[prose]": quality(delta * 1.2, delta * 0.2),
        "perplexity_delta[code]": quality(delta * 0.6, delta * 0.15),
        "perplexity_delta[chat]": quality(delta * 1.1, delta * 0.18),
    }
    if simulated:
        measures["latency.ratio"] = Measure(
            value=latency / 0.0412, lower=latency / 0.0431, upper=latency / 0.0399, simulated=True
        )
        measures["snr_db"] = quality(-10 * math.log10(kl) + 3, 0.4, "dB")
        measures["cosine"] = quality(1 - kl / 9, kl / 90)
        measures["weights.snr_db"] = plain(snr, "dB")
        measures["weights.cosine"] = plain(1 - 10 ** (-snr / 10) / 2)
        measures["layer_error"] = plain(56 * 10 ** (-snr / 10) * (0.55 if method == "gptq" else 1))
    return measures


def build_document() -> Results:
    """Nine candidates, one of which keeps one budget and breaks another, and one broken."""
    draw = random.Random(7)
    results = Results(
        version="0.1.0",
        created="2026-11-23T16:02:11+00:00",
        model={"id": "9f3c2a", "name": "embedded", "parameters": 10_485_760, "dtype": "float32"},
        evaluation={
            "id": "17bd",
            "name": "embedded",
            "documents": 31,
            "windows": 64,
            "tokens": 18_432,
            "convention": "spread512",
        },
        calibration={"id": "5e01", "name": "embedded", "sequences": 128, "tokens": 65_536},
        environment={
            "cpu": "Intel Xeon, 2.7 GHz",
            "cores": 2,
            "python": "3.11.7",
            "torch": "2.13.0",
            "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        },
        reused=4,
        forwards=576,
        seconds=97.4,
        summary={"passed": 25, "failed": 1, "error": 1, "skipped": 1},
        exit_status=1,
    )
    for row in ROWS:
        identifier, method, bits, _, snr = row
        layers = [
            LayerRow(
                name=f"model.layers.{block}.{name}",
                shape=shape,
                bits_per_weight=bits,
                snr_db=None
                if method == "none"
                else snr + draw.gauss(0, 1.2) - (4 if name == "mlp.down_proj" and block < 2 else 0),
                output_error=10 ** (-snr / 10),
            )
            for block in range(8)
            for name, shape in SHAPES.items()
        ]
        key = f"{draw.getrandbits(128):032x}"
        measures = _measures(row, draw)
        budgets = []
        if method != "none":
            delta, agreement = measures["perplexity_delta"].value, measures["top1_agreement"].value
            budgets = [
                Budget(
                    test=f"{TEST}[{identifier}]",
                    metric="perplexity_delta",
                    value=delta,
                    op="<",
                    budget=1.3,
                    ok=delta < 1.3,
                ),
                Budget(
                    test=f"{TEST}[{identifier}]",
                    metric="top1_agreement",
                    value=agreement,
                    op=">",
                    budget=0.85,
                    ok=agreement > 0.85,
                ),
                Budget(
                    test=f"tests/test_quality.py::test_divergence[{identifier}]",
                    metric="kl.mean",
                    value=measures["kl.mean"].value,
                    op="<=",
                    budget=0.15,
                    ok=True,
                ),
            ]
        results.built[key] = 1
        results.add(
            CandidateResult(
                id=identifier,
                method=method,
                options={} if method == "none" else {"bits": int(bits), "group_size": 128},
                kernel="torch.nn.functional.linear" if method == "none" else KERNEL,
                simulated=method != "none",
                measures=measures,
                layers=layers,
                seconds={"quantize": 4.2, "evaluate": 6.1},
                keys={"artefact": key},
                budgets=budgets,
                tests={
                    f"{TEST}[{identifier}]": "passed" if all(b.ok for b in budgets) else "failed",
                    f"tests/test_quality.py::test_divergence[{identifier}]": "passed",
                },
            )
        )
    results.add(
        CandidateResult(
            id="awq-w3g96",
            method="awq",
            options={"bits": 3, "group_size": 96},
            tests={f"{TEST}[awq-w3g96]": "error"},
            error="MethodError: awq cannot quantize model.layers.3.mlp.down_proj: a statistic of "
            "its inputs is not finite.\nCheck the calibration text, or evaluate in float32.",
        )
    )
    return results


@pytest.fixture(scope="session")
def document() -> Results:
    """The document; tests that change it take a deep copy."""
    return build_document()
