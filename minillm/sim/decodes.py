"""The requests that decode on one machine: all of them are given a token a step, so that a step costs the same however many there are."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from itertools import count

from minillm.sim.task import Task


class Decodes:
    """A `batch` of requests with `context` tokens in the cache together, and so many `steps` so far. What each has been given is worked out
    when it leaves.
    """

    def __init__(self) -> None:
        self.batch = self.context = self.steps = 0
        self._heap: list[tuple[int, int, Task, int]] = []  # (last step, count, task, the step it joined after)
        self._count = count()
        self._gaps: tuple[list[int], list[float]] = ([], [])  # after which step, how long one of the last steps took
        self._fresh: list[Task] = []  # they get their second token next

    @property
    def tasks(self) -> list[tuple[Task, int]]:
        """Who decodes, and how many tokens each has been given by now."""
        return [(task, task.given + self.steps - joined) for _, _, task, joined in self._heap]

    @property
    def until_one_ends(self) -> int:
        """Steps until the first of them has all its tokens."""
        return self._heap[0][0] - self.steps

    def join(self, task: Task) -> None:
        """One more decodes from the next step on."""
        heapq.heappush(self._heap, (self.steps + task.new - task.given, next(self._count), task, self.steps))
        self.batch += 1
        self.context += task.read
        self._fresh.append(task)

    def first_gap(self, ends_s: float) -> None:
        """The first step of those who have just joined ends then."""
        for task in self._fresh:
            if task.given == 1:
                task.longest_gap_s = ends_s - task.first_s
        self._fresh.clear()

    def advance(self, steps: int, longest_s: float) -> list[Task]:
        """So many steps have been taken, the longest in so many seconds; returns who has all tokens, and decodes no more."""
        self.steps += steps
        self.context += self.batch * steps
        self._gaps[0].append(self.steps)
        self._gaps[1].append(longest_s)
        ended = []
        while self._heap and self._heap[0][0] <= self.steps:
            _, _, task, joined = heapq.heappop(self._heap)
            ended.append(self._leave(task, joined))
        if not self._heap:
            self._gaps = [], []
        return ended

    def put_back(self, now_s: float) -> Task:
        """The one that arrived last decodes no more; its last token was given now, unless it had none here yet."""
        place = max(range(len(self._heap)), key=lambda each: self._heap[each][2].arrival_s)
        _, _, task, joined = self._heap.pop(place)
        heapq.heapify(self._heap)
        if task in self._fresh:
            self._fresh.remove(task)
        else:
            task.token_s = now_s
        return self._leave(task, joined)

    def _leave(self, task: Task, joined: int) -> Task:
        """Note what it has been given, and its longest gap."""
        steps = self.steps - joined
        task.given += steps
        task.read += steps
        self.batch -= 1
        self.context -= task.read
        since = bisect_right(self._gaps[0], joined)
        task.longest_gap_s = max(task.longest_gap_s, max(self._gaps[1][since:], default=0.0))
        return task
