from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qlab.xdist.plan import PlanEntry
from pytest_qlab.xdist.scheduler import MethodScheduling, make_units


class Node:
    """A worker as xdist's controller sees it; `step` behaves as xdist's worker does."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.queue: list[int] = []
        self.told_to_stop = False

    @property
    def shutting_down(self) -> bool:
        return self.told_to_stop

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.told_to_stop, "tests sent after shutdown are lost"
        self.queue.extend(indices)

    def shutdown(self) -> None:
        self.told_to_stop = True

    def can_run(self) -> bool:
        """A worker starts a test only once it knows the next one or has been told to stop."""
        return len(self.queue) >= 2 or (self.told_to_stop and bool(self.queue))


class Config:
    """What the scheduler asks of pytest's configuration."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.hook = SimpleNamespace(pytest_collectreport=self.note)
        self.reports: list[Any] = []

    def note(self, report: Any) -> None:
        self.reports.append(report)

    def getoption(self, name: str) -> None:
        return None

    def getvalue(self, name: str) -> Any:
        return ["popen"] * self.workers if name == "tx" else None


class Log:
    def __getattr__(self, name: str) -> Log:
        return self

    def __call__(self, *arguments: object) -> None:
        """Say nothing."""


def scheduling(
    plan: dict[str, PlanEntry], workers: int, durations: dict[str, float] | None = None
) -> MethodScheduling:
    config: Any = Config(workers)
    return MethodScheduling(config, Log(), lambda: plan, durations)


class Simulation:
    """Runs a schedule to its end, with workers that may die, as xdist's controller would."""

    def __init__(self, plan: dict[str, PlanEntry], workers: int, deaths: list[int]) -> None:
        self.names = list(plan)
        self.plan = plan
        self.scheduler: Any = scheduling(plan, workers)
        self.deaths = deaths
        self.ran: list[str] = []
        self.crashed: list[str] = []
        self.nodes: list[Node] = []
        self.alone: dict[str, int] = {}
        self.started = 0
        for _ in range(workers):
            self.start()

    def start(self) -> None:
        node = Node(f"gw{self.started}")
        self.started += 1
        self.nodes.append(node)
        self.scheduler.add_node(node)
        self.scheduler.add_node_collection(node, self.names)
        if self.scheduler.collection_is_completed:
            self.scheduler.schedule()

    def step(self, node: Node, number: int) -> None:
        index = node.queue[0]
        name = self.names[index]
        self.alone[name] = len(self.nodes)
        if number in self.deaths:
            self.nodes.remove(node)
            crashed = self.scheduler.remove_node(node)
            assert crashed == name
            self.crashed.append(name)
            self.start()
            return
        node.queue.pop(0)
        self.ran.append(name)
        self.scheduler.mark_test_complete(node, index, 0.0)

    def run(self, choose: Any) -> None:
        number = 0
        while self.nodes:
            done = [n for n in self.nodes if n.told_to_stop and not n.queue]
            for node in done:
                self.nodes.remove(node)
                assert self.scheduler.remove_node(node) is None
            able = [n for n in self.nodes if n.can_run()]
            if able:
                self.step(able[choose(len(able))], number)
                number += 1
            elif not done:
                # Only now may the controller end the run.
                assert self.scheduler.tests_finished, "nobody can go on: a deadlock"
                for node in self.nodes:
                    node.shutdown()
        assert not self.scheduler.has_pending


ENTRIES = st.builds(
    PlanEntry,
    group=st.sampled_from([None, "none", "alpha", "beta", "gamma"]),
    cost=st.sampled_from([0.0, 1.0, 5.0]),
    exclusive=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(ENTRIES, min_size=1, max_size=25),
    workers=st.integers(1, 4),
    deaths=st.lists(st.integers(0, 20), max_size=3),
    choices=st.randoms(use_true_random=False),
)
def test_every_test_runs_once_and_exclusive_ones_alone(
    entries: list[PlanEntry], workers: int, deaths: list[int], choices: Any
) -> None:
    entries = [*entries, PlanEntry(group="alpha", cost=1.0)]
    plan = {f"test_{i % 3}.py::test_{i}": entry for i, entry in enumerate(entries)}
    simulation = Simulation(plan, workers, deaths)
    simulation.run(choices.randrange)
    assert sorted(simulation.ran + simulation.crashed) == sorted(plan)
    for name, entry in plan.items():
        if entry.exclusive and not deaths:
            assert simulation.alone[name] == 1
    if not deaths:
        flags = [plan[name].exclusive for name in simulation.ran]
        assert flags == sorted(flags), "an exclusive test ran before an ordinary one"


def test_tests_of_a_candidate_stay_together_and_the_dearest_come_first() -> None:
    plan = {
        "t.py::plain": PlanEntry(),
        "t.py::q[rtn]": PlanEntry(group="rtn", cost=1),
        "t.py::q[gptq]": PlanEntry(group="gptq", cost=8),
        "t.py::p[rtn]": PlanEntry(group="rtn", cost=1),
        "t.py::p[gptq]": PlanEntry(group="gptq", cost=8),
        "t.py::speed[gptq]": PlanEntry(group="gptq", cost=8, exclusive=True),
    }
    units, exclusive = make_units(list(plan), plan, {})
    assert list(units) == [[2, 4], [1, 3], [0]]
    assert exclusive == [5]


def test_remembered_durations_replace_the_table_of_costs() -> None:
    plan = {
        "t.py::q[rtn]": PlanEntry(group="rtn", cost=1),
        "t.py::q[gptq]": PlanEntry(group="gptq", cost=8),
        "t.py::q[new]": PlanEntry(group="new", cost=2),
    }
    units, _ = make_units(list(plan), plan, {"t.py::q[rtn]": 9.0, "t.py::q[gptq]": 3.0})
    assert list(units) == [[2], [0], [1]]


def test_single_tests_are_spread_over_the_workers() -> None:
    plan = {f"t.py::q[m{i}]": PlanEntry(group=f"m{i}", cost=8 - i) for i in range(4)}
    simulation = Simulation(plan, 2, [])
    assert [node.queue for node in simulation.nodes] == [[0, 3], [1, 2]]


def test_runs_without_our_tests_are_left_to_xdist() -> None:
    plan = {f"t.py::test_{i}": PlanEntry() for i in range(8)}
    simulation = Simulation(plan, 2, [])
    assert type(simulation.scheduler._delegate).__name__ == "LoadScheduling"
    simulation.run(lambda count: 0)
    assert sorted(simulation.ran) == sorted(plan)


@pytest.mark.parametrize("late", [False, True])
def test_workers_that_collected_other_tests_are_an_error(late: bool) -> None:
    plan = {"t.py::q[a]": PlanEntry(group="a"), "t.py::q[b]": PlanEntry(group="b")}
    scheduler: Any = scheduling(plan, 1 if late else 2)
    first, second = Node("gw0"), Node("gw1")
    for node, names in ((first, list(plan)), (second, ["t.py::other"])):
        scheduler.add_node(node)
        scheduler.add_node_collection(node, names)
        if scheduler.collection_is_completed:
            scheduler.schedule()
    (report,) = scheduler.config.reports
    assert report.failed
    assert "Different tests were collected" in report.longrepr
    assert second.queue == []
