"""A server that only computes: its replies follow from its queue, its clock from who waits."""

from __future__ import annotations

import heapq

from pytest_qlab.engines.server import Reply, Request


class SimulatedServer:
    """Requests wait for one of `slots`; then `prefill` seconds to the first token, `step` to each.

    Args:
        short: numbers of requests that bring one token too few.
        fail: numbers of requests that fail when they would have begun.
        per_chunk: tokens that come together.
    """

    def __init__(
        self,
        *,
        slots: int = 1,
        prefill: float = 0.5,
        step: float = 0.125,
        short: frozenset[int] = frozenset(),
        fail: frozenset[int] = frozenset(),
        hang: frozenset[int] = frozenset(),
        per_chunk: int = 1,
    ) -> None:
        self.clock = 0.0
        self.requests: list[Request] = []
        self.sent_at: list[float] = []
        self._free = [0.0] * slots
        self._prefill, self._step, self._per_chunk = prefill, step, per_chunk
        self._short, self._fail, self._hang = short, fail, hang
        self._done: list[tuple[float, int, Reply]] = []

    def now(self) -> float:
        return self.clock

    def send(self, request: Request) -> None:
        self.requests.append(request)
        self.sent_at.append(self.clock)
        start = max(self.clock, heapq.heappop(self._free))
        number = request.number
        if number in self._hang:
            heapq.heappush(self._free, float("inf"))
            return
        if number in self._fail:
            heapq.heappush(self._free, start)
            reply = Reply(number, self.clock, error="the server said no")
            heapq.heappush(self._done, (start, number, reply))
            return
        left = request.tokens - (number in self._short)
        times, counts = [start + self._prefill], [min(self._per_chunk, left)]
        left -= counts[0]
        while left:
            counts.append(min(self._per_chunk, left))
            times.append(times[-1] + self._step * counts[-1])
            left -= counts[-1]
        heapq.heappush(self._free, times[-1])
        reply = Reply(number, self.clock, tuple(times), tuple(counts), len(request.prompt))
        heapq.heappush(self._done, (times[-1], number, reply))

    def wait(self, until: float) -> Reply | None:
        if self._done and self._done[0][0] <= max(until, self.clock):
            time, _, reply = heapq.heappop(self._done)
            self.clock = max(self.clock, time)
            return reply
        self.clock = max(self.clock, until)
        return None
