"""The critical path: what made a replayed run as long as it is."""

from __future__ import annotations

from collections import defaultdict

from minillm.trace.replay import WIRE, message_of
from minillm.trace.trace import Kind, Span, Trace


def critical_path(trace: Trace) -> list[Span]:
    """The spans of a replayed trace that made it as long as it is, first to last: each could begin only once the one before
    had ended, or a wire had taken it in. Shortening any other would change nothing. What the host does between spans is not
    among them.
    """
    rows: dict[int, list[Span]] = defaultdict(list)
    wires = {message_of(span): span for span in trace.spans if span.lane == WIRE}
    for span in sorted(trace.spans, key=lambda span: (span.start_s, span.end_s)):
        if span.lane != WIRE:
            rows[span.rank].append(span)
    here: Span | None = max((span for row in rows.values() for span in row), key=lambda span: span.end_s, default=None)
    path: list[Span] = []
    while here is not None:
        if here.kind is Kind.WAITING and here.peer < 0:  # a sum that was under way: whoever came last to it
            here = _before_sum(trace, rows, here, path)
            continue
        if here.kind is Kind.WAITING:  # what was waited for has come from another rank
            wire = wires[message_of(here)]
            path.append(wire)
            here = _last_before(rows[wire.rank], wire.start_s)
            while here is None or here.end_s < wire.start_s:  # the wire was taken by the message before
                wire = wires[*message_of(wire)[:3], wire.sequence - 1]
                path.append(wire)
                here = _last_before(rows[wire.rank], wire.start_s)
            continue
        path.append(here)
        if here.kind is Kind.COMMUNICATION:  # a collective: whoever came last
            same = [
                span
                for row in rows.values()
                for span in row
                if (span.group, span.sequence) == (here.group, here.sequence)
            ]
            here = max(same, key=lambda span: span.start_s)
        row = rows[here.rank]
        place = next(n for n, span in enumerate(row) if span is here)
        here = row[place - 1] if place else None
    return path[::-1]


def _before_sum(trace: Trace, rows: dict[int, list[Span]], waiting: Span, path: list[Span]) -> Span | None:
    """The work before a sum that was under way, and before those of its group that it had to wait for, which go on the path."""
    sums = {span.sequence: span for span in trace.spans
            if span.lane == WIRE and (span.rank, span.group) == (waiting.rank, waiting.group)}  # fmt: skip
    work = [[span for span in row if span.kind is not Kind.WAITING] for row in rows.values()]
    number = waiting.sequence
    while True:
        wire = sums[number]
        path.append(wire)
        before = [found for row in work if (found := _last_before(row, wire.start_s)) is not None]
        here = max(before, key=lambda span: span.end_s, default=None)
        if here is None or here.end_s == wire.start_s:
            return here
        number -= 1


def _last_before(row: list[Span], when_s: float) -> Span | None:
    """The last span of a rank that had ended by then."""
    return next((span for span in reversed(row) if span.end_s <= when_s), None)
