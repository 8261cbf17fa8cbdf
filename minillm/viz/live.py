"""The timeline that zooms, tells what the mouse points at, and grows while a job runs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import traitlets
from matplotlib.figure import Figure

from minillm.trace.trace import Span, Trace
from minillm.viz.style import frame, new_figure, png
from minillm.viz.timeline import draw_timeline, memory_steps
from minillm.viz.widget import InteractivePicture, script
from minillm.viz.words import batch_letters, bytes_text, caption_of, plain

REFRESH_S = 0.1  # ten pictures a second at most


class Timeline(InteractivePicture):
    """A trace in the browser: lanes over memory, zoom, hover. In a notebook without kernel the still timeline stands.

    `Timeline(trace, finding)` shows a run that has ended. `Timeline(finding=…)`, displayed before a job, grows with it:
    give `timeline.push` to `llm.on_span`, or `timeline.on_event` to `Ranks.run(on_event=…)` where the ranks emit spans;
    `timeline.show(trace)` then shows the whole trace, memory included.
    """

    _esm = script("timeline")
    finding = traitlets.Unicode().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)
    lanes: Any = traitlets.List().tag(sync=True)
    spans: Any = traitlets.List().tag(sync=True)  # [lane, kind, start s, end s, what hovering tells, letter]
    memory: Any = traitlets.List().tag(sync=True)  # [category, [[time s, bytes] …]] of the rank that holds most
    memory_label = traitlets.Unicode().tag(sync=True)

    def __init__(self, trace: Trace | None = None, finding: str = "", caption: str | None = None) -> None:
        super().__init__()
        self.finding = finding
        self.caption = caption or ""
        self._said = caption
        self._growing = Trace()
        self._shown: Trace | None = None
        self._shown_at = 0.0
        if trace is not None:
            self.show(trace)

    def push(self, span: Span) -> None:
        """Take a span that has just ended; the picture follows at most ten times a second. It grows by what ranks compute; what
        is on the way between them is left to `show`.
        """
        if span.lane != "compute":
            return
        if self._shown is not None:  # another run begins
            self._shown, self._growing, self.memory = None, Trace(), []
        self._growing.spans.append(span)
        if time.monotonic() - self._shown_at > REFRESH_S:
            self._shown_at = time.monotonic()
            self._draw(self._growing)

    def on_event(self, rank: int, event: Any) -> None:
        """Take what a rank emitted, if it is a span."""
        if isinstance(event, Span):
            self.push(replace(event, rank=rank))

    def show(self, trace: Trace) -> None:
        """Show a whole trace, and its memory."""
        self._shown = trace
        if self._said is None:
            self.caption = caption_of(trace)
        rank = max(trace.ranks, key=lambda each: sum(trace.peak_bytes(each).values()), default=0)
        start = trace.start_s
        self.memory = [
            [category.value, [[when - start, count] for when, count in series]]
            for category, series in memory_steps(trace, rank).items()
        ]
        self.memory_label = f"rank {rank}"
        self._draw(trace)

    def png(self) -> bytes:
        """The still timeline; before anything ran, an empty frame that says so."""
        return png(self.figure())

    def figure(self) -> Figure:
        """The same trace as a still picture."""
        trace = self._shown or self._growing
        if trace.spans:
            return draw_timeline(trace, self.finding, self.caption)
        figure, (axis,) = new_figure(1.4)
        axis.axis("off")
        return frame(figure, self.finding, "run the cell to see it grow")

    def _draw(self, trace: Trace) -> None:
        lanes = sorted({(span.rank, span.lane) for span in trace.spans})
        several = len({lane for _, lane in lanes}) > 1
        place = {lane: number for number, lane in enumerate(lanes)}
        start = trace.start_s
        self.lanes = [f"rank {rank}" + (f" {lane}" if several else "") for rank, lane in lanes]
        letters = batch_letters(trace)
        self.spans = [
            [
                place[s.rank, s.lane], s.kind.value, s.start_s - start, s.end_s - start, told(s),
                letters.get(s.request_ids, ""),
            ]
            for s in trace.spans
        ]  # fmt: skip


def told(span: Span) -> str:
    """What hovering over a span says: name, milliseconds, and the figures it has."""
    lines = [f"rank {span.rank} · {span.name} · {plain(span.duration_s * 1e3)} ms"]
    if span.tokens:
        requests = ", ".join(map(str, span.request_ids[:8])) + (" …" if len(span.request_ids) > 8 else "")
        lines.append(f"{span.tokens} token{'s' * (span.tokens != 1)}" + (f" of request {requests}" if requests else ""))
    if span.flops:
        lines.append(f"{plain(span.flops / 1e9)} GFLOP, moves {bytes_text(span.memory_bytes)}")
    if span.message_bytes:
        lines.append(f"sends {bytes_text(span.message_bytes)}")
    if span.cpu_s is not None:
        lines.append(f"CPU {plain(span.cpu_s * 1e3)} ms")
    return "\n".join(lines)
