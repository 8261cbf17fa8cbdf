"""Records one rank's spans and memory while it works. Counts are always kept; the switch removes the clocks only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from minillm.trace.trace import Category, Kind, MemorySample, Span, Trace


class Priced(Protocol):
    """Something with operations and bytes of memory traffic, as `model.cost.Cost`."""

    @property
    def flops(self) -> int: ...

    @property
    def memory_bytes(self) -> int: ...


class Recorder:
    """Fills a `Trace`. With `timing=False` spans and samples have time 0, and no clock is read for them; requests, whose
    latencies are results and not measurements of the trace, keep their time stamps.

    `on_span` is called with each span as it ends, for live views. With `activations=True` the engine also measures the
    peak of every step's activations, which is slow. With `details` a step is cut where it sends something.
    """

    def __init__(
        self,
        rank: int = 0,
        timing: bool = True,
        on_span: Callable[[Span], None] | None = None,
        activations: bool = False,
        details: bool = False,
        **about: Any,
    ) -> None:
        self.rank = rank
        self.timing = timing
        self.on_span = on_span
        self.activations = activations
        self.details = details
        self.open: OpenSpan | None = None  # the span that we are in
        self.trace = Trace(about=about)
        self.cpu_end_s: float | None = None  # the thread's CPU clock when the last span ended

    def now_s(self) -> float:
        """The monotonic clock, or 0 with timing off."""
        return time.monotonic() if self.timing else 0.0

    def span(self, kind: Kind, name: str, **figures: Any) -> OpenSpan:
        """`with recorder.span(Kind.DECODE, "decode", tokens=3):` records what stands inside as one span."""
        return OpenSpan(self, kind, name, figures)

    def step(self, kind: Kind, name: str, costs: Sequence[Priced], **figures: Any) -> OpenSpan:
        """The span of a step, with what each of its parts between two messages costs, which may be found while it runs."""
        return OpenSpan(self, kind, name, figures, costs)

    def add(self, span: Span) -> None:
        """Keep a span that is over."""
        self.trace.spans.append(span)
        if self.on_span is not None:
            self.on_span(span)

    def memory(self, category: Category, count_bytes: int, since_s: float | None = None) -> None:
        """From now on, or since a time not before the last sample, this rank holds so many bytes for `category`."""
        when = self.now_s() if since_s is None else since_s
        self.trace.memory.append(MemorySample(self.rank, category, when, count_bytes))


class OpenSpan:
    """A span that has begun. A class, not a generator: it is entered thousands of times a second.

    What is `sent` within it counts as its message bytes. Where the recorder wants `details`, the span is instead cut there:
    a piece, the message, the next piece, each with its own of `costs`.
    """

    __slots__ = ("_all_costs", "_costs", "_cpu", "_figures", "_kind", "_name", "_recorder", "_start", "sent")

    def __init__(
        self, recorder: Recorder, kind: Kind, name: str, figures: dict[str, Any], costs: Sequence[Priced] = ()
    ) -> None:
        self._recorder, self._kind, self._name, self._figures = recorder, kind, name, figures
        self._all_costs, self._costs, self.sent = costs, iter(costs), 0

    def __enter__(self) -> OpenSpan:
        self._begin()
        self._recorder.open = self
        return self

    def __exit__(self, *error: object) -> None:
        self._recorder.open = None
        if self._recorder.details and self._kind is not Kind.COMMUNICATION:
            self._piece(self._figures.get("tokens", 0))
            return
        if self._all_costs:
            self._figures["flops"] = sum(cost.flops for cost in self._all_costs)
            self._figures["memory_bytes"] = sum(cost.memory_bytes for cost in self._all_costs)
        if self.sent:
            self._end(self._kind, self._name, message_bytes=self.sent, **self._figures)
        else:
            self._end(self._kind, self._name, **self._figures)

    @contextmanager
    def message(self, name: str, **figures: Any) -> Iterator[None]:
        """What stands inside is spent on a message, between two pieces of the step."""
        self._piece()
        self._begin()
        yield
        self._end(Kind.COMMUNICATION, name, step=self._figures.get("step", 0), **figures)
        self._begin()

    def send(self, message_bytes: int) -> None:
        """Something leaves while the work goes on: where details are wanted, end a piece here and begin the next."""
        self.sent += message_bytes
        if self._recorder.details:
            self._piece()
            self._begin()

    @contextmanager
    def waiting(self, name: str, **figures: Any) -> Iterator[None]:
        """What stands inside waits for a message that is under way; no piece of work stands before it."""
        if not self._recorder.details:
            yield
            return
        self._begin()
        yield
        self._end(Kind.WAITING, name, step=self._figures.get("step", 0), **figures)
        self._begin()

    @property
    def step(self) -> int:
        """Which step it is."""
        return self._figures.get("step", 0)

    def _piece(self, tokens: int = 0) -> None:
        """What was done since the last message; the tokens count once."""
        cost = next(self._costs, None)
        price = {"flops": cost.flops, "memory_bytes": cost.memory_bytes} if cost else {"flops": 0, "memory_bytes": 0}
        self._end(self._kind, self._name, **(self._figures | price | {"tokens": tokens}))

    def _begin(self) -> None:
        timing = self._recorder.timing
        self._start = time.monotonic() if timing else 0.0
        self._cpu = time.thread_time() if timing else 0.0

    def _end(self, kind: Kind, name: str, **figures: Any) -> None:
        recorder = self._recorder
        cpu, gap, end = None, None, 0.0
        if recorder.timing:
            cpu_end = time.thread_time()
            cpu, end = cpu_end - self._cpu, time.monotonic()
            gap = self._cpu - recorder.cpu_end_s if recorder.cpu_end_s is not None else None
        recorder.add(Span(recorder.rank, kind, name, self._start, end, cpu_s=cpu, gap_cpu_s=gap, **figures))
        if recorder.timing:
            recorder.cpu_end_s = time.thread_time()  # recording is no work of the engine's
