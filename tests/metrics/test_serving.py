"""Load on simulated servers, whose numbers are known; percentiles, drift, saturation, limits."""

from __future__ import annotations

import math
import random

import pytest

from pytest_qlab.engines.server import Reply
from pytest_qlab.errors import MetricError, NotMeasuredError
from pytest_qlab.metrics.load import drive
from pytest_qlab.metrics.serving import Limits, Load, Serving, ServingRun
from tests.metrics.server_simulator import SimulatedServer

PROMPTS = [(1, 2, 3), (4, 5, 6)]


def serving(run: ServingRun) -> Serving:
    return Serving(run, *run.estimates("c"))


# Definitions


def test_ttft_tpot_and_gaps_of_one_reply() -> None:
    # 200 ms to the first token and 127 gaps of 20 ms, as in the docs: TPOT leaves the first out.
    times = tuple(10.2 + 0.02 * number for number in range(128))
    reply = Reply(0, 10.0, times, (1,) * 128)
    assert reply.ttft == pytest.approx(0.2)
    assert reply.e2e == pytest.approx(2.74)
    assert reply.tpot == pytest.approx(0.02)
    assert reply.gaps == pytest.approx([0.02] * 127)


def test_gaps_are_not_tpot_where_tokens_share_a_chunk() -> None:
    reply = Reply(0, 0.0, (1.0, 1.4, 1.8), (1, 4, 4))
    assert reply.tpot == pytest.approx(0.1)
    assert reply.gaps == pytest.approx([0.4, 0.4])


def test_one_token_has_no_tpot() -> None:
    assert Reply(0, 0.0, (1.0,), (1,)).tpot is None


# Closed loop


@pytest.mark.parametrize("clients", [1, 2, 4, 8])
def test_closed_loop_of_as_many_clients_as_slots(clients: int) -> None:
    server = SimulatedServer(slots=clients)
    run = drive(server, Load(concurrency=clients), PROMPTS, 9, Limits(requests=320, seconds=1e9))
    found = serving(run)
    # Powers of two throughout, so that sums are exact.
    assert (found.ttft.p50, found.ttft.p90, found.ttft.p99) == (0.5, 0.5, 0.5)
    assert (found.tpot.p50, found.tpot.p90, found.tpot.p99) == (0.125, 0.125, 0.125)
    assert run.stopped == "requests"
    assert len(run.measured) == 320
    assert run.drift == 1
    # Each client gets 9 tokens in 0.5 + 8 * 0.125 seconds; the measured time holds whole rounds.
    assert found.tokens_per_second == pytest.approx(clients * 9 / 1.5)
    low, high = found.tokens_per_second.lower, found.tokens_per_second.upper
    assert low is not None
    assert high is not None
    assert low <= clients * 9 / 1.5 <= high


def test_clients_that_wait_for_a_slot_see_it_in_ttft_alone() -> None:
    run = drive(SimulatedServer(slots=1), Load(concurrency=3), PROMPTS, 5, Limits(requests=40))
    # Service takes 1 s; of three clients each finds two others before it.
    assert set(run.ttft()) == {2.5}
    assert set(run.tpot()) == {0.125}
    assert serving(run).tokens_per_second == pytest.approx(5.0)


def test_no_more_requests_are_in_flight_than_clients_and_prompts_take_turns() -> None:
    server = SimulatedServer(slots=4)
    run = drive(server, Load(concurrency=3), PROMPTS, 5, Limits(requests=10, warmup=2))
    for time in server.sent_at:
        flying = sum(1 for r in run.replies if r.sent <= time < r.times[-1])
        assert flying <= 3
    assert [each.prompt for each in server.requests[:4]] == [*PROMPTS, *PROMPTS]
    assert (run.first, run.last) == (2, 12)
    # The load was kept up until the last one that counts was complete.
    last = max(each.times[-1] for each in run.measured)
    assert sum(1 for r in run.replies if r.sent < last <= r.times[-1]) == 3


def test_the_time_limit_cuts_the_number_of_requests_and_waits_for_those_sent() -> None:
    # 1 s a request: in 10.5 s, 11 were sent; the warm-up is the first 2.
    run = drive(SimulatedServer(), Load(concurrency=1), PROMPTS, 5, Limits(seconds=10.5))
    assert run.stopped == "seconds"
    assert [each.number for each in run.measured] == list(range(2, 11))


def test_a_time_limit_within_the_warmup_measures_nothing() -> None:
    with pytest.raises(NotMeasuredError, match="only 2 requests were sent"):
        drive(SimulatedServer(), Load(concurrency=1), PROMPTS, 5, Limits(seconds=1.5))


def test_a_server_that_hangs_is_given_up() -> None:
    server = SimulatedServer(hang=frozenset({5}))
    with pytest.raises(NotMeasuredError, match="1 requests were still in flight 4 times as long"):
        drive(server, Load(concurrency=1), PROMPTS, 5, Limits(seconds=20))
    assert server.clock == 80


# Open loop


def test_poisson_arrivals_are_seeded_and_have_their_rate() -> None:
    times = []
    for seed in (1, 1, 2):
        server = SimulatedServer(slots=10_000)
        drive(server, Load(rate=4.0), PROMPTS, 2, Limits(requests=2000, seconds=1e9), seed=seed)
        times.append(server.sent_at)
    assert times[0] == times[1] != times[2]
    gaps = [b - a for a, b in zip(times[0], times[0][1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, abs=5 * 0.25 / math.sqrt(len(gaps)))
    # Of an exponential law the standard deviation is the mean.
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(0.25, rel=0.15)


def test_open_loop_with_room_for_all_waits_for_nobody() -> None:
    limits = Limits(requests=300, seconds=1e9)
    run = drive(SimulatedServer(slots=1000), Load(rate=3.0), PROMPTS, 9, limits)
    assert run.ttft() == pytest.approx([0.5] * 300)
    assert run.tpot() == pytest.approx([0.125] * 300)


def test_open_loop_waits_as_a_queue_with_one_server_does() -> None:
    """Mean wait of M/D/1 (Pollaczek and Khinchine): rho s / (2 (1 - rho))."""
    limits = Limits(requests=4000, warmup=100, seconds=1e9)
    server = SimulatedServer(prefill=0.75, step=0.25)  # 1 s for two tokens
    run = drive(server, Load(rate=0.5), PROMPTS, 2, limits)
    wait = sum(run.ttft()) / len(run.ttft()) - 0.75
    assert wait == pytest.approx(0.5 * 1 / (2 * (1 - 0.5)), rel=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_over_saturation_stops_the_run(seed: int) -> None:
    # One request takes 1 s and 1.5 come in a second.
    run = drive(
        SimulatedServer(), Load(rate=1.5), PROMPTS, 5, Limits(requests=5000, seconds=1e9), seed=seed
    )
    assert run.stopped == "over-saturated"
    assert len(run.replies) < 400
    with pytest.raises(MetricError, match=r"cannot serve 1\.5 requests a second"):
        run.estimates("c")


def test_a_busy_but_stable_server_is_seldom_called_over_saturated() -> None:
    limits = Limits(requests=400, seconds=1e9)
    alarms = [
        drive(SimulatedServer(), Load(rate=0.7), PROMPTS, 5, limits, seed=seed).saturated
        for seed in range(40)
    ]
    assert sum(alarms) <= 4


class Slow(SimulatedServer):
    """Sending takes half a second, as on a client that is too busy."""

    def send(self, request: object) -> None:
        self.clock += 0.5
        super().send(request)  # type: ignore[arg-type]


def test_a_late_client_does_not_hide_the_wait() -> None:
    run = drive(Slow(slots=1000), Load(rate=1e6), PROMPTS, 2, Limits(requests=20, warmup=0))
    # The n-th request is due almost at once, and leaves after (n + 1) / 2 seconds.
    assert run.ttft() == pytest.approx([0.5 * (n + 1) + 0.5 for n in range(20)], abs=1e-3)


# Failures, lengths, percentiles


def test_a_failed_request_ends_the_run_unless_it_is_allowed() -> None:
    with pytest.raises(MetricError, match=r"1 of 6 requests failed.* the server said no"):
        drive(SimulatedServer(fail=frozenset({5})), Load(concurrency=1), PROMPTS, 5)
    server = SimulatedServer(fail=frozenset({5}))
    run = drive(server, Load(concurrency=1), PROMPTS, 5, Limits(requests=10, failures=1))
    assert run.failed == 1
    assert 5 not in [each.number for each in run.measured]
    assert len(run.measured) == 9


def test_no_reply_at_all_is_an_error() -> None:
    server = SimulatedServer(fail=frozenset(range(100)))
    with pytest.raises(MetricError, match=r"brought a token. the server said no"):
        drive(server, Load(concurrency=1), PROMPTS, 5, Limits(requests=5, failures=100))


def test_replies_of_another_length_are_reported() -> None:
    server = SimulatedServer(short=frozenset({3, 4}))
    run = drive(server, Load(concurrency=1), PROMPTS, 5, Limits(requests=10))
    assert run.wrong_lengths == 2
    assert run.drift == pytest.approx(48 / 50)


def test_percentiles_come_only_from_samples_that_can_bound_them() -> None:
    for requests, named in ((4, []), (5, [50]), (28, [50]), (29, [50, 90]), (298, [50, 90])):
        run = drive(SimulatedServer(), Load(concurrency=1), PROMPTS, 5, Limits(requests=requests))
        found, missing = run.estimates("c")
        assert [f"serving.ttft.p{p}[1]" in found for p in (50, 90, 99)] == [
            p in named for p in (50, 90, 99)
        ]
        assert len(missing) == 2 * (3 - len(named))
    with pytest.raises(MetricError, match=r"p99\[1\] was not measured: it needs 299 requests"):
        _ = Serving(run, found, missing).ttft.p99


def test_percentiles_and_their_bounds_are_order_statistics() -> None:
    values = [float(number) for number in range(1, 101)]
    random.Random(0).shuffle(values)
    replies = tuple(
        Reply(n, 1000.0 * n, (1000.0 * n + v, 1000.0 * n + 2 * v), (1, 1))
        for n, v in enumerate(values)
    )
    run = ServingRun(Load(concurrency=2), 2, replies, 0, 100, "requests")
    found = serving(run)
    for estimate in (found.ttft.p50, found.tpot.p50):
        # Ranks 40 and 61 of 100 bound the median at 95 % (binomial tables).
        assert (estimate, estimate.lower, estimate.upper) == (50.0, 40.0, 61.0)
    assert found.ttft.p90 == 90.0
    assert found.ttft.p50.metric == "serving.ttft.p50[2]"
    assert found.ttft.p50.unit == "s"


def test_tokens_that_share_a_chunk_are_counted_by_the_server() -> None:
    run = drive(
        SimulatedServer(per_chunk=4, step=0.25), Load(concurrency=1), PROMPTS, 9, Limits(requests=9)
    )
    # 4 + 4 + 1 tokens at 0.5, 1.5 and 1.75 s.
    assert set(run.tpot()) == {1.25 / 8}
    assert sorted(set(run.itl())) == [0.25, 1.0]


def test_runs_survive_json() -> None:
    run = drive(SimulatedServer(), Load(rate=0.5), PROMPTS, 5, Limits(requests=10))
    assert ServingRun.from_dict(run.to_dict()) == run


@pytest.mark.parametrize("name", ["1", "8", "rate=2.5"])
def test_loads_have_names(name: str) -> None:
    assert Load.named(name).name == name


@pytest.mark.parametrize("name", ["", "x", "code", "rate=", "rate=x", "2.5"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(MetricError, match="is not a load"):
        Load.named(name)


@pytest.mark.parametrize(
    "given",
    [{}, {"concurrency": 0}, {"rate": 0.0}, {"rate": math.inf}, {"concurrency": 1, "rate": 1.0}],
)
def test_loads_are_one_thing(given: dict[str, float]) -> None:
    with pytest.raises(MetricError, match="Give one of the two"):
        Load(**given)  # type: ignore[arg-type]


def test_limits_must_leave_something() -> None:
    with pytest.raises(MetricError, match="at least 1 request"):
        Limits(requests=0)
    with pytest.raises(MetricError, match="needs a prompt"):
        drive(SimulatedServer(), Load(concurrency=1), [], 5)
