"""Fidelity against formulas written out in loops, exact copies, and a coverage simulation."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_qlab.errors import MetricError
from pytest_qlab.metrics.fidelity import Fidelity
from pytest_qlab.metrics.tokens import TokenArrays
from pytest_qlab.stats.distributions import t_quantile
from tests.metrics.synthetic import synthetic

DOMAINS = ("prose", "code", "chat", "prose", "code", "chat")


def fidelity(tokens: TokenArrays, **options: Any) -> Fidelity:
    return Fidelity(
        tokens, domains=DOMAINS, candidate="rtn-w4", convention="spread20", name="toy", **options
    )


def copy_of(tokens: TokenArrays) -> TokenArrays:
    """What comparing the baseline with itself gives."""
    n = tokens.base_nll.size
    return TokenArrays(
        base_nll=tokens.base_nll,
        candidate_nll=tokens.base_nll.copy(),
        kl=np.zeros(n, dtype=np.float32),
        agree=np.ones(n, dtype=bool),
        window=tokens.window,
        document=tokens.document,
        hidden_signal=tokens.hidden_signal,
        hidden_error=np.zeros(n, dtype=np.float32),
        hidden_cosine=np.ones(n, dtype=np.float32),
    )


def test_values_are_those_of_the_plain_formulas() -> None:
    tokens = synthetic()
    found = fidelity(tokens)
    base, ours = tokens.base_nll.tolist(), tokens.candidate_nll.tolist()
    n = len(base)
    base_ppl, our_ppl = math.exp(math.fsum(base) / n), math.exp(math.fsum(ours) / n)
    assert tokens.hidden_signal is not None
    assert tokens.hidden_error is not None
    signal, error = math.fsum(tokens.hidden_signal), math.fsum(tokens.hidden_error)
    expected = {
        "perplexity": our_ppl,
        "base_perplexity": base_ppl,
        "perplexity_delta": our_ppl - base_ppl,
        "log_perplexity_delta": math.log(our_ppl / base_ppl),
        "perplexity_ratio": our_ppl / base_ppl,
        "kl.mean": math.fsum(tokens.kl) / n,
        "kl.median": float(np.quantile(tokens.kl, 0.5, method="inverted_cdf")),
        "kl.p99": float(np.quantile(tokens.kl, 0.99, method="inverted_cdf")),
        "kl.max": float(tokens.kl.max()),
        "kl.tail": sum(value > 1 for value in tokens.kl.tolist()) / n,
        "top1_agreement": int(tokens.agree.sum()) / n,
        "snr_db": 10 * math.log10(signal / error),
        "cosine": math.fsum(tokens.hidden_cosine) / n,  # type: ignore[arg-type]
    }
    estimates = found.estimates(by_domain=False)
    assert estimates.keys() == expected.keys()
    for name, value in expected.items():
        assert float(estimates[name]) == pytest.approx(value, rel=1e-9), name
        assert estimates[name].metric == name
        assert estimates[name].n == n
        assert estimates[name].clusters == 6
        assert estimates[name].candidate == "rtn-w4"
        assert estimates[name].convention == "spread20"
        assert estimates[name].confidence == 0.95


def document_sums(tokens: TokenArrays, values: NDArray[Any]) -> list[float]:
    """Sums over each document's tokens, in loops."""
    sums = [0.0] * (int(tokens.document.max()) + 1)
    for window, value in zip(tokens.window.tolist(), values.tolist(), strict=True):
        sums[int(tokens.document[window])] += value
    return sums


def test_intervals_are_those_of_the_plain_formulas() -> None:
    tokens = synthetic(1)
    found = fidelity(tokens)
    counts = document_sums(tokens, np.ones(tokens.kl.size))
    base = document_sums(tokens, tokens.base_nll.astype(float))
    ours = document_sums(tokens, tokens.candidate_nll.astype(float))
    n, c = sum(counts), len(counts)
    mean_base, mean_ours = sum(base) / n, sum(ours) / n
    t = t_quantile(0.975, c - 1)

    def half(influences: list[float]) -> float:
        return t * math.sqrt(c / (c - 1) * sum(x * x for x in influences)) / n

    paired = half(
        [(o - b) - (mean_ours - mean_base) * k for o, b, k in zip(ours, base, counts, strict=True)]
    )
    assert found.log_perplexity_delta.upper == pytest.approx(mean_ours - mean_base + paired)
    assert found.perplexity_ratio.lower == pytest.approx(math.exp(mean_ours - mean_base - paired))
    alone = half([o - mean_ours * k for o, k in zip(ours, counts, strict=True)])
    assert found.perplexity.upper == pytest.approx(math.exp(mean_ours + alone))
    assert found.perplexity.lower == pytest.approx(math.exp(mean_ours - alone))
    delta = half(
        [
            math.exp(mean_ours) * (o - mean_ours * k) - math.exp(mean_base) * (b - mean_base * k)
            for o, b, k in zip(ours, base, counts, strict=True)
        ]
    )
    middle = math.exp(mean_ours) - math.exp(mean_base)
    assert found.perplexity_delta.lower == pytest.approx(middle - delta)
    assert found.perplexity_delta.upper == pytest.approx(middle + delta)
    assert tokens.hidden_signal is not None
    assert tokens.hidden_error is not None
    signal = document_sums(tokens, tokens.hidden_signal.astype(float))
    error = document_sums(tokens, tokens.hidden_error.astype(float))
    snr = half([n * (s / sum(signal) - e / sum(error)) for s, e in zip(signal, error, strict=True)])
    assert found.hidden_snr_db.upper == pytest.approx(
        float(found.hidden_snr_db) + 10 / math.log(10) * snr
    )


def test_pairing_makes_the_interval_narrow() -> None:
    found = fidelity(synthetic(2, noise=0.01))
    paired, alone = found.perplexity_delta, found.perplexity
    assert paired.upper is not None
    assert paired.lower is not None
    assert alone.upper is not None
    assert alone.lower is not None
    assert (paired.upper - paired.lower) < 0.1 * (alone.upper - alone.lower)


def test_an_exact_copy_has_no_difference_and_no_doubt() -> None:
    found = fidelity(copy_of(synthetic(3))).estimates()
    for suffix in ("", "[code]"):
        for name, value in {
            "perplexity_delta": 0.0,
            "log_perplexity_delta": 0.0,
            "perplexity_ratio": 1.0,
            "kl.mean": 0.0,
            "kl.median": 0.0,
            "kl.p99": 0.0,
            "kl.tail": 0.0,
            "top1_agreement": 1.0,
            "snr_db": 200.0,
            "cosine": 1.0,
        }.items():
            estimate = found[name + suffix]
            assert (float(estimate), estimate.lower, estimate.upper) == (value, value, value)
    assert float(found["kl.max"]) == 0
    assert found["perplexity"].lower != found["perplexity"].upper


def test_that_a_copy_is_one_can_be_seen_on_a_single_document() -> None:
    alone = synthetic(documents=1, windows=2)
    found = fidelity(copy_of(alone))
    for exact in (found.perplexity_delta, found.perplexity_ratio, found.kl.mean, found.kl.p99):
        assert (exact.lower, exact.upper) == (float(exact), float(exact))
        assert exact.within(float(exact))
    assert found.kl.tail.within(0.0)
    assert found.top1_agreement.at_least(1.0)
    assert found.perplexity.lower is None
    damaged = fidelity(alone)
    assert damaged.kl.mean.lower is None
    assert damaged.kl.mean.within(100.0).outcome == "inconclusive"


def test_agreement_on_all_tokens_without_being_a_copy_keeps_its_doubt() -> None:
    """Clopper and Pearson's on as many tokens as would be as sure of the worst percent of KL."""
    tokens = synthetic(4)
    tokens.agree[:] = True
    n = tokens.agree.size
    worst = tokens.kl > np.quantile(tokens.kl, 0.99, method="inverted_cdf")
    share = worst.mean()
    sums, counts = document_sums(tokens, worst), document_sums(tokens, np.ones(n))
    squares = sum((s - share * k) ** 2 for s, k in zip(sums, counts, strict=True))
    effect = (6 / 5 * squares / n**2) / (share * (1 - share) / (n - 1))
    assert effect > 1
    effective = n / effect * (t_quantile(0.975, n - 1) / t_quantile(0.975, 5)) ** 2
    found = fidelity(tokens).top1_agreement
    assert (float(found), found.upper) == (1.0, 1.0)
    assert found.lower == pytest.approx(0.025 ** (1 / effective))
    tokens = synthetic(4)
    tokens.agree[:] = False
    found = fidelity(tokens).top1_agreement
    assert (float(found), found.lower) == (0.0, 0.0)
    assert found.upper == pytest.approx(1 - 0.025 ** (1 / effective))
    assert found.effective_n == pytest.approx(n / effect)


def test_a_tail_without_tokens_is_held_by_its_interval() -> None:
    """Independent tokens, none above 1 nat: at most 3 / n with 95 % confidence, and no zero."""
    n = 20_000
    generator = np.random.default_rng(12)
    nll = np.ones(n, dtype=np.float32)
    arrays = TokenArrays(
        nll,
        nll,
        generator.uniform(0, 0.5, n).astype(np.float32),
        np.ones(n, bool),
        np.repeat(np.arange(200, dtype=np.int32), 100),
        np.arange(200, dtype=np.int32),
    )
    found = Fidelity(arrays, domains=["d"] * 200).kl.tail
    assert (float(found), found.lower, found.standard_error) == (0.0, 0.0, 0.0)
    assert found.effective_n is not None
    assert found.effective_n == pytest.approx(n, rel=0.3)
    assert found.upper == pytest.approx(-math.log(0.025) / found.effective_n, rel=0.03)
    most = 3.0 / found.effective_n
    assert found.within(1.25 * most).outcome == "pass"
    assert found.within(0.95 * most).outcome == "inconclusive"


def test_documents_that_happen_to_agree_leave_a_doubt() -> None:
    """All have the same share, or nearly: their variance, next to none, says nothing."""
    tokens = synthetic(13, documents=4, windows=5)
    tokens.agree[:] = np.arange(tokens.agree.size) % 10 > 0
    plain = fidelity(tokens).top1_agreement
    sizes = np.bincount(tokens.document[tokens.window])
    first = np.cumsum([0, *sizes[:-1]])
    for start, size in zip(first.tolist(), sizes.tolist(), strict=True):
        tokens.agree[start : start + size] = np.arange(size) >= round(0.1 * size)
    for found in (plain, fidelity(tokens).top1_agreement):
        assert found.lower is not None
        assert found.upper is not None
        assert found.lower + 0.02 < float(found) < found.upper - 0.02


def test_a_rate_is_held_by_bounds_that_are_not_symmetric() -> None:
    """A few tokens above 1 nat: the upper bound is further away than the lower one."""
    tokens = synthetic(12, documents=6, windows=40, noise=0.02)
    tokens.kl[::1500] = 2.0
    found = fidelity(tokens).kl.tail
    assert 0 < float(found) < 0.002
    assert found.lower is not None
    assert found.upper is not None
    assert found.upper - float(found) > 1.3 * (float(found) - found.lower) > 0
    assert found.standard_error is not None
    symmetric = float(found) + t_quantile(0.95, 5) * found.standard_error
    assert found.within(1.02 * symmetric).outcome == "inconclusive"


def test_bounds_stay_where_values_can_be() -> None:
    found = fidelity(synthetic(5, documents=2, windows=1))
    assert found.kl.mean.lower == 0.0
    assert found.top1_agreement.lower is not None
    assert found.top1_agreement.upper is not None
    assert 0 <= found.top1_agreement.lower < found.top1_agreement.upper <= 1
    assert found.hidden_cosine.upper is not None
    assert found.hidden_cosine.upper <= 1.0


def test_everything_is_plain_json_and_finite() -> None:
    for tokens in (synthetic(), copy_of(synthetic()), synthetic(documents=1, windows=2)):
        for estimate in fidelity(tokens).estimates().values():
            json.dumps(estimate.to_dict(), allow_nan=False)
            for key, value in estimate.to_dict().items():
                assert type(value) in (float, int, str, bool, type(None)), key


def test_a_single_short_document_gives_values_without_intervals() -> None:
    found = fidelity(synthetic(documents=1))
    for estimate in found.estimates().values():
        assert (estimate.lower, estimate.upper) == (None, None)
        assert estimate.clusters == 1
    assert found.design_effect("kl.mean") is None


def test_the_detail_tells_what_was_measured() -> None:
    tokens = synthetic()
    found = fidelity(tokens)
    base, ours = found.base_perplexity, found.perplexity
    line = f"perplexity {base:.4g} -> {ours:.4g} on toy (18 windows, {tokens.kl.size:,} tokens)"
    assert found.perplexity_delta.detail == line
    tail = int((tokens.kl > 1).sum())
    assert found.kl.max.detail == f"{line}; {tail} of {tokens.kl.size:,} tokens above 1 nat"
    assert found.kl.tail.detail == found.kl.max.detail
    assert " on code toy (6 windows" in found.domain("code").kl.mean.detail


def test_domains_are_measured_apart() -> None:
    tokens = synthetic(6)
    found = fidelity(tokens)
    assert found.domains == ("prose", "code", "chat")
    of_code = np.isin(tokens.document[tokens.window], (1, 4))
    code = found.domain("code").kl.mean
    assert float(code) == pytest.approx(tokens.kl[of_code].astype(float).mean())
    assert (code.metric, code.clusters, code.n) == ("kl.mean[code]", 2, int(of_code.sum()))
    estimates = found.estimates()
    assert estimates["kl.mean[code]"] is code
    pooled = sum(
        float(estimates[f"kl.mean[{d}]"]) * (estimates[f"kl.mean[{d}]"].n or 0)
        for d in found.domains
    )
    assert pooled / tokens.kl.size == pytest.approx(float(estimates["kl.mean"]))
    with pytest.raises(MetricError, match=r"domain 'cod'.*Did you mean 'code'"):
        found.domain("cod")


def test_one_domain_is_not_reported_twice() -> None:
    found = Fidelity(synthetic(), domains=["only"] * 6)
    assert not [name for name in found.estimates() if "[" in name]


def test_stored_tensors_give_everything_back() -> None:
    found = fidelity(synthetic(7))
    again = Fidelity.from_tensors(
        found.to_tensors(), domains=DOMAINS, candidate="rtn-w4", convention="spread20", name="toy"
    )
    assert {k: v.to_dict() for k, v in again.estimates().items()} == {
        k: v.to_dict() for k, v in found.estimates().items()
    }
    assert np.array_equal(again.windows, found.windows)


def test_windows_without_scored_tokens_do_not_count() -> None:
    tokens = synthetic(9)
    padded = TokenArrays(
        **{
            **{k: v for k, v in vars(tokens).items() if k != "windows"},
            "document": np.append(tokens.document, np.int32(5)),
        }
    )
    assert len(fidelity(padded).windows) == 18
    assert float(fidelity(padded).kl.mean) == float(fidelity(tokens).kl.mean)


def test_design_effect_of_damage_that_documents_share() -> None:
    """Tokens that all have their document's divergence: the effect is the tokens per document."""
    generator = np.random.default_rng(10)
    documents, tokens = 200, 30
    window = np.repeat(np.arange(documents, dtype=np.int32), tokens)
    kl = generator.gamma(2, 1, documents)[window].astype(np.float32)
    nll = np.ones(kl.size, dtype=np.float32)
    arrays = TokenArrays(
        nll, nll, kl, np.ones(kl.size, bool), window, np.arange(documents, dtype=np.int32)
    )
    found = Fidelity(arrays, domains=["d"] * documents)
    assert found.design_effect("kl.mean") == pytest.approx(tokens, rel=0.01)
    assert found.design_effect("log_perplexity_delta") == 1.0
    with pytest.raises(MetricError, match="defined for means"):
        found.design_effect("kl.p99")
    with pytest.raises(MetricError, match="needs final hidden states"):
        found.design_effect("cosine")


def test_without_hidden_states_the_rest_is_there() -> None:
    fields = {k: v for k, v in vars(synthetic()).items() if not k.startswith("hidden")}
    found = fidelity(TokenArrays(**{k: v for k, v in fields.items() if k != "windows"}))
    assert "snr_db" not in found.estimates()
    assert "kl.mean[chat]" in found.estimates()
    for measure in ("hidden_snr_db", "hidden_cosine"):
        with pytest.raises(MetricError, match="needs final hidden states"):
            getattr(found, measure)
    assert Fidelity.from_tensors(found.to_tensors(), domains=DOMAINS).tokens.has_hidden is False


def test_snr_is_capped_on_both_sides() -> None:
    tokens = synthetic()
    assert tokens.hidden_error is not None
    assert tokens.hidden_signal is not None
    tokens.hidden_error[:] = 1e-30
    assert float(fidelity(tokens).hidden_snr_db) == 200
    tokens = synthetic()
    assert tokens.hidden_signal is not None
    tokens.hidden_signal[:] = 0
    assert float(fidelity(tokens).hidden_snr_db) == -200


def test_a_perplexity_that_overflows_is_an_error() -> None:
    tokens = synthetic()
    tokens.candidate_nll[:] = 800
    with pytest.raises(MetricError, match="perplexity of rtn-w4 overflows"):
        _ = fidelity(tokens).perplexity


def test_every_document_needs_a_domain() -> None:
    with pytest.raises(ValueError, match="document 5 has no domain"):
        Fidelity(synthetic(), domains=["a"])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), shuffle=st.permutations(range(18)))
def test_order_of_windows_and_numbers_of_documents_do_not_matter(
    seed: int, shuffle: list[int]
) -> None:
    tokens = synthetic(seed)
    renamed = np.random.default_rng(seed).permutation(6)
    order = np.concatenate([np.flatnonzero(tokens.window == w) for w in shuffle])
    lengths = [int((tokens.window == w).sum()) for w in shuffle]
    fields = {k: v[order] for k, v in vars(tokens).items() if k not in ("windows", "document")}
    fields["window"] = np.repeat(np.arange(18, dtype=np.int32), lengths)
    fields["document"] = renamed[tokens.document[shuffle]].astype(np.int32)
    domains = [DOMAINS[int(np.flatnonzero(renamed == d)[0])] for d in range(6)]
    a, b = (
        fidelity(tokens).estimates(),
        Fidelity(TokenArrays(**fields), domains=domains).estimates(),
    )
    assert a.keys() == b.keys()
    for name in a:
        # The bootstrap orders documents by their sums, whose last bits depend on the order.
        assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-9), name
        for ours, theirs in ((a[name].lower, b[name].lower), (a[name].upper, b[name].upper)):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-12), name


def test_intervals_of_paired_measures_cover_the_truth() -> None:
    """Documents share damage; the truth is a far larger sample of the same documents."""
    truth = fidelity_of_many(0, 20_000)
    resamples, covered = 400, dict.fromkeys(truth, 0)
    for seed in range(1, resamples + 1):
        sample = fidelity_of_many(seed, 40)
        for name, estimate in sample.items():
            assert estimate.lower is not None
            assert estimate.upper is not None
            covered[name] += estimate.lower <= float(truth[name]) <= estimate.upper
    for name, count in covered.items():
        assert 0.915 <= count / resamples <= 0.98, name


def fidelity_of_many(seed: int, documents: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    tokens = 12
    document = np.arange(documents, dtype=np.int32)
    window = np.repeat(document, tokens)
    difficulty = generator.normal(size=documents)[window]
    damage = generator.gamma(4, 0.25, documents)[window]
    base = (3 + 0.5 * difficulty + 0.5 * generator.normal(size=window.size)).astype(np.float32)
    moved = 0.1 * damage * (1 + generator.normal(size=window.size))
    arrays = TokenArrays(
        base_nll=base,
        candidate_nll=(base + moved).astype(np.float32),
        kl=np.square(moved).astype(np.float32),
        agree=generator.uniform(size=window.size) > 0.15 * damage,
        window=window,
        document=document,
    )
    found = Fidelity(arrays, domains=["d"] * documents)
    return {
        "perplexity": found.perplexity,
        "perplexity_delta": found.perplexity_delta,
        "log_perplexity_delta": found.log_perplexity_delta,
        "top1_agreement": found.top1_agreement,
    }
