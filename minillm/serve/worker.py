"""The thread that owns the engine: requests go in from anywhere, pieces come out to whoever asked. It knows no HTTP."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minillm.engine.request import Piece, Request, with_twins
from minillm.llm import LLM

TRACE_SPANS, TRACE_LIVES = 10_000, 1000  # what is kept of a server's trace
TURN_S = 0.01  # how long a request that comes while ranks compute may wait until they hear of it


class Busy(Exception):
    """The queue is full."""


class EngineFailed(Exception):
    """A step of the engine ended in an error, of which clients see the first line."""

    def __init__(self, error: Exception) -> None:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        super().__init__(f"the engine failed: {first}")


class Closing(Exception):
    """The server is shutting down."""


@dataclass(eq=False)
class Job:
    """The requests of one call. `deliver` gets each piece, then None, or the error that ended them all."""

    requests: Sequence[Request]
    deliver: Callable[[Piece | Exception | None], None]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(with_twins(self.requests))

    @property
    def ended(self) -> bool:
        """Whether every request has."""
        return all(request.finish_reason is not None for request in with_twins(self.requests))


class Worker:
    """Serves jobs until it is closed. At most `max_queue` requests are under way, waiting ones among them."""

    def __init__(self, llm: LLM, max_queue: int = 256) -> None:
        if max_queue < 1:
            raise ValueError(f"max_queue={max_queue!r}: give a whole number from 1")
        self.llm = llm
        self.max_queue = max_queue
        self.closing_s: float | None = None  # when what still runs is ended
        self._changed = threading.Condition()
        self._coming: list[Job] = []
        self._going: list[Job] = []
        self._jobs: list[Job] = []
        self._under_way = 0
        self._thread = threading.Thread(target=self._work, name="minillm engine", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> int:
        """Requests that wait or run."""
        return self._under_way

    @property
    def alive(self) -> bool:
        """Whether it still takes requests."""
        return self._thread.is_alive() and self.closing_s is None

    def submit(self, job: Job) -> None:
        """Let a job wait. Raises `Busy` when there are too many, and `Closing`."""
        with self._changed:
            if not self.alive:
                raise Closing("the server is shutting down")
            if self._under_way + job.count > self.max_queue:
                raise Busy(f"{self._under_way} requests are under way and at most {self.max_queue} may be: try later")
            self._under_way += job.count
            self._coming.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody listens to this job any more: its blocks are free soon."""
        with self._changed:
            self._going.append(job)
            self._changed.notify()

    def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests; those under way have `grace_s` to finish, then they fail with `Closing`."""
        with self._changed:
            self.closing_s = min(self.closing_s or math.inf, time.monotonic() + grace_s)
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until every job has ended and the thread is gone."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._coming or self._going or self._jobs or self.closing_s is not None):
                    self._changed.wait()
                coming, going, self._coming, self._going = self._coming, self._going, [], []
            for job in coming:
                self._begin(job)
            for job in going:
                self._end(job, None)
            if self.closing_s is not None and (not self._jobs or time.monotonic() >= self.closing_s):
                self._end_all(Closing("the server is shutting down"))
                return
            self._step()

    def _begin(self, job: Job) -> None:
        self._jobs.append(job)
        try:
            self.llm.submit(job.requests)
        except Exception as error:
            self._end(job, EngineFailed(error))

    def _step(self) -> None:
        try:
            self.llm.step(TURN_S)
        except Exception as error:  # such as no memory: who was in the step is told, the others are served
            failed = self.llm.engine.failed
            for job in list(self._jobs):
                if any(request.request_id in failed for request in with_twins(job.requests)):
                    self._end(job, EngineFailed(error))
            return
        self.llm.trace.trim(TRACE_SPANS, TRACE_LIVES)
        for job in list(self._jobs):
            inbox = job.requests[0].inbox
            while inbox:
                job.deliver(inbox.popleft())
            if job.ended:
                lost = any(request.finish_reason == "failed" for request in with_twins(job.requests))
                self._end(job, EngineFailed(RuntimeError("the ranks that served this were lost")) if lost else None)

    def _end_all(self, error: Exception) -> None:
        for job in list(self._jobs):
            self._end(job, error)

    def _end(self, job: Job, error: Exception | None) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            with self._changed:
                self._under_way -= job.count
            job.deliver(error)
            self.llm.cancel(job.requests)
