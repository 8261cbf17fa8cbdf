"""Time in a simulation: what is due happens in order, and takes no time itself."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from minillm.sim.task import Task


class Clock:
    """`now_s` is the time of what happens at the moment. What is due at the same time happens in the order in which it was put down."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time_s: float, what: Callable[..., None], *about: Any) -> None:
        """Let something happen then."""
        self._count += 1
        heapq.heappush(self._due, (time_s, self._count, what, about))

    def run(self, tasks: Sequence[Task], arrive: Callable[[Task], None]) -> None:
        """Let requests arrive at their times, and all that follows from it happen, until nothing is due."""
        due = self._due
        for task in sorted(tasks, key=lambda each: each.arrival_s):
            while due and due[0][0] < task.arrival_s:
                self._next()
            self.now_s = task.arrival_s
            arrive(task)
        while due:
            self._next()

    def _next(self) -> None:
        self.now_s, _, what, about = heapq.heappop(self._due)
        what(*about)
