"""A scheduler for pytest-xdist: one candidate's tests are one unit, dearest first, timing alone.

Runs that have no test of qlab are left to xdist's own `load` scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from xdist.report import report_collection_diff
from xdist.scheduler import LoadScheduling
from xdist.workermanage import WorkerController, parse_tx_spec_config

from pytest_qlab.xdist.plan import Plan, PlanEntry

MODULE_CHUNK = 20


class MethodScheduling:
    """Implements xdist's `Scheduling` protocol.

    Phase one hands out whole units; a worker asks for another when it holds fewer than two tests,
    because a worker starts a test only once it knows the next one or has been told to stop. In
    phase two one worker, all others having exited, runs the exclusive tests.

    Args:
        config: the controller's configuration.
        log: xdist's log producer, unused beyond the fallback.
        read_plan: called once, when all workers have collected.
        durations: seconds that tests took in an earlier run, by node id.
    """

    def __init__(
        self,
        config: pytest.Config,
        log: Any,
        read_plan: Callable[[], Plan],
        durations: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config
        self.numnodes = len(parse_tx_spec_config(config))
        self._read_plan = read_plan
        self._durations = durations or {}
        self._fallback: LoadScheduling | None = LoadScheduling(config, log)
        self._pending: dict[WorkerController, list[int]] = {}
        self._collections: dict[WorkerController, list[str]] = {}
        self._units: deque[list[int]] = deque()
        self._exclusive: list[int] = []
        self._exclusive_set: frozenset[int] = frozenset()
        self._mismatch = False
        self.collection: list[str] | None = None

    @property
    def _delegate(self) -> LoadScheduling | None:
        """xdist's scheduler, once it is known that there is nothing for us to schedule."""
        return self._fallback if self.collection is not None else None

    @property
    def nodes(self) -> list[WorkerController]:
        """Workers that have started and have not exited."""
        return list(self._pending)

    @property
    def collection_is_completed(self) -> bool:
        """Whether as many workers as were started have collected."""
        return len(self._collections) >= self.numnodes

    @property
    def tests_finished(self) -> bool:
        """Whether nothing is left to hand out and every worker holds its last test at most."""
        if self._delegate is not None:
            return bool(self._delegate.tests_finished)
        if not self.collection_is_completed:
            return False
        if self._units or self._exclusive:
            return False
        return all(len(pending) < 2 for pending in self._pending.values())

    @property
    def has_pending(self) -> bool:
        """Whether any test is left to run."""
        if self._delegate is not None:
            return bool(self._delegate.has_pending)
        return bool(self._units or self._exclusive or any(self._pending.values()))

    def add_node(self, node: WorkerController) -> None:
        """Take note of a worker that has started."""
        self._pending[node] = []
        if self._fallback is not None:
            self._fallback.add_node(node)

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Take note of what a worker has collected."""
        if self._fallback is not None:
            self._fallback.add_node_collection(node, collection)
        if self.collection is not None and list(collection) != self.collection:
            self._report_difference(node, self.collection, collection)
            return
        self._collections[node] = list(collection)

    def mark_test_complete(
        self, node: WorkerController, item_index: int, duration: float = 0
    ) -> None:
        """Take a finished test off the worker's list and give it more to do."""
        if self._delegate is not None:
            self._delegate.mark_test_complete(node, item_index, duration)
            return
        self._pending[node].remove(item_index)
        self._feed(node)

    def mark_test_pending(self, item: str) -> None:
        """Run a test once more, as plugins that rerun crashed tests ask for."""
        if self._delegate is not None:
            self._delegate.mark_test_pending(item)
            return
        assert self.collection is not None
        self._requeue([self.collection.index(item)])
        self._feed_all()

    def remove_pending_tests_from_node(
        self, node: WorkerController, indices: Sequence[int]
    ) -> None:
        """Never asked for: tests are not stolen from a worker."""
        raise NotImplementedError

    def remove_node(self, node: WorkerController) -> str | None:
        """Forget a worker that has exited; return the test it died in, if it did."""
        pending = self._pending.pop(node)
        if self._delegate is not None:
            crashed = self._delegate.remove_node(node)
            return None if crashed is None else str(crashed)
        if self._fallback is not None and node in self._fallback.nodes:
            self._fallback.remove_node(node)
        crash = None
        if pending:
            assert self.collection is not None
            crash = self.collection[pending[0]]
            self._requeue(pending[1:])
        self._feed_all()
        return crash

    def schedule(self) -> None:
        """Hand out the first units, or give a worker that was started late something to do."""
        if self._delegate is not None:
            self._delegate.schedule()
            return
        if self.collection is None and not self._start():
            return
        if self._delegate is not None:
            self._delegate.schedule()
            return
        self._feed_all()

    def _start(self) -> bool:
        first, collection = next(iter(self._collections.items()))
        for node, other in self._collections.items():
            if other != collection:
                self._report_difference(node, collection, other, first)
        if self._mismatch:
            return False
        plan = self._read_plan()
        self.collection = collection
        entries = [plan.get(name, PlanEntry()) for name in collection]
        if all(entry.group is None and not entry.exclusive for entry in entries):
            return True
        self._fallback = None
        self._units, self._exclusive = make_units(collection, plan, self._durations)
        self._exclusive_set = frozenset(self._exclusive)
        return True

    def _report_difference(
        self,
        node: WorkerController,
        expected: Sequence[str],
        found: Sequence[str],
        other: WorkerController | None = None,
    ) -> None:
        self._mismatch = True
        name = "an earlier worker" if other is None else other.gateway.id
        message = report_collection_diff(expected, list(found), name, node.gateway.id)
        report = pytest.CollectReport(node.gateway.id, "failed", message, [])
        self.config.hook.pytest_collectreport(report=report)

    def _requeue(self, indices: Iterable[int]) -> None:
        ordinary = []
        for index in indices:
            if index in self._exclusive_set:
                self._exclusive.append(index)
            else:
                ordinary.append(index)
        self._exclusive.sort()
        if ordinary:
            self._units.appendleft(ordinary)

    def _feed_all(self) -> None:
        if self.collection is None:
            return
        # Back and forth, so that whoever gets the dearest unit gets the cheapest of its round.
        order = self.nodes
        while self._units and any(self._is_hungry(node) for node in order):
            for node in order:
                if self._units and self._is_hungry(node):
                    self._send(node, self._units.popleft())
            order.reverse()
        for node in self.nodes:
            self._feed(node)

    def _is_hungry(self, node: WorkerController) -> bool:
        """Whether the worker can take tests and holds too few to start one."""
        return not node.shutting_down and node in self._collections and len(self._pending[node]) < 2

    def _feed(self, node: WorkerController) -> None:
        while self._units and self._is_hungry(node):
            self._send(node, self._units.popleft())
        if not self._is_hungry(node):
            return
        if not self._exclusive:
            node.shutdown()
        elif len(self._pending) == 1:
            exclusive, self._exclusive = self._exclusive, []
            self._send(node, exclusive)
            node.shutdown()
        elif sum(not other.shutting_down for other in self._pending) > 1:
            node.shutdown()

    def _send(self, node: WorkerController, indices: list[int]) -> None:
        self._pending[node].extend(indices)
        node.send_runtest_some(indices)


def make_units(
    collection: Sequence[str], plan: Plan, durations: Mapping[str, float]
) -> tuple[deque[list[int]], list[int]]:
    """Divide tests, given by index, into units (dearest first) and exclusive ones (in order).

    Tests of one candidate are one unit. Other tests go by file, in chunks. Units whose duration is
    remembered are ordered by it and come after those that never ran, which go by method cost.
    """
    groups: dict[tuple[str, str, int], list[int]] = {}
    exclusive = []
    seen: dict[str, int] = {}
    for index, name in enumerate(collection):
        entry = plan.get(name, PlanEntry())
        if entry.exclusive:
            exclusive.append(index)
        elif entry.group is not None:
            groups.setdefault(("candidate", entry.group, 0), []).append(index)
        else:
            module = name.split("::")[0]
            chunk = seen.get(module, 0) // MODULE_CHUNK
            seen[module] = seen.get(module, 0) + 1
            groups.setdefault(("module", module, chunk), []).append(index)

    def dearness(unit: list[int]) -> tuple[bool, float]:
        names = [collection[index] for index in unit]
        entries = [plan.get(name, PlanEntry()) for name in names]
        known = [durations[name] for name in names if name in durations]
        if not known and entries[0].group is not None:
            return True, max(entry.cost for entry in entries)
        return False, sum(known)

    return deque(sorted(groups.values(), key=dearness, reverse=True)), exclusive
