"""Instances that borrow blocks of each other's KV caches: what each of them keeps account of (Infinite-LLM, Lin et al. 2024, `rManager`).

A plain state machine beside an instance's scheduler: it holds no tensors, sends nothing and reads no clock. Whoever drives it, the
engine or a simulator, asks for what it wants of others (`asks`), carries that there (`try_move_kvcache`, at the creditor) and back
(`granted`), and delivers its notices. What it knows of others may be stale: a creditor that has no room left refuses.

Who comes first? Blocks that are lent to a request which would fit at home can be called back at any time, and that request borrows no more.
One that outgrows its own pool borrows all it may ever need before it starts, or nothing; of two such requests the older one goes first.
So nobody holds blocks while it waits for others' (no deadlock), and everybody's turn comes (no starvation).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.policy.batch import Away, Move
from minillm.policy.blocks import BlockTable
from minillm.policy.creditor import Creditor, age_of
from minillm.policy.loans import Age, Ask, CalledBack, Heartbeat, Notice, Placement, Returned, Unclaimed
from minillm.policy.request import ScheduledRequest, Status
from minillm.policy.scheduler import Scheduler


@dataclass
class Called:
    """A creditor's call that is not answered yet."""

    blocks: int
    age: Age


class RManager(Creditor):
    """The account of instance `number`: what it has lent (`lent`, by debtor), and, in its requests' block tables, what it has borrowed.

    It lends at most `most_lent` blocks, and none while its own requests are short. `on_demand`: it borrows whenever its own blocks run
    out (version 1 of the paper); without, only what cannot run otherwise, and what the global manager plans. Of requests that would fit
    at home at most `at_once` blocks move before a step.
    """

    def __init__(
        self, number: int, scheduler: Scheduler, most_lent: int, on_demand: bool = True, at_once: int = 1
    ) -> None:
        super().__init__(scheduler, most_lent)
        self.number, self.on_demand, self.at_once = number, on_demand, at_once
        self.view: dict[int, int] = {}  # free blocks of others, as last heard
        self.settled: set[int] = set()  # requests that were called home and borrow no more
        self.planned: deque[tuple[int, int, int]] = deque()
        self._called: dict[int, Called] = {}  # creditors that call
        self._hurry: set[int] = set()  # requests whose blocks move at once
        self._pending: list[Move] = []
        self._landing: set[tuple[int, int]] = set()  # (creditor, block) of moves under way
        self.gone: set[int] = set()  # who was lost, and does not come back

    # As a debtor

    def move_kvcache(self, request_id: int, blocks: int, creditor: int) -> None:
        """The global manager wants these blocks moved."""
        self.planned.append((request_id, blocks, creditor))

    def called_back(self, creditor: int, call: CalledBack) -> None:
        """A creditor wants blocks back."""
        self._called[creditor] = Called(call.blocks, call.age)

    def asks(self, now_s: float) -> list[Ask]:
        """What to ask of others before the next step, in this order. First, what creditors called for is made ready."""
        self._expire(now_s)
        self._answer_calls()
        self._call_back(now_s)
        return self._for_outgrown(now_s) or self._for_short(now_s) or self._as_planned()

    def granted(self, ask: Ask, blocks: tuple[int, ...]) -> bool:
        """A creditor has reserved blocks. False: it did not give all that was asked."""
        away = Away(ask.creditor, blocks)
        self.view[ask.creditor] = max(0, self.view.get(ask.creditor, 0) - len(blocks))
        if len(blocks) < ask.blocks:
            self.view[ask.creditor] = 0  # as it has just told
        if blocks:
            request = self.scheduler.requests.get(ask.request_id)
            if request is None or request.status is Status.GONE or (not ask.firm and request.status is Status.WAITING):
                self._notices.append(Returned(away))
            else:
                request.table = request.table or BlockTable(self.pool)
                request.table.reserved.append(away)
        return len(blocks) == ask.blocks

    def settle(self) -> None:
        """The asks are answered: who outgrows the pool and did not get all gives back what it got; others begin to move."""
        for request in list(self.scheduler.requests.values()):
            table = request.table
            if table is None or not table.reserved:
                continue
            if request.status is Status.WAITING:
                if table.num_reserved < self._needed(request):
                    self.pool.returned += table.reserved
                    table.reserved = []
                else:
                    self._notices += [Unclaimed(each.creditor) for each in table.reserved]
                continue
            if table.leaving:
                continue
            whole = self.scheduler.outgrows(request) or request.request_id in self._hurry
            count = min(table.num_reserved, table.movable(request.computed))
            self._note(table.lend(count if whole else min(count, self.at_once)))
        self._hurry.clear()

    def moves(self) -> tuple[Move, ...]:
        """The moves that go with the next step."""
        moves, self._pending = tuple(self._pending), []
        return moves

    @property
    def pending(self) -> bool:
        """Whether moves wait for a step."""
        return bool(self._pending)

    def landed(self, moves: Sequence[Move]) -> None:
        """The step that these went with is back."""
        for request in self.scheduler.requests.values():
            if request.table is not None and request.table.leaving and request.table.leaving[0] in moves:
                request.table.arrived()
        self._landing -= {(move.away.creditor, block) for move in moves for block in move.away.blocks}

    def notices(self) -> list[Notice]:
        """What others are to be told now."""
        kept: list[Away] = []
        for away in self.pool.returned:
            under_way = any((away.creditor, block) in self._landing for block in away.blocks)
            if away.creditor in self.gone:
                continue
            if under_way and not self._cancel(away):
                kept.append(away)
            else:
                self._notices.append(Returned(away))
        self.pool.returned = kept
        notices, self._notices = self._notices, []
        return notices

    # Both

    def lost(self, instance: int) -> None:
        """An instance is gone: what it borrowed is free, and requests that have blocks there start again."""
        self._called.pop(instance, None)
        self.view.pop(instance, None)
        self._free(instance)
        self.gone.add(instance)
        self._pending = [move for move in self._pending if move.away.creditor != instance]
        self._landing = {each for each in self._landing if each[0] != instance}
        self._drop_lost()

    def heartbeat(self) -> Heartbeat:
        """What the global manager is told."""
        waiting, running = self.scheduler.waiting, self.scheduler.running
        placements = []
        for request in running:
            assert request.table is not None
            here = len(request.table.blocks) - request.table.num_away
            placements.append(Placement(request.request_id, self.number, here, True))
            held = [*request.table.away, *request.table.reserved]
            for creditor in sorted({each.creditor for each in held}):
                count = sum(len(each.blocks) for each in held if each.creditor == creditor)
                placements.append(Placement(request.request_id, creditor, count, False))
        wanted = self.pool.blocks_for(len(waiting.first.tokens)) - self.pool.num_free if waiting else 0
        tokens = sum(request.computed for request in running)
        return Heartbeat(
            self.number, len(running), len(waiting), self.pool.num_free, self.pool.num_blocks,
            max(0, min(self.most_lent - self.num_lent, self.pool.num_free)), self.num_lent, max(0, wanted), tokens,
            tuple(placements), tuple(sorted(self.gone)),
        )  # fmt: skip

    def _expire(self, now_s: float) -> None:
        self._forget(now_s)
        self.settled &= self.scheduler.requests.keys()
        self._drop_lost()
        while self.planned and self.planned[0][0] not in self.scheduler.requests:
            self.planned.popleft()

    def _drop_lost(self) -> None:
        """Requests with blocks at an instance that is gone start again, once they are in no batch."""
        for request in list(self.scheduler.requests.values()):
            table = request.table
            if table is None or not any(each.creditor in self.gone for each in [*table.away, *table.reserved]):
                continue
            if request.status is Status.RUNNING and not request.in_flight:
                self.scheduler.preempt(request)

    def _answer_calls(self) -> None:
        """Bring blocks home that creditors call for, those of the youngest request first; where there is no room, the request
        starts again. A call waits for requests that are in a batch.
        """
        for creditor, call in list(self._called.items()):
            holding = [request for request in self.scheduler.requests.values() if self._held_at(creditor, request)]
            for request in sorted(holding, key=age_of, reverse=True):
                if call.blocks <= 0:
                    break
                count = self._held_at(creditor, request)
                if self.scheduler.outgrows(request):
                    if age_of(request) <= call.age or request.in_flight:
                        continue
                    self._give_up(request)
                elif request.in_flight or self._moving(request):
                    continue
                else:
                    self.settled.add(request.request_id)
                    self._home(request)
                call.blocks -= count
            if call.blocks <= 0 or not any(
                (request.in_flight or self._moving(request))
                and not (self.scheduler.outgrows(request) and age_of(request) <= call.age)
                for request in holding
            ):
                del self._called[creditor]

    def _home(self, request: ScheduledRequest) -> None:
        table = request.table
        assert table is not None
        if table.num_away and table.num_away <= self.pool.num_free - len(self.scheduler.running):
            self._note(table.bring_home())
        else:
            self._give_up(request)

    def _give_up(self, request: ScheduledRequest) -> None:
        if request.status is Status.RUNNING:
            self.scheduler.preempt(request)
        elif request.table is not None:
            self.pool.returned += request.table.reserved
            request.table.reserved = []

    def _held_at(self, creditor: int, request: ScheduledRequest) -> int:
        if request.table is None:
            return 0
        held = [*request.table.away, *request.table.reserved]
        return sum(len(each.blocks) for each in held if each.creditor == creditor)

    def _moving(self, request: ScheduledRequest) -> bool:
        assert request.table is not None
        table = request.table
        return bool(table.leaving) or any(
            (e.creditor, block) in self._landing for e in table.away for block in e.blocks
        )

    def _needed(self, request: ScheduledRequest) -> int:
        """Blocks that a request which outgrows this pool has to borrow: all that do not fit beside those lent to others."""
        return self.pool.blocks_for(request.most_cached) - (self.pool.num_blocks - self.num_lent)

    def _creditors(self) -> list[int]:
        """Others, those with the most free blocks first."""
        present = [each for each in self.view if each not in self.gone]
        return sorted(present, key=lambda each: (-self.view[each], each))

    def _for_outgrown(self, now_s: float) -> list[Ask]:
        """All that the first waiting request needs and cannot have here, once its own part is free here."""
        if not self.scheduler.waiting:
            return []
        first = self._first(now_s)
        if not self.scheduler.outgrows(first) or not self._may_start(first):
            return []
        needed = self._needed(first)
        own = max(1, self.pool.blocks_for(first.most_cached) - needed)
        if own > self.pool.num_free or (first.table is not None and first.table.reserved):
            return []
        asks = []
        for creditor in self._creditors():
            if needed <= 0:
                break
            count = (
                min(needed, self.view[creditor]) or needed
            )  # what it is said to have; who has nothing is told of the need
            asks.append(Ask(creditor, first.request_id, count, age_of(first), firm=True))
            needed -= min(needed, self.view[creditor])
        return asks

    def _for_short(self, now_s: float) -> list[Ask]:
        """Room for as many blocks as the next step lacks or, on demand, as the first waiting request lacks."""
        lacking = self._short()
        if lacking <= 0 and self.on_demand and self.scheduler.waiting and self._has_place():
            first = self._first(now_s)
            if not self.scheduler.outgrows(first) and self._may_start(first):
                lacking = self.pool.blocks_for(len(first.tokens)) + 1 - self.pool.num_free
        if lacking <= 0:
            return []
        lacking -= sum(self._ready(request) for request in self.scheduler.running)
        movable = [(self._movable(request), request) for request in self.scheduler.running]
        asks = []
        for count, request in sorted(movable, key=lambda each: -each[0]):
            for creditor in self._creditors():
                some = min(count, lacking, self.view[creditor])
                if some > 0:
                    asks.append(Ask(creditor, request.request_id, some, age_of(request)))
                    self._hurry.add(request.request_id)
                    count, lacking = count - some, lacking - some
        return asks

    def _has_place(self) -> bool:
        return len(self.scheduler.running) < self.scheduler.options.max_running

    def _ready(self, request: ScheduledRequest) -> int:
        """Blocks of a request that can move to where they are reserved already; now they do so at once."""
        assert request.table is not None
        count = min(request.table.num_reserved, request.table.movable(request.computed))
        if count:
            self._hurry.add(request.request_id)
        return count

    def _movable(self, request: ScheduledRequest) -> int:
        """Blocks of a request that may go and have no place yet."""
        if request.samples > 1 or request.request_id in self.settled or request.table is None:
            return 0
        if self.scheduler.outgrows(request):
            return 0
        return max(0, request.table.movable(request.computed) - request.table.num_reserved)

    def _as_planned(self) -> list[Ask]:
        """The next of the moves that the global manager has planned."""
        if not self.planned:
            return []
        request_id, blocks, creditor = self.planned.popleft()
        request = self.scheduler.requests.get(request_id)
        if request is None or request.status is not Status.RUNNING or creditor in self.gone:
            return []
        count = min(blocks, self._movable(request))
        return [Ask(creditor, request_id, count, age_of(request))] if count > 0 else []

    def _note(self, moves: list[Move]) -> None:
        self._pending += moves
        self._landing |= {(move.away.creditor, block) for move in moves for block in move.away.blocks}

    def _cancel(self, away: Away) -> bool:
        """Whether all moves of these blocks could be called off before they began."""
        under_way = {block for creditor, block in self._landing if creditor == away.creditor} & set(away.blocks)
        found = [
            move
            for move in self._pending
            if move.away.creditor == away.creditor
            and under_way.issuperset(move.away.blocks)
            and not (move.home and self._in_use(move))
        ]
        if {block for move in found for block in move.away.blocks} != under_way:
            return False
        self._pending = [move for move in self._pending if move not in found]
        self._landing -= {(away.creditor, block) for block in under_way}
        return True

    def _in_use(self, move: Move) -> bool:
        return any(self.pool.references[block] for block in move.blocks)
