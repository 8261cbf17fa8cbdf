"""An instance: one copy of the weights over ranks, and its engine as the launching process sees it.

The scheduler and the loop are in the instance's rank 0 (`member.py`). Here requests are only submitted, repeated as their
doubles there give tokens, and cancelled. When a rank is lost the instance is lost: its requests fail, and the next one
starts it anew.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minillm.engine.request import Piece, Request, with_twins
from minillm.parallel.layout import Layout
from minillm.parallel.member import (
    Added,
    Loaded,
    Recording,
    Seen,
    Turn,
    add,
    cancel,
    close_engine,
    load,
    open_engine,
    serve,
)
from minillm.policy.blocks import BlockPool
from minillm.policy.options import EngineOptions
from minillm.policy.scheduler import Load, Order, ScheduledRequest, Scheduler, first_come
from minillm.ranks.call import Call
from minillm.ranks.pool import Ranks
from minillm.trace.life import Event
from minillm.trace.recorder import Recorder

WAIT_S = 0.05


class Instance:
    """The weights of a checkpoint over `ranks`, as `layout` says. They are read at once, and again after a restart."""

    def __init__(self, ranks: Ranks, folder: Path, layout: Layout, dtype: torch.dtype) -> None:
        self.ranks, self.folder, self.layout, self.dtype = ranks, folder, layout, dtype
        self.opened: dict[int, int] = {}  # engines that the ranks hold, and the blocks of each
        self.engines = 0
        self._generation = -1
        self.loaded: list[Loaded] = []
        self.ready()

    def ready(self) -> None:
        """Have the weights on the ranks."""
        self.ranks.start()
        if self._generation != self.ranks.generation:
            self.loaded = self.ranks.run(load, self.folder, self.layout, self.dtype)
            self._generation = self.ranks.generation
            self.opened.clear()

    def open(self, number: int, options: EngineOptions, order: Order) -> int:
        """Have an engine on the ranks; returns how many blocks it has."""
        self.ready()
        if number not in self.opened:
            self.opened[number] = self.ranks.run(open_engine, number, options, order)[0]
        return self.opened[number]

    def drop(self, number: int) -> None:
        """Let the ranks forget an engine."""
        if self.opened.pop(number, None) is not None and self.ranks.pids and self._generation == self.ranks.generation:
            self.ranks.run(close_engine, number)


class RemoteEngine:
    """An engine on an instance's ranks, with the methods of `engine.Engine` that its users need.

    A `RankError` fails every request that was under way.
    """

    def __init__(
        self, instance: Instance, options: EngineOptions, recorder: Recorder, order: Order = first_come
    ) -> None:  # fmt: skip
        self.instance, self.options, self.order = instance, options, order
        instance.engines += 1
        self.number = instance.engines
        self.requests: dict[int, Request] = {}
        self.failed: frozenset[int] = frozenset()
        self._call: Call | None = None
        self._pieces: list[Piece] = []
        self.num_blocks = instance.open(self.number, options, order)
        self.load = Load(0, 0, 0, self.num_blocks)
        self._rules = Scheduler(BlockPool(self.num_blocks, options.block_size), options)  # only asked what can run
        self.record(recorder)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.requests)

    def check(self, request: ScheduledRequest) -> None:
        """Raise `ValueError` for a request that can never run here."""
        if request.request_id in self.requests:
            raise ValueError(f"there is a request {request.request_id} already: give another id")
        self._rules.check(request)

    def check_samples(self, samples: int) -> None:
        """Raise `ValueError` when so many samples of one prompt can never run together."""
        self._rules.check_samples(samples)

    def record(self, recorder: Recorder, baton: bool = False) -> None:
        """Let `recorder` have what happens from the next call on; with `baton` one rank computes at a time."""
        self.recorder, self._fresh = recorder, True
        self._baton = tempfile.NamedTemporaryFile(prefix="minillm-baton-") if baton else None  # noqa: SIM115

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Let requests wait that came at `arrived_s`, or now; all of them or, with a `ValueError` for one that can never
        run, none.
        """
        for request in requests:
            self.check(request.scheduled)
        when = time.monotonic() if arrived_s is None else arrived_s
        if self._call is None:
            self.instance.open(self.number, self.options, self.order)
        for request in with_twins(requests):
            self.requests[request.request_id] = request
        for request in requests:
            request.life.note(Event.ARRIVED, when)
            self.recorder.trace.lives.append(request.life)
        self.instance.ranks.post(0, add([_added(request, when) for request in requests]))

    def step(self) -> list[Piece]:
        """Take what the ranks have given since the last time; wait a moment for it when there is nothing."""
        try:
            if self._call is None:
                self._begin()
            assert self._call is not None
            if self._call.poll(WAIT_S) or not self.requests:
                self._end()
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._fail()
            raise
        pieces, self._pieces = self._pieces, []
        return pieces

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended yet; their blocks are free when the batches they are in are back."""
        going = [request for request in with_twins(requests) if request.finish_reason is None]
        for request in going:
            request.cancel(time.monotonic())
            self.requests.pop(request.request_id, None)
        if going and self._call is not None:
            self.instance.ranks.post(0, cancel([request.request_id for request in going]))
        if self._call is not None and not self.requests:
            self._end()

    def close(self) -> None:
        """End its requests, and let the ranks forget it."""
        self.cancel(list(self.requests.values()))
        self.instance.drop(self.number)

    def _begin(self) -> None:
        """Let the ranks serve until there is nothing left to do."""
        recording = Recording(
            self._fresh, self.recorder.timing, self.recorder.activations, self.recorder.on_span is not None,
            self._baton.name if self._baton else None,
        )  # fmt: skip
        self._fresh = False
        self._call = self.instance.ranks.begin(serve, self.number, recording, on_event=self._hear)

    def _end(self) -> None:
        """The ranks have nothing left to do: take the last of what they recorded."""
        assert self._call is not None
        self._call.result()
        self._call = None
        self.recorder.trace.spans.sort(key=lambda span: span.end_s)
        self.recorder.trace.memory.sort(key=lambda sample: sample.time_s)

    def _hear(self, rank: int, event: Any) -> None:
        """What a rank has to tell: spans and memory, or tokens."""
        if isinstance(event, Seen):
            self.recorder.trace.memory.extend(event.memory)
            for span in event.spans:
                self.recorder.add(span)
            return
        turn: Turn = event
        self.load = turn.load
        for told in turn.told:
            request = self.requests.get(told.piece.request_id)
            if request is None:  # cancelled meanwhile
                continue
            if not request.life.moments:  # a fork
                self.recorder.trace.lives.append(request.life)
            request.life.moments[told.since :] = told.moments
            request.life.reused_tokens = told.reused_tokens
            request.repeat(told.piece)
            self._pieces.append(told.piece)
            if request.finish_reason is not None:
                del self.requests[request.request_id]

    def _fail(self) -> None:
        """The instance is lost, and with it every request."""
        self._call, self.load = None, Load(0, 0, 0, self.num_blocks)
        self.failed = frozenset(self.requests)
        for request in self.requests.values():
            request.fail(time.monotonic())
        self.requests.clear()


def _added(request: Request, when: float) -> Added:
    params = replace(request.params, seed=request.seed)
    return Added(request.request_id, request.index, request.prompt, params, request.scheduled.priority, when)
