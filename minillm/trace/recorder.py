"""Records one rank's spans and memory while it works. Counts are always kept; the switch removes the clocks only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from minillm.trace.trace import Category, Kind, MemorySample, Span, Trace


class Recorder:
    """Fills a `Trace`. With `timing=False` spans and samples have time 0, and no clock is read for them; requests, whose
    latencies are results and not measurements of the trace, keep their time stamps.

    `on_span` is called with each span as it ends, for live views. With `activations=True` the engine also measures the
    peak of every step's activations, which is slow.
    """

    def __init__(
        self,
        rank: int = 0,
        timing: bool = True,
        on_span: Callable[[Span], None] | None = None,
        activations: bool = False,
        **about: Any,
    ) -> None:
        self.rank = rank
        self.timing = timing
        self.on_span = on_span
        self.activations = activations
        self.trace = Trace(about=about)
        self.cpu_end_s: float | None = None  # the thread's CPU clock when the last span ended

    def now_s(self) -> float:
        """The monotonic clock, or 0 with timing off."""
        return time.monotonic() if self.timing else 0.0

    def span(self, kind: Kind, name: str, **figures: Any) -> OpenSpan:
        """`with recorder.span(Kind.DECODE, "decode", tokens=3):` records what stands inside as one span."""
        return OpenSpan(self, kind, name, figures)

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
    """A span that has begun. A class, not a generator: it is entered thousands of times a second."""

    __slots__ = ("_cpu", "_figures", "_kind", "_name", "_recorder", "_start")

    def __init__(self, recorder: Recorder, kind: Kind, name: str, figures: dict[str, Any]) -> None:
        self._recorder, self._kind, self._name, self._figures = recorder, kind, name, figures

    def __enter__(self) -> OpenSpan:
        timing = self._recorder.timing
        self._start = time.monotonic() if timing else 0.0
        self._cpu = time.thread_time() if timing else 0.0
        return self

    def __exit__(self, *error: object) -> None:
        recorder = self._recorder
        cpu, gap, end = None, None, 0.0
        if recorder.timing:
            cpu_end = time.thread_time()
            cpu, end = cpu_end - self._cpu, time.monotonic()
            gap = self._cpu - recorder.cpu_end_s if recorder.cpu_end_s is not None else None
            recorder.cpu_end_s = cpu_end
        recorder.add(
            Span(recorder.rank, self._kind, self._name, self._start, end, cpu_s=cpu, gap_cpu_s=gap, **self._figures)
        )
