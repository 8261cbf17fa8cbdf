"""One machine of a simulated cluster: prompts that wait and are read, requests that decode, and the steps that it takes.

It counts tokens where an engine's scheduler has block tables, so that a cluster of a thousand machines can be simulated; its steps are
those of `policy/scheduler.py` with blocks of one token while the cache has room for what runs, which is tested. Steps that only decode
are alike but for the growing context: it leaps over as many as nothing can happen in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from minillm.policy.queue import Queue
from minillm.sim.clock import Clock
from minillm.sim.costs import Costs
from minillm.sim.decodes import Decodes
from minillm.sim.leap import Leap
from minillm.sim.limits import Limits, Owner
from minillm.sim.task import Task


class Machine:
    """Machine `number`. `admits(machine, task)` may hold back a request that is to come from elsewhere though it would fit."""

    def __init__(
        self,
        number: int,
        costs: Costs,
        limits: Limits,
        clock: Clock,
        owner: Owner,
        waiting: Queue[Task] | None = None,
        admits: Callable[[Machine, Task], bool] | None = None,
    ) -> None:
        self.number, self.costs, self.limits, self.clock, self.owner = number, costs, limits, clock, owner
        self.waiting: Queue[Task] = waiting if waiting is not None else Queue()
        self.admits = admits or (lambda machine, task: True)
        self.expected: deque[Task] = deque()  # they come from other machines, and wait for room here
        self.reading: list[Task] = []  # prompts begun
        self.decodes = Decodes()
        self.coming = 0  # requests with room here whose caches are on the way
        self.used = 0  # tokens of the cache that are taken
        self.borrowed = self.lent = 0  # of others' caches, and to others
        self.busy_s = 0.0
        self._joining: list[Task] = []
        self._busy = self._woken = False
        self._leap: Leap | None = None
        self._version = 0  # of the leap
        self._stalled_s = 0.0  # prompts since the last decode step
        self._free_s = [0.0] * costs.stages  # when each stage is

    def add(self, task: Task) -> None:
        """A prompt is to be read here. Raises `ValueError` for one that can never be."""
        self._check(task.longest)
        self.waiting.push(task)
        self._poke()

    def expect(self, task: Task) -> None:
        """A request whose cache is elsewhere is to go on here: its owner hears when there is room."""
        self._check(task.goes_on)
        self.expected.append(task)
        self._poke()

    def join(self, task: Task) -> None:
        """The cache of a request that was expected is here: it decodes."""
        task.handed = False
        self.coming -= 1
        self._joining.append(task)
        self._poke()

    def release(self, tokens: int) -> None:
        """So many tokens that were kept for another machine are not needed any more."""
        self.used -= tokens
        self._poke()

    @property
    def drained(self) -> bool:
        """Whether nothing is here or on its way."""
        return not (self.waiting or self.expected or self.reading or self.decodes.batch or self.coming or self._joining)

    @property
    def free(self) -> int:
        """Tokens of the cache that are not taken, as of the last step's end."""
        return self.limits.cache_tokens + self.borrowed - self.lent - self.used

    @property
    def idle_tokens(self) -> int:
        """Tokens that are free, and that the steps under way will not take."""
        steps = self._leap.steps if self._leap is not None else 1
        return self.free - steps * self.decodes.batch

    def look(self) -> None:
        """There may be room elsewhere."""
        self._poke()

    def _check(self, tokens: int) -> None:
        if tokens > self.limits.cache_tokens and tokens > self.free + self.owner.lendable(self):
            raise ValueError(
                f"a request needs {tokens:,} tokens of KV cache, but machine {self.number} has room for "
                f"{self.limits.cache_tokens:,}: leave it out, or take machines with more memory"
            )

    def _poke(self) -> None:
        """Something has changed: begin a step, or let the steps that decode end early."""
        if not self._busy:
            if not self._woken:  # all that happens now happens before
                self._woken = True
                self.clock.at(self.clock.now_s, self._wake)
        elif self._leap is not None and (self._joining or self._could_start()):
            leap = self._leap
            steps = leap.step_under_way(self.clock.now_s)
            if steps < leap.steps:
                leap.steps = steps
                self._version += 1
                self.clock.at(leap.began_s + leap.run_s(steps), self._leap_over, self._version)

    def _wake(self) -> None:
        self._woken = False
        if not self._busy:
            self._begin()

    def _could_start(self) -> bool:
        """Whether somebody who waits may start at the end of this step."""
        if self._running >= self.limits.max_running:
            return False
        comes = bool(self.expected) and self._may_come(self.expected[0])
        if comes or not self.waiting:
            return comes
        return self._claim(self.waiting.first) <= self.free + self.owner.lendable(self)

    @property
    def _running(self) -> int:
        """Requests that have a place."""
        return self.decodes.batch + len(self.reading) + len(self._joining) + self.coming

    def _claim(self, task: Task) -> int:
        """Tokens that are taken for a request whose prompt is read here."""
        return task.longest if self.limits.reserve else task.tokens

    def _claim_coming(self, task: Task) -> int:
        """Tokens that are taken for one whose cache comes."""
        return task.goes_on if self.limits.reserve else task.prompt

    def _begin(self) -> None:
        """The next step, if there is anything to do."""
        for task in self._joining:
            self.decodes.join(task)
        self._joining.clear()
        while self.expected and self._may_come(self.expected[0]):
            task = self.expected.popleft()
            self.used += self._claim_coming(task)
            self.coming += 1
            self.owner.has_room(self, task)
        if parts := self._pick(alone=self._make_room()):
            self._read(parts)
        elif self.decodes.batch:
            self._decode_on()
        else:
            self.owner.idle(self)

    def _may_come(self, task: Task) -> bool:
        fits = self._running < self.limits.max_running and self._claim_coming(task) <= self.free
        return fits and self.admits(self, task)

    def _pick(self, alone: bool) -> list[tuple[Task, int, int]]:
        """The prompts of the next step: (request, from, to); `alone` those that were begun."""
        limits = self.limits
        parts: list[tuple[Task, int, int]] = []
        budget = limits.max_step_tokens - (0 if limits.apart else self.decodes.batch)
        for task in self.reading:
            if budget > 0 and task.read < task.tokens:
                budget -= self._part(task, budget, parts)
        while not alone and self.waiting and budget > 0 and self._running < limits.max_running:
            task = self.waiting.first
            too_much = not limits.chunked and task.tokens > budget and parts
            if too_much or not self._has_room(self._claim(task)):
                break
            self.waiting.pop()
            self.used += self._claim(task)
            self.reading.append(task)
            if task.started_s != task.started_s:
                task.started_s = self.clock.now_s
            self.owner.started(self, task)
            budget -= self._part(task, budget, parts)
        return parts

    def _has_room(self, tokens: int) -> bool:
        """Whether so many are free, or can be borrowed: then they are."""
        if tokens > self.free:
            self.owner.short(self, tokens - self.free)
        return tokens <= self.free

    def _part(self, task: Task, budget: int, parts: list[tuple[Task, int, int]]) -> int:
        """Take what the budget allows of a prompt; returns how much that is."""
        begin = task.read
        task.read = min(task.tokens, begin + budget) if self.limits.chunked else task.tokens
        parts.append((task, begin, task.read))
        return task.read - begin

    def _read(self, parts: list[tuple[Task, int, int]]) -> None:
        """Read prompts, while those that decode go along or stand still."""
        tokens = sum(end - begin for _, begin, end in parts)
        squares = sum(end * end - begin * begin for _, begin, end in parts)
        now_s, along = self.clock.now_s, bool(self.decodes.batch) and not self.limits.apart
        if along:
            took_s = self.costs.mixed_s(tokens, squares, self.decodes.batch, self.decodes.context + self.decodes.batch)
        else:
            took_s = self.costs.prompt_s(tokens, squares)
        self._busy = True
        done = [task for task, _, end in parts if end == task.tokens]
        if self.costs.stages > 1 and not self.decodes.batch:
            self.clock.at(self._through_stages(took_s), self._come_out, done)
            self.clock.at(self._free_s[0], self._next_batch)
            return
        self.busy_s += took_s
        self.clock.at(now_s + took_s, self._read_over, done, along, took_s)

    def _through_stages(self, took_s: float) -> float:
        """When a batch of prompts comes out of the pipeline: each stage takes it once it is free."""
        now_s, each_s = self.clock.now_s, took_s / self.costs.stages
        for stage, free_s in enumerate(self._free_s):
            now_s = self._free_s[stage] = max(now_s, free_s) + each_s
        self.busy_s += each_s
        return now_s

    def _next_batch(self) -> None:
        """The first stage is free."""
        self._busy = False
        self._begin()

    def _come_out(self, done: list[Task]) -> None:
        """Prompts have been through all stages."""
        for task in done:
            self._give(task)
        if not self._busy:
            self._begin()

    def _read_over(self, done: list[Task], along: bool, took_s: float) -> None:
        """A step with prompts has ended."""
        if along:
            self._advance(1, self._stalled_s + took_s)
        elif self.decodes.batch:
            self._stalled_s += took_s
        for task in done:
            self._give(task)
        self._busy = False
        self._begin()

    def _give(self, task: Task) -> None:
        """A prompt is read, for the first time or again: it gives a token."""
        self.reading.remove(task)
        task.given += 1
        if task.given == 1:
            task.first_s = self.clock.now_s
        else:
            task.longest_gap_s = max(task.longest_gap_s, self.clock.now_s - task.token_s)
        task.token_s = self.clock.now_s
        if task.given == task.new:
            self.used -= task.longest if self.limits.reserve else task.read
            self._end(task)
            return
        if task.given == 1:
            self.owner.first(self, task)
        if not task.handed:
            self.decodes.join(task)

    def _decode_on(self) -> None:
        """Decode until somebody ends, or room runs out."""
        decodes, steps = self.decodes, self.decodes.until_one_ends
        if not self.limits.reserve:
            steps = min(steps, self.free // decodes.batch)
        base_s, slope_s = self.costs.decode(decodes.batch)
        base_s += self.owner.away_s(self)
        leap = self._leap = Leap(self.clock.now_s, steps, base_s, slope_s, decodes.batch, decodes.context)
        self._busy, self._version = True, self._version + 1
        decodes.first_gap(leap.began_s + leap.run_s(1))
        self.clock.at(leap.began_s + leap.run_s(steps), self._leap_over, self._version)

    def _leap_over(self, version: int) -> None:
        if version != self._version or self._leap is None:
            return  # it ended early
        leap, self._leap, self._busy = self._leap, None, False
        self.busy_s += leap.run_s(leap.steps)
        last_s = leap.run_s(leap.steps) - leap.run_s(leap.steps - 1)
        self._advance(leap.steps, max(last_s, self._stalled_s + leap.run_s(1)))
        self._begin()

    def _advance(self, steps: int, longest_s: float) -> None:
        """All who decode have been given so many tokens; the longest of these steps took so long."""
        self._stalled_s = 0.0
        self.decodes.first_gap(self.clock.now_s)
        if not self.limits.reserve:
            self.used += self.decodes.batch * steps
        for task in self.decodes.advance(steps, longest_s):
            self.used -= task.longest if self.limits.reserve else task.read
            self._end(task)

    def _end(self, task: Task) -> None:
        task.finished_s = self.clock.now_s
        self.owner.finished(self, task)

    def _make_room(self) -> bool:
        """Every request that decodes needs room for a token: put the last ones back until there is some; whether any was."""
        before = self.decodes.batch
        while not self.limits.reserve and not self._has_room(self.decodes.batch):
            task = self.decodes.put_back(self.clock.now_s)
            self.used -= task.read
            task.read, task.preemptions = 0, task.preemptions + 1
            self.waiting.put_back(task)
        return self.decodes.batch < before
