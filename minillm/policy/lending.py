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
from minillm.policy.request import ScheduledRequest, Status
from minillm.policy.scheduler import Scheduler

PATIENCE_S = 1.0  # how long a claim or a call stands without being said again

Age = tuple[float, float, int]


@dataclass(frozen=True)
class Ask:
    """What a debtor wants of a creditor: room for so many blocks of a request. `firm`: the request cannot run without."""

    creditor: int
    request_id: int
    blocks: int
    age: Age
    firm: bool = False


@dataclass(frozen=True)
class Returned:
    """A debtor does not need these blocks of a creditor any more."""

    away: Away


@dataclass(frozen=True)
class Unclaimed:
    """A debtor has all that it asked for firmly, of this creditor and others."""

    creditor: int


@dataclass(frozen=True)
class CalledBack:
    """A creditor wants so many blocks back from a debtor, for a request of this age."""

    debtor: int
    blocks: int
    age: Age


@dataclass(frozen=True)
class Placement:
    """Where blocks of a request lie: an entry of the heartbeat (`RequestPlacementEntry`)."""

    request_id: int
    instance: int
    blocks: int
    local: bool


@dataclass(frozen=True)
class Heartbeat:
    """What an instance tells the global manager: requests that run and wait, its blocks, and where those of its requests lie.
    It would lend `lendable` more blocks; `wanted` are those that its first waiting request lacks, and `tokens` what its running
    requests have in the cache.
    """

    instance: int
    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    lendable: int = 0
    lent_blocks: int = 0
    wanted: int = 0
    tokens: int = 0
    placements: tuple[Placement, ...] = ()


Notice = Returned | Unclaimed | CalledBack


@dataclass
class Called:
    """A creditor's call that is not answered yet."""

    blocks: int
    age: Age


class RManager:
    """The account of instance `number`: what it has lent (`lent`, by debtor), and, in its requests' block tables, what it has borrowed.

    It lends at most `most_lent` blocks, and none while its own requests are short. `on_demand`: it borrows whenever its own blocks run
    out (version 1 of the paper); without, only what cannot run otherwise, and what the global manager plans. Of requests that would fit
    at home at most `at_once` blocks move before a step.
    """

    def __init__(
        self, number: int, scheduler: Scheduler, most_lent: int, on_demand: bool = True, at_once: int = 1
    ) -> None:
        self.number, self.scheduler, self.pool = number, scheduler, scheduler.pool
        self.most_lent, self.on_demand, self.at_once = min(most_lent, self.pool.num_blocks), on_demand, at_once
        self.view: dict[int, int] = {}  # free blocks of others, as last heard
        self.lent: dict[int, list[int]] = {}
        self.settled: set[int] = set()  # requests that were called home and borrow no more
        self.planned: deque[tuple[int, int, int]] = deque()
        self._claims: dict[int, tuple[Age, float]] = {}  # of debtors that cannot run without, and until when
        self._calls: dict[int, float] = {}  # debtors that were called, and until when
        self._called: dict[int, Called] = {}  # creditors that call
        self._hurry: set[int] = set()  # requests whose blocks move at once
        self._pending: list[Move] = []
        self._landing: set[tuple[int, int]] = set()  # (creditor, block) of moves under way
        self._notices: list[Notice] = []
        self.gone: set[int] = set()  # who was lost, and does not come back
        self._over: list[int] = []
        scheduler.may_start = self._may_start

    # As a creditor

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
        return all(_age(request) <= age for age, _ in self._claims.values())

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

    def over(self) -> tuple[int, ...]:
        """Instances whose blocks here were taken back; said with the next step."""
        gone, self._over = tuple(self._over), []
        return gone

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
        self._claims.pop(instance, None)
        self._calls.pop(instance, None)
        self._called.pop(instance, None)
        self.view.pop(instance, None)
        if blocks := self.lent.pop(instance, []):
            self._over.append(instance)
            for block in blocks:
                self.pool.release(block)
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
        wanted = self.pool.blocks_for(len(waiting[0].tokens)) - self.pool.num_free if waiting else 0
        tokens = sum(request.computed for request in running)
        return Heartbeat(
            self.number, len(running), len(waiting), self.pool.num_free, self.pool.num_blocks,
            max(0, min(self.most_lent - self.num_lent, self.pool.num_free)), self.num_lent, max(0, wanted), tokens,
            tuple(placements),
        )  # fmt: skip

    def _expire(self, now_s: float) -> None:
        self._claims = {debtor: claim for debtor, claim in self._claims.items() if claim[1] > now_s}
        self._calls = {debtor: until for debtor, until in self._calls.items() if until > now_s}
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

    def _call_back(self, now_s: float) -> None:
        """Own requests that lack blocks, and older claims, call lent ones back."""
        if not self.lent:
            return
        lacking = self._short()
        ages = [_age(request) for request in self.scheduler.running[:1]] if lacking > 0 else []
        if not ages and self.scheduler.waiting:
            first = self._first(now_s)
            need = min(self.pool.blocks_for(len(first.tokens)), self.pool.num_blocks)
            lacking, ages = need - self.pool.num_free, [_age(first)]
        if self._claims:
            lacking, ages = max(lacking, self.num_lent), [*ages, *(age for age, _ in self._claims.values())]
        for debtor, blocks in self.lent.items():
            if lacking > 0 and debtor not in self._calls:
                self._calls[debtor] = now_s + PATIENCE_S
                self._notices.append(CalledBack(debtor, min(lacking, len(blocks)), min(ages)))
            lacking -= len(blocks)

    def _answer_calls(self) -> None:
        """Bring blocks home that creditors call for, those of the youngest request first; where there is no room, the request
        starts again. A call waits for requests that are in a batch.
        """
        for creditor, call in list(self._called.items()):
            holding = [request for request in self.scheduler.requests.values() if self._held_at(creditor, request)]
            for request in sorted(holding, key=_age, reverse=True):
                if call.blocks <= 0:
                    break
                count = self._held_at(creditor, request)
                if self.scheduler.outgrows(request):
                    if _age(request) <= call.age or request.in_flight:
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
                and not (self.scheduler.outgrows(request) and _age(request) <= call.age)
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

    def _first(self, now_s: float) -> ScheduledRequest:
        """Who starts next."""
        return min(self.scheduler.waiting, key=lambda each: self.scheduler.order(each, now_s))

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
            asks.append(Ask(creditor, first.request_id, count, _age(first), firm=True))
            needed -= min(needed, self.view[creditor])
        return asks

    def _short(self) -> int:
        """Blocks that the running requests' next tokens lack."""
        need = 0
        for request in self.scheduler.running:
            if request.remaining and request.table is not None:
                start = request.computed + request.in_flight
                need += request.table.missing(start, start + 1)
        return need - self.pool.num_free - self.pool.leaving

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
                    asks.append(Ask(creditor, request.request_id, some, _age(request)))
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
        return [Ask(creditor, request_id, count, _age(request))] if count > 0 else []

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


def _age(request: ScheduledRequest) -> Age:
    """What is compared between instances: who is lower came first."""
    return request.priority, request.arrival_s, request.request_id
