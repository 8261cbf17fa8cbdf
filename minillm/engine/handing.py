"""What an engine does besides, when it hands requests over to other instances or goes on with theirs.

A request that is to be handed over is kept after its first token. One that comes waits until there are blocks for it, and then until
its K and V are in them. Who moves them is behind `Transfers`; when and between whom is decided in `policy/handing.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from minillm.engine.request import Request
from minillm.policy.admission import Gate, Running
from minillm.policy.batch import Batch
from minillm.policy.request import ScheduledRequest
from minillm.policy.scheduler import Scheduler
from minillm.trace.life import Event, RequestLife


def guard(scheduler: Scheduler, gate: Gate) -> None:
    """Let requests that come from elsewhere start when a gate says so, too."""

    def may_start(request: ScheduledRequest) -> bool:
        if not request.arriving or not scheduler.running:  # alone it may start, if it fits
            return True
        running = [Running(len(each.tokens), each.to_come) for each in scheduler.running]
        free = scheduler.pool.num_free * scheduler.pool.block_size
        return gate(len(request.tokens), request.to_come, free, running)

    scheduler.may_start = may_start


class Transfers(Protocol):
    """What moves K and V (`disagg/handover.py`). `sources` say where those of each request that comes are."""

    sources: dict[int, Any]

    def expect(self, request_id: int, blocks: Sequence[int]) -> None: ...

    def news(self) -> list[tuple[int, bool]]: ...

    def stop(self, request_id: int) -> None: ...


class What(Enum):
    """What can happen to a request that is handed over."""

    STARTED = "started"  # its prompt is being read
    UNREAD = "unread"  # it was put aside, and will be read again
    CAME = "came"  # its cache is here, where it goes on
    BROKEN = "broken"  # and will not come


@dataclass(frozen=True)
class Note:
    """What happened to a request. A prompt that is being read has so many `tokens`; it is the `reading`-th of this engine, for the
    request `alone` or for other samples too. `epoch` is that of the request.
    """

    what: What
    request_id: int
    reading: int = 0
    tokens: int = 0
    alone: bool = True
    epoch: int = 0


class Handing:
    """The engine's side of it. `early` requests are told of as soon as their prompts begin: `tell` is called at once then."""

    def __init__(
        self, scheduler: Scheduler, requests: dict[int, Request], transfers: Transfers, early: bool
    ) -> None:  # fmt: skip
        self.scheduler, self.requests, self.transfers, self.early = scheduler, requests, transfers, early
        self.tell: Callable[[], None] = lambda: None
        self.notes: list[Note] = []  # for whoever sends requests here
        self.came: set[int] = set()  # requests whose caches are here, and their next token not yet

    def taken(self) -> tuple[Note, ...]:
        """What has happened since the last time."""
        notes, self.notes = tuple(self.notes), []
        return notes

    def hear(self, now_s: float) -> None:
        """Requests whose K and V have come go on."""
        for request_id, came in self.transfers.news():
            request = self.requests.get(request_id)
            if request is None or not request.scheduled.arriving:
                continue
            self.notes.append(Note(What.CAME if came else What.BROKEN, request_id, epoch=request.epoch))
            if came:
                request.life.note(Event.CAME, now_s)
                self.came.add(request_id)
                self._go_on(request)

    def scheduled(self, batch: Batch, started: Sequence[int], now_s: float) -> None:
        """A batch was put together: some prompts begin, some were put aside, and for some requests there are blocks now."""
        for request_id in batch.preempted:
            if request_id in self.requests and self.requests[request_id].scheduled.handed:
                self.notes.append(Note(What.UNREAD, request_id, epoch=self.requests[request_id].epoch))
        begun = [note for request_id in started for note in self._begun(self.requests[request_id])]
        self.notes += begun
        if begun and self.early:
            self.tell()
        for request_id in batch.arrivals:
            request = self.requests[request_id]
            request.life.note(Event.TRANSFER, now_s)
            assert request.scheduled.table is not None
            self.transfers.expect(request_id, request.scheduled.table.blocks)

    def _begun(self, request: Request) -> list[Note]:
        """What is to be told of a prompt that begins: of each sample that will come of it."""
        scheduled = request.scheduled
        if not scheduled.handed:
            return []
        samples = [request, *request.twins] if scheduled.samples > 1 else [request]
        about = scheduled.reading, len(scheduled.tokens), len(samples) == 1
        return [Note(What.STARTED, each.request_id, *about, epoch=each.epoch) for each in samples]

    def left(self, request: Request) -> None:
        """A request has ended, and the scheduler knows: nothing comes for it any more."""
        self.came.discard(request.request_id)
        if request.scheduled.arriving:
            self.transfers.stop(request.request_id)
            if request.request_id in self.scheduler.requests:
                self.scheduler.missed(request.request_id)

    def give(self, request_id: int, tokens: Sequence[int], life: RequestLife) -> None:
        """All tokens that a request has been given, by whoever read its prompt, and what has happened to it there."""
        request = self.requests.get(request_id)
        if request is None:
            return
        for token in tokens[len(request.token_ids) :]:
            request.scheduled.tokens.append(token)
            request.take(token, 0.0)
        mine = [
            each
            for each in request.life.moments
            if each[0] in (Event.TRANSFER, Event.CAME) and each not in life.moments
        ]
        request.life.moments = sorted([*life.moments, *mine], key=lambda each: each[1])
        request.life.reused_tokens = life.reused_tokens
        self._go_on(request)

    def go_on_alone(self, request_id: int) -> None:
        """What was to come for a request will not: it is computed here."""
        request = self.requests.get(request_id)
        if request is not None and request.scheduled.arriving:
            self.came.discard(request_id)
            self.transfers.stop(request_id)
            self.scheduler.missed(request_id)

    def _go_on(self, request: Request) -> None:
        """Decode begins once the cache has come, and the token that follows it is known."""
        scheduled = request.scheduled
        if request.request_id in self.came and len(scheduled.tokens) > scheduled.arriving:
            self.came.discard(request.request_id)
            self.scheduler.arrived(request.request_id)
