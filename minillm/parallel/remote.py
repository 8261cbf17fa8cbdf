"""The engine of an instance as the launching process sees it.

The scheduler and the loop are in the instance's rank 0 (`member.py`). Here requests are only submitted, repeated as their
doubles there give tokens, and cancelled. When a rank is lost the engine is lost: its requests fail, or others go on with
them, and the next one starts it anew.
"""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any

from minillm.engine.handing import Note
from minillm.engine.request import Piece, Request, with_twins
from minillm.engine.session import WAIT_S
from minillm.parallel.door import House
from minillm.parallel.instance import Instance
from minillm.parallel.member import serve
from minillm.parallel.messages import Added, Message, Recording, Seen, Source, Turn, add, cancel, follow, give
from minillm.policy.blocks import BlockPool
from minillm.policy.loans import Heartbeat
from minillm.policy.options import EngineOptions
from minillm.policy.request import Load, Order, ScheduledRequest, first_come
from minillm.policy.router import RoundRobin, Router
from minillm.policy.scheduler import Scheduler
from minillm.ranks.call import Call
from minillm.ranks.errors import RankError
from minillm.ranks.signals import uninterrupted
from minillm.trace.life import Event
from minillm.trace.recorder import Recorder

_numbers = count(1)  # of engines, unique in this process
_epochs = count(1)  # of requests that are sent


class RemoteEngine:
    """An engine on an instance's ranks, with the methods of `engine.Engine` that its users need.

    A `RankError` fails every request that was under way or, without `fails`, leaves them in `lost`. Among replicas its ranks
    are those from `first_rank` on. Where the instance has replicas of its own, which share experts, `router` says which of
    them gets a request.
    """

    def __init__(
        self,
        instance: Instance,
        options: EngineOptions,
        recorder: Recorder,
        order: Order = first_come,
        first_rank: int = 0,
        fails: bool = True,
        router: Router | None = None,
        house: House | None = None,
    ) -> None:
        self.instance, self.options, self.order, self.house = instance, options, order, house
        self.beat: Heartbeat | None = None  # of an instance that borrows
        self.notes: list[Note] = []
        self.first_rank, self.fails = first_rank, fails
        self.lost: list[Request] = []
        self.error: Exception | None = None  # with which it was lost
        self.number = next(_numbers)
        weakref.finalize(self, instance.forgotten.append, self.number)
        self.requests: dict[int, Request] = {}
        self._epochs: dict[int, int] = {}  # in which each of them was sent
        self.failed: frozenset[int] = frozenset()
        self._call: Call | None = None
        self._asked: frozenset[int] = frozenset()  # what the ranks had been sent when the call began
        self._trouble: Exception | None = None  # of somebody who listens to spans
        self._pieces: list[Piece] = []
        self.num_blocks = instance.open(self.number, options, order, house)
        self.leaders = instance.layout.leaders
        self.router = router or RoundRobin(len(self.leaders))
        self._rest()
        self._rules = Scheduler(BlockPool(self.num_blocks, options.block_size), options)  # only asked what can run
        self.record(recorder)

    def _rest(self) -> None:
        """Nothing is on the ranks."""
        self._loads = {leader: Load(0, 0, 0, self.num_blocks) for leader in self.leaders}

    @property
    def load(self) -> Load:
        """How full it is, as the ranks last told."""
        return Load(*map(sum, zip(*(vars(load).values() for load in self._loads.values()))))

    @property
    def at_rest(self) -> bool:
        """Whether no call is under way on the ranks."""
        return self._call is None

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or the ranks have not come to rest."""
        return bool(self.requests) or self._call is not None

    def check(self, request: ScheduledRequest) -> None:
        """Raise `ValueError` for a request that can never run here."""
        if request.request_id in self.requests:
            raise ValueError(f"there is a request {request.request_id} already: give another id")
        self._rules.check(request)

    def can_run(self, request: ScheduledRequest) -> bool:
        """Whether a request that is here already still can."""
        try:
            self._rules.check(request)
        except ValueError:
            return False
        return True

    def check_samples(self, samples: int) -> None:
        """Raise `ValueError` when so many samples of one prompt can never run together."""
        self._rules.check_samples(samples)

    def record(self, recorder: Recorder, baton: bool = False) -> None:
        """Let `recorder` have what happens from the next call on; with `baton` one rank computes at a time."""
        self.recorder, self._fresh = recorder, True
        self.baton = tempfile.NamedTemporaryFile(prefix="minillm-baton-") if baton else None  # noqa: SIM115

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Let requests wait that came at `arrived_s`, or now; all of them or, with a `ValueError` for one that can never
        run, none.
        """
        for request in requests:
            self.check(request.scheduled)
        when = time.monotonic() if arrived_s is None else arrived_s
        for request in requests:
            request.life.note(Event.ARRIVED, when)
            self.recorder.trace.lives.append(request.life)
        self.take_over(requests)

    def take_over(self, requests: Sequence[Request], handed: bool = False, source: Source | None = None) -> None:
        """Let requests wait that have arrived, and whose lives are recorded; another engine may have begun them. What they were
        given stays theirs. To be `handed` over they are kept after the next token; with a `source` their K and V come from there.
        """
        shares: dict[int, list[Added]] = {}
        for request, leader in zip(requests, self._leaders_for(requests)):
            epoch = next(_epochs)
            for each in [request] if request.token_ids else [request, *request.twins]:
                self.requests[each.request_id], self._epochs[each.request_id] = each, epoch
                each.life.rank = self.first_rank + leader
            added = replace(Added.of(request), handed=handed, source=source, epoch=epoch)
            shares.setdefault(leader, []).append(added)
        self._asked -= {each.request_id for each in requests}  # sent again
        with self._or_lost(RankError):
            if self._call is None:
                self.instance.open(self.number, self.options, self.order, self.house)
            for leader, share in shares.items():
                self._post(leader, add(share))

    def _leaders_for(self, requests: Sequence[Request]) -> list[int]:
        """Who gets each request, as the router says; when it raises, it has heard of none of them."""
        found: list[int] = []
        try:
            for request in requests:
                tokens, longest = request.scheduled.tokens, request.scheduled.longest
                found.append(self.leaders[self.router.route(request.request_id, tokens, longest - len(tokens))])
                for twin in [] if request.token_ids else request.twins:
                    self.router.join(twin.request_id, request.request_id)
        except BaseException:
            for request in requests[: len(found) + 1]:
                for each in [request, *request.twins]:
                    self.router.ended(each.request_id)
            raise
        return found

    def step(self, wait_s: float = WAIT_S) -> list[Piece]:
        """Take what the ranks have given since the last time; wait a moment for it when there is nothing."""
        self.begin()
        self._poll(wait_s)
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble
        return self.taken()

    def taken(self) -> list[Piece]:
        """The pieces that no step has returned yet."""
        pieces, self._pieces = self._pieces, []
        return pieces

    @property
    def sources(self) -> list[Any]:
        """What `multiprocessing.connection.wait` can wait for until a step has something to take."""
        return self._call.sources if self._call is not None else []

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended yet; their blocks are free when the batches they are in are back."""
        going = [request for request in with_twins(requests) if request.finish_reason is None]
        for request in going:
            request.cancel(time.monotonic())
        self.drop(going)

    @property
    def party(self) -> int:
        """Who it is to those that it borrows of; -1 for nobody."""
        return self.instance.parties.get(self.number, -1)

    def follow(self, view: dict[int, int], beyond: int, moves: list[tuple[int, int, int]]) -> None:
        """Tell it what the global manager says."""
        self._rules.beyond = beyond
        with self._or_lost(RankError):
            self._post(self.leaders[0], follow(view, beyond, moves))

    def give(self, request: Request, alone: bool) -> None:
        """Tell it what a request was given that waits there for its K and V, and whether it waits in vain."""
        with self._or_lost(RankError):
            self._post(self.leaders[0], give(request.request_id, request.token_ids, request.life, alone))

    def drop(self, requests: Iterable[Request]) -> None:
        """Serve requests no more that are served here; the others do not matter."""
        mine = [request.request_id for request in requests if self.requests.pop(request.request_id, None)]
        self.notes = [note for note in self.notes if note.request_id not in mine]  # the number may be given again
        for request_id in mine:
            self.router.ended(request_id)
        epochs = {request_id: self._epochs.pop(request_id) for request_id in mine}
        for leader in self.leaders if mine and self.instance.ranks.pids else ():
            self._post(leader, cancel(epochs))
        if self._call is not None and not self.requests:
            with suppress(RankError):  # nobody is left whom it concerns; the ranks start anew
                self._poll(0.0)
            self._trouble = None

    def close(self) -> None:
        """End its requests, and let the ranks forget it."""
        self.cancel(list(self.requests.values()))
        self.instance.drop(self.number)

    def begin(self) -> None:
        """Let the ranks serve until there is nothing left to do, if they do not yet."""
        if self._call is not None:
            return
        recording = Recording(
            self._fresh, self.recorder.timing, self.recorder.activations, self.recorder.details, self.recorder.on_span is not None,
            self.baton.name if self.baton else None,
        )  # fmt: skip
        with self._or_lost(RankError), uninterrupted():
            self._fresh, self._asked = False, frozenset(self.requests)
            self._call = self.instance.ranks.begin(
                serve, self.instance.name, self.number, recording, on_event=self._hear
            )

    def _poll(self, timeout_s: float) -> None:
        """Take what has come; when nothing is left to do, the last of what the ranks have recorded too."""
        assert self._call is not None
        with self._or_lost(Exception):
            over = self._call.poll(timeout_s)
            if not over and not self.requests:
                self._call.result()
                over = True
            if over and (silent := self._asked & self.requests.keys()):
                raise RuntimeError(f"the ranks came to rest, and said nothing of requests {sorted(silent)}")
        if over:
            self._call = None
            self.recorder.trace.spans.sort(key=lambda span: span.end_s)
            self.recorder.trace.memory.sort(key=lambda sample: sample.time_s)

    @contextmanager
    def _or_lost(self, error: type[Exception]) -> Iterator[None]:
        """When this fails so, the engine is lost, and with it its requests."""
        try:
            yield
        except error as reason:
            with uninterrupted():
                self.error = reason
                self.abandon()
            raise

    def abandon(self) -> None:
        """What is on the ranks is of no use any more: they make the engine anew, if they live, when it is needed next."""
        self._call = None
        self._rest()
        self.instance.opened.pop(self.number, None)
        lost, self.requests, self._epochs = list(self.requests.values()), {}, {}
        for request in lost:
            self.router.ended(request.request_id)
        if self.fails:
            self._fail(lost)
        else:
            self.lost += lost

    def _post(self, leader: int, message: Message) -> None:
        self.instance.ranks.post(leader, (self.number, message))

    def _hear(self, rank: int, event: Any) -> None:
        """What a rank has to tell: spans and memory, or tokens."""
        if isinstance(event, Seen):
            seen = event.among_others(self.first_rank)
            self.recorder.trace.memory.extend(seen.memory)
            for span in seen.spans:
                try:
                    self.recorder.add(span)
                except Exception as error:
                    self._trouble = error
            return
        turn: Turn = event
        self._loads[rank] = turn.load
        self.beat = turn.beat
        self.notes += [note for note in turn.notes if self._epochs.get(note.request_id) == note.epoch]
        for told in turn.told:
            request = self.requests.get(told.piece.request_id)
            if request is None or self._epochs[request.request_id] != told.epoch:  # cancelled meanwhile
                continue
            if not request.life.moments:  # a fork
                self.recorder.trace.lives.append(request.life)
            request.life.moments[told.since :] = told.moments
            request.life.reused_tokens = told.reused_tokens
            request.repeat(told.piece)
            self.router.gave(request.request_id)
            self._pieces.append(told.piece)
            if request.finish_reason is not None:
                del self.requests[request.request_id], self._epochs[request.request_id]
                self.router.ended(request.request_id)

    def _fail(self, requests: list[Request]) -> None:
        """Give up what was under way."""
        self.failed = frozenset(request.request_id for request in requests)
        for request in requests:
            request.fail(time.monotonic())
