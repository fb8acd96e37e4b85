"""How much worse measures may be: `--qlab-compare-fail`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qlab.directions import DIRECTIONS
from pytest_qlab.errors import QlabError
from pytest_qlab.gate.thresholds import COMPARABLE, Threshold, parse_thresholds


def test_amounts_are_in_the_unit_or_shares_of_the_saved_value() -> None:
    found = parse_thresholds(["perplexity_delta:5%", " kl.mean : 0.002 ", "kl.mean[code]:1e-3"])
    assert list(found) == ["perplexity_delta", "kl.mean", "kl.mean[code]"]
    assert found["perplexity_delta"].margin(-2.0) == pytest.approx(0.1)
    assert found["kl.mean"].margin(123.0) == 0.002
    assert found["kl.mean[code]"].margin(0.0) == 0.001
    assert [str(each) for each in found.values()] == [
        "perplexity_delta:5%",
        "kl.mean:0.002",
        "kl.mean[code]:0.001",
    ]


@given(metric=st.sampled_from(COMPARABLE), amount=st.floats(0, 1e6), relative=st.booleans())
def test_every_measure_that_is_kept_can_be_held(metric: str, amount: float, relative: bool) -> None:
    text = f"{metric}:{amount!r}{'%' if relative else ''}"
    share = amount / 100 if relative else amount
    assert parse_thresholds([text]) == {metric: Threshold(metric, share, relative)}


def test_every_measure_there_is_can_be_held_or_says_why_not() -> None:
    for metric in DIRECTIONS:
        if metric in COMPARABLE:
            assert metric in parse_thresholds([f"{metric}:1"])
        else:
            with pytest.raises(QlabError, match=r"(Use|use|Did you mean) "):
                parse_thresholds([f"{metric}:1"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["kl.mean"], "expected MEASURE:AMOUNT"),
        ([":5"], "expected MEASURE:AMOUNT"),
        (["kl.maen:5"], "There is no measure 'kl.maen'. Did you mean 'kl.mean'"),
        (["kl.mean:"], "kl.mean: is not an amount"),
        (["kl.mean:-1"], "not an amount"),
        (["kl.mean:nan"], "not an amount"),
        (["kl.mean:inf%"], "not an amount"),
        (["kl.mean:5%%"], "not an amount"),
        (["size[code]:1"], "no domain 'code'"),
        (["kl.p99:0.1"], "needs the values of all tokens"),
        (["kl.mean:1", "kl.mean:2%"], "named twice"),
    ],
)
def test_a_mistake_says_what_is_expected(texts: list[str], message: str) -> None:
    with pytest.raises(QlabError, match=message):
        parse_thresholds(texts)
