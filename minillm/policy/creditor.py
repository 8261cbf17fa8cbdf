"""What an instance has lent to others of its KV cache: whom, how much, who claims more, and who is called to give back."""

from __future__ import annotations

from collections.abc import Sequence

from minillm.policy.loans import Age, Ask, CalledBack, Notice
from minillm.policy.request import ScheduledRequest
from minillm.policy.scheduler import Scheduler

PATIENCE_S = 1.0  # how long a claim or a call stands without being said again


class Creditor:
    """The creditor's side of an instance's account: `lent` has the blocks of each debtor, at most `most_lent` together."""

    def __init__(self, scheduler: Scheduler, most_lent: int) -> None:
        self.scheduler, self.pool = scheduler, scheduler.pool
        self.most_lent = min(most_lent, self.pool.num_blocks)
        self.lent: dict[int, list[int]] = {}
        self._claims: dict[int, tuple[Age, float]] = {}  # of debtors that cannot run without, and until when
        self._calls: dict[int, float] = {}  # debtors that were called, and until when
        self._notices: list[Notice] = []
        self._over: list[int] = []
        scheduler.may_start = self._may_start

    @property
    def num_lent(self) -> int:
        """Blocks that others have here."""
        return sum(map(len, self.lent.values()))

    def try_move_kvcache(self, debtor: int, ask: Ask, now_s: float) -> tuple[int, ...]:
        """Reserve blocks for another instance, as many as there is room for; none when its own requests are short. A firm ask is met
        whole or not at all, and kept in mind: until its request has all that it needs, younger ones do not start here.
        """
        room = min(self.most_lent - self.num_lent, self.pool.num_free)
        if ask.firm:
            self._claims[debtor] = (ask.age, now_s + PATIENCE_S)
            older = any(age < ask.age for age, _ in self._claims.values())
            room = 0 if older or room < ask.blocks else room
        elif self.scheduler.waiting or self._claims:
            room = 0
        else:
            room -= self._soon()
        granted = tuple(self.pool.take() for _ in range(max(0, min(room, ask.blocks))))
        if granted:
            self.lent.setdefault(debtor, []).extend(granted)
        return granted

    def take_back(self, debtor: int, blocks: Sequence[int]) -> None:
        """A debtor has returned these blocks."""
        for block in blocks:
            self.lent[debtor].remove(block)
            self.pool.release(block)
        if not self.lent[debtor]:
            del self.lent[debtor]
            self._calls.pop(debtor, None)

    def _soon(self) -> int:
        """Blocks that the running requests will take next: for the rest of their prompts, and one more each."""
        return sum(
            self.pool.blocks_for(len(request.tokens)) + 1 - len(request.table.blocks)
            for request in self.scheduler.running
            if request.table is not None
        )

    def unclaimed(self, debtor: int) -> None:
        """A debtor got all that it asked for firmly."""
        self._claims.pop(debtor, None)

    def _may_start(self, request: ScheduledRequest) -> bool:
        return all(age_of(request) <= age for age, _ in self._claims.values())

    def over(self) -> tuple[int, ...]:
        """Instances whose blocks here were taken back; said with the next step."""
        gone, self._over = tuple(self._over), []
        return gone

    def _forget(self, now_s: float) -> None:
        """Claims and calls that nobody repeats."""
        self._claims = {debtor: claim for debtor, claim in self._claims.items() if claim[1] > now_s}
        self._calls = {debtor: until for debtor, until in self._calls.items() if until > now_s}

    def _free(self, debtor: int) -> None:
        """A debtor is gone: what it had here is free."""
        self._claims.pop(debtor, None)
        self._calls.pop(debtor, None)
        if blocks := self.lent.pop(debtor, []):
            self._over.append(debtor)
            for block in blocks:
                self.pool.release(block)

    def _call_back(self, now_s: float) -> None:
        """Own requests that lack blocks, and older claims, call lent ones back."""
        if not self.lent:
            return
        lacking = self._short()
        ages = [age_of(request) for request in self.scheduler.running[:1]] if lacking > 0 else []
        if not ages and self.scheduler.waiting:
            first = self._first(now_s)
            need = min(self.pool.blocks_for(len(first.tokens)), self.pool.num_blocks)
            lacking, ages = need - self.pool.num_free, [age_of(first)]
        if self._claims:
            lacking, ages = max(lacking, self.num_lent), [*ages, *(age for age, _ in self._claims.values())]
        for debtor, blocks in self.lent.items():
            if lacking > 0 and debtor not in self._calls:
                self._calls[debtor] = now_s + PATIENCE_S
                self._notices.append(CalledBack(debtor, min(lacking, len(blocks)), min(ages)))
            lacking -= len(blocks)

    def _short(self) -> int:
        """Blocks that the running requests' next tokens lack."""
        need = 0
        for request in self.scheduler.running:
            if request.remaining and request.table is not None:
                start = request.computed + request.in_flight
                need += request.table.missing(start, start + 1)
        return need - self.pool.num_free - self.pool.leaving

    def _first(self, now_s: float) -> ScheduledRequest:
        """Who starts next."""
        self.scheduler.waiting.look(now_s)
        return self.scheduler.waiting.first


def age_of(request: ScheduledRequest) -> Age:
    """What is compared between instances: who is lower came first."""
    return request.priority, request.arrival_s, request.request_id
