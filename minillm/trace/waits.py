"""A collective's time, told apart: until the last rank is there its members wait, and only then do they communicate."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from minillm.trace.trace import Kind, Span, Trace


def with_waits(trace: Trace) -> Trace:
    """The trace, in which the part of a collective that a rank waits for the last member is a waiting span of its own."""
    complete: dict[tuple[str, int], float] = defaultdict(float)
    for span in trace.spans:
        if _is_collective(span):
            complete[span.group, span.sequence] = max(complete[span.group, span.sequence], span.start_s)
    spans = []
    for span in trace.spans:
        last_s = min(complete[span.group, span.sequence], span.end_s) if _is_collective(span) else span.start_s
        if last_s > span.start_s:
            spans.append(replace(span, kind=Kind.WAITING, end_s=last_s, message_bytes=0))
        spans.append(replace(span, start_s=last_s))
    return replace(trace, spans=spans)


def _is_collective(span: Span) -> bool:
    return span.kind is Kind.COMMUNICATION and bool(span.group) and span.peer < 0
