"""The loop of the engine: schedule, run, postprocess. It serves many requests at once.

What goes into a step is decided in `policy/scheduler.py`; where K and V lie, in `policy/blocks.py`. The engine knows
tokens and requests, and nothing of texts beyond the stop strings, nor of how its runner computes. One thread at a time
may use it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from minillm.engine.handing import Handing
from minillm.engine.request import Piece, Request, with_twins
from minillm.engine.runner import Runner, Work
from minillm.model.sampling import Draw
from minillm.policy.batch import Batch, Chunk
from minillm.policy.blocks import BlockPool
from minillm.policy.loans import Heartbeat
from minillm.policy.options import EngineOptions
from minillm.policy.request import Load, Order, ScheduledRequest, first_come
from minillm.policy.scheduler import Scheduler
from minillm.trace.life import LOST_BLOCKS, Event
from minillm.trace.recorder import Recorder

LOST = -1  # stands where no token could be drawn


class Borrowing(Protocol):
    """What lets an engine use blocks of others (`parallel/lending.py`). Its `lock` is for the scheduler, of which others are told."""

    lock: Any

    def negotiate(self, now_s: float) -> None: ...

    def attach(self, batch: Batch) -> Batch: ...

    def landed(self, batch: Batch, unheard: Sequence[Chunk]) -> None: ...

    def tell(self) -> None: ...

    def follow(self, view: dict[int, int], beyond: int, moves: Sequence[tuple[int, int, int]]) -> None: ...

    def heartbeat(self) -> Heartbeat: ...


class Engine:
    """Runs requests on a runner. `recorder` gets a span for each step, and the memory that the run holds."""

    def __init__(
        self, runner: Runner, options: EngineOptions, recorder: Recorder, order: Order = first_come
    ) -> None:  # fmt: skip
        self.runner = runner
        self.options = options
        pool = BlockPool(runner.num_blocks, options.block_size, options.prefix_reuse)
        self.scheduler = Scheduler(pool, options, order, runner.depth)
        self.requests: dict[int, Request] = {}
        self.under_way: deque[Work] = deque()
        self.steps = 0
        self.failed: frozenset[int] = frozenset()  # who was in a step that ended in the last error
        self.borrowing: Borrowing | None = None
        self.handing: Handing | None = None
        self.record(recorder)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_work

    @property
    def load(self) -> Load:
        """How full it is now."""
        return self.scheduler.load

    def check(self, request: ScheduledRequest) -> None:
        """Raise `ValueError` for a request that can never run here."""
        self.scheduler.check(request)

    def check_samples(self, samples: int) -> None:
        """Raise `ValueError` when so many samples of one prompt can never run together."""
        self.scheduler.check_samples(samples)

    def record(self, recorder: Recorder, baton: bool = False, fresh: bool = True) -> None:
        """Let `recorder` have what happens from now on; steps count from 1 again if it is `fresh`.

        A `baton` is for ranks; here one computes at a time anyway.
        """
        self.recorder = recorder
        self.steps = 0 if fresh else self.steps
        self.runner.record(recorder)

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Let requests wait that came at `arrived_s`, or now; all of them or, with a `ValueError` for one that can never
        run, none.
        """
        for request in requests:
            self.scheduler.check(request.scheduled)
        when = time.monotonic() if arrived_s is None else arrived_s
        for request in requests:
            request.scheduled.arrival_s = when
            with self._alone():
                self.scheduler.add(request.scheduled)
            self._enter(request)
            if not request.life.moments:  # else another engine has begun it
                request.life.note(Event.ARRIVED, when)

    def run(self) -> Iterator[Piece]:
        """Step until every request has finished; yields what each step added."""
        while self.requests:
            yield from self.step()

    def step(self, wait_s: float = 0.0) -> list[Piece]:
        """One turn of the loop: fill the runner, take what comes out first. No pieces when nothing can run. `wait_s` is for engines
        elsewhere.
        """
        try:
            if self.handing is not None:
                self.handing.hear(time.monotonic())
            while len(self.under_way) < self.runner.depth:
                work = self.runner.agree(self.schedule())
                if work is None:
                    break
                self.under_way.append(work)
                self.runner.start(work)
            if not self.under_way:
                return []
            tokens = self.runner.finish()
            work = self.under_way.popleft()
            return self.postprocess(work.batch, work.by_chunk(tokens))
        except BaseException:  # such as the stop button: who was in a step under way is computed again
            self.under_way.clear()
            self.failed = self.scheduler.recover()
            raise

    def schedule(self) -> Work:
        """The next batch; what it means to the lives of requests is noted."""
        now = time.monotonic()
        batch = self._next_batch(now)
        self.steps += bool(batch.chunks)
        for request_id in batch.preempted:
            if request_id in self.requests:  # else it was cancelled meanwhile
                self.requests[request_id].life.note(Event.PREEMPTED, now)
        started = []
        for chunk in batch.chunks:
            request = self.requests[chunk.request_id]
            last = request.life.moments[-1][0]
            if last is Event.ARRIVED:
                request.life.reused_tokens = chunk.start
            if last is Event.ARRIVED or last in LOST_BLOCKS:
                request.life.note(Event.STARTED, now)
                started.append(chunk.request_id)
        if self.handing is not None:
            self.handing.scheduled(batch, started, now)
        self._note_cache()
        draws = tuple(self._draws(chunk) for chunk in batch.chunks if chunk.samples)
        return Work(self.steps, batch, draws, self.scheduler.pool.used_on(self.runner.spread))

    def postprocess(self, batch: Batch, tokens: list[list[int]]) -> list[Piece]:
        """Hand every request its token; those that finished leave their blocks."""
        now = time.monotonic()
        lost = [bool(drawn) and drawn[0] == LOST for drawn in tokens]  # what it had elsewhere
        with self._alone():
            self.scheduler.postprocess(batch, [d[0] if d and not gone else None for d, gone in zip(tokens, lost)])
            if self.borrowing is not None:
                self.borrowing.landed(batch, [chunk for chunk, gone in zip(batch.chunks, lost) if gone])
        pieces = []
        for chunk, drawn, gone in zip(batch.chunks, tokens, lost):
            request = self.requests.get(chunk.request_id)
            if request is None or gone:  # cancelled while its batch was under way, or to be computed again
                continue
            if len(drawn) > 1:
                self._fork(request, drawn)
            for each, token in zip([request, *request.twins], drawn):
                pieces.append(each.take(token, now))
                if each.finish_reason is not None:
                    self._leave(each)
        self._note_cache()
        if self.borrowing is not None:
            self.borrowing.tell()
        return pieces

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended yet, with the other samples of their prompts; their blocks are free at once."""
        self.drop(with_twins(requests))

    def drop(self, requests: Iterable[Request]) -> None:
        """End these requests; other samples of their prompts go on."""
        for request in requests:
            if request.finish_reason is None:
                request.cancel(time.monotonic())
            if self.requests.get(request.request_id) is request:
                self._leave(request)
        if self.borrowing is not None:
            self.borrowing.tell()

    def _draws(self, chunk: Chunk) -> tuple[Draw, ...]:
        """How the token after a chunk is drawn, for each of the samples that fork there; nothing for a greedy one."""
        request = self.requests[chunk.request_id]
        if request.params.greedy and request.scheduled.samples == 1:
            return ()
        forks = request.twins if request.scheduled.samples > 1 else []
        return tuple(Draw(each.params, each.seed, each.noise_key, chunk.end) for each in [request, *forks])

    def _fork(self, request: Request, drawn: list[int]) -> None:
        """The request's twins go on from its prompt, each with its own first token."""
        for twin, token in zip(request.twins, drawn[1:]):
            twin.scheduled.tokens[:] = [*request.prompt, token]
            self.scheduler.fork(request.request_id, twin.scheduled)
            self._enter(twin)
            twin.life.moments = list(request.life.moments)

    def _next_batch(self, now_s: float) -> Batch:
        """What the scheduler says, once it is agreed with others what they lend."""
        if self.borrowing is None:
            return self.scheduler.schedule(now_s)
        self.borrowing.negotiate(now_s)
        with self.borrowing.lock:
            return self.borrowing.attach(self.scheduler.schedule(now_s))

    def _alone(self) -> AbstractContextManager[Any]:
        """Nobody else looks at the scheduler meanwhile."""
        return self.borrowing.lock if self.borrowing is not None else nullcontext()

    def _note_cache(self) -> None:
        self.runner.note_cache(self.scheduler.pool.used_on(self.runner.spread))

    def _enter(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.recorder.trace.lives.append(request.life)

    def _leave(self, request: Request) -> None:
        del self.requests[request.request_id]
        with self._alone():
            self.scheduler.remove(request.request_id)
        if self.handing is not None:
            self.handing.left(request)
